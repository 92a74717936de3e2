"""A Hugging Face folder as the first checkpoint of a new run, which training goes on from.

Weights become float32, as training keeps them; the optimizer begins anew. To begin with weights without a copy of them
is `model.init` (`convert/adopt.py`).
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from raynium.checkpoint.base import Base, BaseRef
from raynium.checkpoint.load import read_batch
from raynium.checkpoint.state import Chunk
from raynium.convert.description import described_model
from raynium.convert.folder import Folder
from raynium.convert.new_run import Imported, Part, refuse_used, write_first_checkpoint
from raynium.convert.weights import base_of_folder, find_weights
from raynium.data.store import TOKENIZER_NAME
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

STEP = 0


def import_folder(folder: str | Path, store: Store, *, tokenizer: str | Path | None = None) -> Imported:
    """Commit the folder's weights as step 0 of the run at `store`, which must be new. One process, on the CPU.

    tokenizer: a tokenizer.json, for a folder without one. Nothing is written before all of the folder was checked.
    Memory: one tensor; a file of ours is made in the temporary directory (TMPDIR). CheckpointError,
    CheckpointMismatch, CheckpointDamaged, DataError for the tokenizer, StoreError.
    """
    found = Folder(folder)
    refuse_used(store)
    model, tokenizer_path, text = described_model(found, tokenizer)
    base = base_of_folder(found, model, find_weights(found, model))

    ref = write_first_checkpoint(
        store,
        _parts(base),
        step=STEP,
        text=text,
        weights_only=True,
        imported_from=str(found),
        layout={"files": len(base.shards)},
    )
    logger.info("imported %s into %s: %d tensors", found, store.url, len(base.tensors))
    local = store.uri(TOKENIZER_NAME).removeprefix("file://")
    return Imported(ref, model, tokenizer_path if "://" in local else local)


def _parts(base: Base) -> Iterator[Part]:
    """One file of the folder at a time: it becomes one file of ours."""
    for number in range(len(base.shards)):
        entries = {entry.name: entry for entry in base.tensors if entry.blocks[0].shard == number}
        places = {name: torch.empty(entry.global_shape, device="meta") for name, entry in entries.items()}
        chunks = [Chunk.whole(name, place, saved_here=True) for name, place in places.items()]
        yield chunks, lambda block, entries=entries: read_batch(BaseRef(base), [entries[block.name]])[block.name]
