"""A checkpoint folder of neuronx-distributed as the first checkpoint of a new run, which any engine goes on from.

With its optimizer the run goes on at the step the optimizer has reached; without, at step 0 with a new one.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from raynium.checkpoint.state import Chunk
from raynium.config.local_folders import local_path
from raynium.config.schema import ModelSection
from raynium.convert.description import described_model
from raynium.convert.folder import Folder
from raynium.convert.new_run import Imported, Part, refuse_used, write_first_checkpoint
from raynium.convert.nxd_files import NxdFiles, RankState, Tensors
from raynium.errors import CheckpointError, CheckpointMismatch, some
from raynium.models.nxd_layout import KvOrder, by_stored, pieces
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

# The file that neuronx-distributed writes last.
DONE = "done"


def import_nxd_folder(
    folder: str | Path,
    store: Store,
    *,
    model_folder: str | Path,
    with_optimizer: bool = True,
    kv_order: KvOrder = "interleaved",
    tokenizer: str | Path | None = None,
) -> Imported:
    """Commit a neuronx-distributed checkpoint as the first one of the run at `store`, which must be new. One process.

    folder: of one tag, or of a checkpoint with one finished tag. model_folder: a Hugging Face folder's config.json and
    tokenizer.json, which neuronx-distributed does not keep. tokenizer: a tokenizer.json, for a folder without one.
    kv_order: where several ranks share a key/value head, "interleaved" if a Trainium1 saved it, "adjacent" if a
    Trainium2 did.
    Memory: what one tensor rank holds, and its moments. CheckpointError, CheckpointMismatch, CheckpointDamaged,
    DataError for the tokenizer, StoreError; nothing is kept of an import that fails.
    """
    refuse_used(store)
    model, tokenizer_path, text = described_model(Folder(model_folder), tokenizer)
    tag = _finished_tag(folder)
    files = NxdFiles(tag, with_optimizer=with_optimizer)
    _check_degree(model, files)

    # Files are mapped, not read: the first rank's are looked at twice.
    step = files.read(0).step
    ref = write_first_checkpoint(
        store,
        (_part(files, step, model, tensor_rank, kv_order) for tensor_rank in range(files.tensor_size)),
        step=step,
        text=text,
        weights_only=not with_optimizer,
        imported_from=str(tag),
        layout={"tensor": files.tensor_size},
    )
    logger.info("imported %s into %s at step %d", tag, store.url, step)
    return Imported(ref, model, tokenizer_path)


def _finished_tag(folder: str | Path) -> Path:
    path = local_path(folder)
    if (path / "model").is_dir():
        if not (path / DONE).exists():
            raise CheckpointError(f"{path} has no file {DONE!r}: neuronx-distributed did not finish saving it")
        return path
    tags = sorted(child.name for child in path.glob("*") if (child / DONE).exists())
    if not tags:
        raise CheckpointError(f"{path} holds no finished neuronx-distributed checkpoint: no folder in it has {DONE!r}")
    if len(tags) > 1:
        raise CheckpointError(
            f"{path} holds several checkpoints ({some(tags)}): give the folder of one, {path / tags[-1]}"
        )
    return path / tags[0]


def _check_degree(model: ModelSection, files: NxdFiles) -> None:
    degree, heads = files.tensor_size, model.num_kv_heads
    if (heads % degree and degree % heads) or model.num_heads % degree or model.vocab_size % degree:
        raise CheckpointMismatch(
            f"{files.folder} was saved by {degree} tensor-parallel ranks, among which {model.num_heads} heads, {heads} "
            f"key/value heads and {model.vocab_size:,} tokens cannot be divided: is it of the model in config.json?"
        )


def _part(files: NxdFiles, step: int, model: ModelSection, tensor_rank: int, kv_order: KvOrder) -> Part:
    state = files.read(tensor_rank)
    files.one_step({step, state.step})
    chunks = _chunks(state, model, files, tensor_rank=tensor_rank, kv_order=kv_order)
    sources = {(chunk.name, chunk.offsets): chunk.tensor for chunk in chunks}
    return chunks, lambda block: sources[block.name, block.offsets]


def _chunks(
    state: RankState, model: ModelSection, files: NxdFiles, *, tensor_rank: int, kv_order: KvOrder
) -> list[Chunk]:
    """This rank's blocks under our names, as views of the files. CheckpointMismatch if they are not the model's."""
    grouped = by_stored(pieces(model, tensor_rank=tensor_rank, tensor_size=files.tensor_size, kv_order=kv_order))
    weights = dict(state.weights)
    where = f"{files.folder}, tensor rank {tensor_rank},"
    head = weights.pop("head.weight", None) if model.embeddings == "tied" else None
    if head is not None and not torch.equal(head, weights.get("embedding.weight", torch.empty(0))):
        raise CheckpointMismatch(f"{where} has a head of its own, but config.json ties it to the embedding")
    if missing := sorted(grouped.keys() - weights.keys()):
        raise CheckpointMismatch(f"{where} lacks {some(missing)}, which the model in config.json has")
    if extra := sorted(weights.keys() - grouped.keys()):
        raise CheckpointMismatch(f"{where} has {some(extra)}, which the model in config.json does not have")
    chunks = []
    for prefix, tensors in _kinds(weights | state.masters, state):
        for stored, found in grouped.items():
            tensor, rows = tensors[stored], sum(piece.shape[0] for piece in found)
            expected = (rows, *found[0].shape[1:])
            if tuple(tensor.shape) != expected or not tensor.is_floating_point():
                raise CheckpointMismatch(
                    f"{where} has {stored} as {tensor.dtype} {list(tensor.shape)} instead of floats {list(expected)}"
                )
            for piece in found:
                block = tensor[piece.row : piece.row + piece.shape[0]]
                name = f"{prefix}/{piece.name}"
                chunks.append(Chunk(name, piece.global_shape, piece.offsets, block, saved_here=piece.first_holder))
    return chunks


def _kinds(weights: Tensors, state: RankState) -> Sequence[tuple[str, Tensors]]:
    return [("model", weights), *((f"optimizer/{kind}", tensors) for kind, tensors in state.moments.items())]
