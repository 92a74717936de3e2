"""The first checkpoint of a new run, made of tensors that were not trained here. One process, on the CPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import torch
import yaml

from raynium.checkpoint.catalog import list_checkpoints
from raynium.checkpoint.commit import commit_checkpoint, discard_save
from raynium.checkpoint.format.batches import raw_bytes
from raynium.checkpoint.format.image import plan_image
from raynium.checkpoint.format.manifest import SavedBlock, ShardEntry
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.config.schema import ModelSection
from raynium.convert.description import KEPT_NAME, RunText
from raynium.convert.weights import refuse_odd_numbers
from raynium.data.tokenizer import END_NAME, TOKENIZER_NAME
from raynium.errors import CheckpointError
from raynium.storage.own_folder import temporary_folder
from raynium.storage.store import Store

# What one data file will hold, and the tensor of each of its blocks.
Part = tuple[Sequence[Chunk], Callable[[SavedBlock], torch.Tensor]]


@dataclass(frozen=True)
class Imported:
    """The new run's first checkpoint. tokenizer_path: for data.tokenizer of the job."""

    ref: CheckpointRef
    model: ModelSection
    tokenizer_path: str

    def job_snippet(self, *, name: str, root: str) -> str:
        """The part of a job file that this model settles, as YAML."""
        sections = {
            "run": {"name": name, "root": root},
            "model": self.model.model_dump(mode="json"),
            "data": {"tokenizer": self.tokenizer_path},
        }
        return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def refuse_used(store: Store) -> None:
    """What an import that died has left, which is no checkpoint, does not count."""
    if list_checkpoints(store) or set(store.list(recursive=False).sizes) - {TOKENIZER_NAME, END_NAME, KEPT_NAME}:
        raise CheckpointError(f"{store.url} is in use: import into a run of another name")


def write_first_checkpoint(
    store: Store,
    parts: Iterable[Part],
    *,
    step: int,
    text: RunText,
    weights_only: bool,
    imported_from: str,
    layout: Mapping[str, Any],
) -> CheckpointRef:
    """Each part becomes one data file, in float32, one tensor in memory at a time. Nothing stays if it fails."""
    generation = f"import-{uuid4().hex[:8]}"
    try:
        entries = [_upload(store, part, step, generation, rank) for rank, part in enumerate(parts)]
        text.tokenizer.keep(store)
        text.described.keep(store)
        return commit_checkpoint(
            store,
            step=step,
            generation=generation,
            entries=entries,
            state={
                "step": step,
                "next_sample": 0,
                "tokens": 0,
                "weights_only": weights_only,
                "config": {"model": text.model.model_dump(mode="json")},
                "imported_from": imported_from,
            },
            world_size=len(entries),
            layout=layout,
        )
    except BaseException:
        discard_save(store, step=step, generation=generation)
        raise


def _upload(store: Store, part: Part, step: int, generation: str, rank: int) -> ShardEntry:
    chunks, tensor_of = part
    meta = {"dtype": torch.float32, "device": "meta"}
    plan = plan_image([replace(chunk, tensor=torch.empty(chunk.tensor.shape, **meta)) for chunk in chunks])
    with temporary_folder("import") as folder:
        image = folder / "image"
        try:
            with image.open("xb") as file:
                file.write(plan.header_of(step))
                # As they lie in the file, without gaps.
                for block in plan.tensors:
                    tensor = tensor_of(block).to(torch.float32)
                    refuse_odd_numbers(block.name, tensor)
                    file.write(raw_bytes(tensor))
        except OSError as error:
            raise CheckpointError(
                f"cannot write {plan.size:,} bytes to {image}: {error.strerror}; set TMPDIR to a larger disk"
            ) from error
        return upload_shard(store, plan.info(step=step, path=image), generation=generation, rank=rank)
