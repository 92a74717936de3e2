"""From a checkpoint of any layout into this rank's blocks, verified on the way. Needs torch.

What a rank wants becomes ranges of the data files. Where a range is also one piece of the destination's memory it is
read straight into it; otherwise (columns, tensors on a device, another dtype) through scratch memory and a strided
copy. Nothing is unpickled; shapes and places come from the manifest, never from the data.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from raynium.checkpoint.base import Readable
from raynium.checkpoint.format.blocks import Block
from raynium.checkpoint.format.boxes import Box, boxes_of_flat_range, intersect, spans
from raynium.checkpoint.format.image import TORCH_DTYPES, dtype_name
from raynium.checkpoint.format.manifest import TensorEntry
from raynium.checkpoint.reads import MAX_GAP_UNITS, Wanted, read_wanted
from raynium.checkpoint.state import LEFT_OUT_NAME, PATIENCE_NAME, RECENT_NAME, Chunk
from raynium.errors import CheckpointMismatch, some

logger = logging.getLogger(__name__)

# Another layout has other generators, and an older checkpoint has left nothing out. Without an optimizer the engine
# keeps the moments it was built with.
_OPTIONAL_PREFIXES = ("rng/", PATIENCE_NAME, LEFT_OUT_NAME, RECENT_NAME)
_OPTIONAL_PREFIXES_WITH_WEIGHTS_ONLY = (*_OPTIONAL_PREFIXES, "optimizer/")


@dataclass(frozen=True)
class Loaded:
    """What came with the tensors: the state as given to `commit_checkpoint`.

    absent: optional names that were asked for and are not in the checkpoint.
    """

    state: Mapping[str, Any]
    absent: tuple[str, ...]
    num_bytes_read: int


@dataclass(frozen=True)
class _Copy:
    """A saved block of which something, `wanted` in global coordinates, goes into one destination. dtype: as saved."""

    block: Block
    dtype: torch.dtype
    wanted: Box
    chunk: Chunk


def load_checkpoint(
    ref: Readable, chunks: Sequence[Chunk], *, dtypes: Literal["equal", "converted"] = "equal"
) -> Loaded:
    """Fill every chunk's tensor in place. Every rank calls it with its own chunks; ranks do not talk.

    dtypes: "converted" rounds to the destination's dtype where it is another. Memory beside the destination: at most
    16 MiB for each of 8 streams, where nothing can be read straight into place.
    CheckpointMismatch (before anything is read) if a tensor is missing or has another global shape or dtype, except
    that `rng/…` and what counts steps may be missing, and `optimizer/…` where the manifest says weights only: those
    tensors stay as they are. CheckpointDamaged if an object is missing, cut, or changed, with the tensors that it hit;
    tensors are then partly filled, and what is in them must not be used.
    """
    absent = _check_match(ref, chunks, dtypes)
    wanted = wanted_ranges(ref, [chunk for chunk in chunks if chunk.name not in absent])
    with torch.no_grad():
        num_bytes_read = read_wanted(ref, wanted)
    return Loaded(dict(ref.manifest.state), tuple(sorted(absent)), num_bytes_read)


def read_tensors(ref: Readable, prefix: str = "model/") -> dict[str, torch.Tensor]:
    """Whole tensors whose names begin with `prefix`, on the CPU, by full name. For one process: sampling."""
    entries = [entry for entry in ref.manifest.tensors if entry.name.startswith(prefix)]
    if not entries:
        names = some([entry.name for entry in ref.manifest.tensors])
        raise CheckpointMismatch(f"{ref.uri} holds no tensor named {prefix}…: it has {names or 'none'}")
    return read_batch(ref, entries)


def read_batch(ref: Readable, entries: Sequence[TensorEntry]) -> dict[str, torch.Tensor]:
    """These tensors, whole, verified, on the CPU, by full name and in this order. Raises as `load_checkpoint`."""
    tensors = {entry.name: torch.empty(entry.global_shape, dtype=TORCH_DTYPES[entry.dtype]) for entry in entries}
    load_checkpoint(ref, [Chunk.whole(name, tensor, saved_here=False) for name, tensor in tensors.items()])
    return tensors


# ---- what goes where ----------------------------------------------------------------------------------------------


def wanted_ranges(ref: Readable, chunks: Sequence[Chunk]) -> list[Wanted]:
    """The bytes of data files that these chunks, which the checkpoint has, are made of."""
    tensors = {tensor.name: tensor for tensor in ref.manifest.tensors}
    copies = (copy for chunk in chunks for copy in _copies_into(chunk, tensors[chunk.name]))
    return [each for copy in copies for each in _wanted(ref, copy)]


def _check_match(ref: Readable, chunks: Sequence[Chunk], dtypes: str) -> set[str]:
    """Names of optional tensors that the checkpoint lacks. CheckpointMismatch for anything else that does not fit."""
    tensors = {tensor.name: tensor for tensor in ref.manifest.tensors}
    missing = sorted({chunk.name for chunk in chunks} - tensors.keys())
    optional = _OPTIONAL_PREFIXES_WITH_WEIGHTS_ONLY if ref.manifest.weights_only else _OPTIONAL_PREFIXES
    absent = {name for name in missing if name.startswith(optional)}
    if required := [name for name in missing if name not in absent]:
        unasked = sorted(tensors.keys() - {chunk.name for chunk in chunks})
        raise CheckpointMismatch(
            f"{ref.uri} lacks {some(required)}, which this run needs; it holds {some(unasked) or 'nothing'}, which "
            "this rank does not ask for: resume with the model and optimizer that saved it"
        )
    differences = [
        f"{chunk.name} is {saved.dtype} {saved.global_shape} in the checkpoint and {dtype} {tuple(chunk.global_shape)} "
        "in this run"
        for chunk in chunks
        if (saved := tensors.get(chunk.name)) is not None
        and (dtype := dtype_name(chunk.tensor, chunk.name))
        and (tuple(chunk.global_shape) != saved.global_shape or (dtypes == "equal" and dtype != saved.dtype))
    ]
    if differences:
        raise CheckpointMismatch(f"{ref.uri} does not fit this run: {some(differences)}; resume with the same model")
    return absent


def _copies_into(chunk: Chunk, entry: TensorEntry) -> Iterator[_Copy]:
    """The saved blocks that overlap this destination. Together they cover it, because blocks tile the tensor."""
    place = Box(tuple(chunk.offsets), tuple(chunk.tensor.shape))
    whole = Box((0,) * len(entry.global_shape), entry.global_shape)
    assert place.volume == 0 or intersect(place, whole) == place, f"{chunk.name}: {place} lies outside {whole}"
    for block, wanted in entry.blocks.meeting(place):
        yield _Copy(block, TORCH_DTYPES[entry.dtype], wanted, chunk)


def _wanted(ref: Readable, copy: _Copy) -> Iterator[Wanted]:
    """The ranges of the block's file that hold what is wanted of it."""
    block, item_bytes = copy.block, copy.dtype.itemsize
    max_gap = MAX_GAP_UNITS * ref.manifest.shards[block.shard].unit_bytes // item_bytes
    for first, end, local in spans(block.shape, copy.wanted.relative_to(block.offsets), max_gap=max_gap):
        whole = end - first == local.volume
        yield Wanted(
            block.shard,
            block.begin + first * item_bytes,
            block.begin + end * item_bytes,
            memory=_memory(copy, local) if whole else None,
            take=partial(_copy_out, copy),
        )


def _memory(copy: _Copy, local: Box) -> memoryview | None:
    """The destination of a box of the block, if it has the saved dtype and is one piece of this process's memory."""
    if copy.chunk.tensor.device.type != "cpu" or copy.chunk.tensor.dtype != copy.dtype:
        return None
    place = _destination(copy, local)
    return place.view(-1).view(torch.uint8).numpy().data if place.is_contiguous() else None


def _destination(copy: _Copy, local: Box) -> torch.Tensor:
    """The part of the destination that a box of the block goes to."""
    place = Box(tuple(a + b for a, b in zip(copy.block.offsets, local.offsets, strict=True)), local.shape)
    return copy.chunk.tensor.detach()[place.relative_to(tuple(copy.chunk.offsets)).slices()]


def _copy_out(copy: _Copy, begin: int, data: memoryview) -> None:
    """Copy what `data` (bytes of the file from `begin`, all of this block) holds into its destination."""
    block = copy.block
    elements = torch.frombuffer(data, dtype=copy.dtype)
    first = (begin - block.begin) // copy.dtype.itemsize
    wanted_here = copy.wanted.relative_to(block.offsets)
    for element, local in boxes_of_flat_range(block.shape, first, first + len(elements)):
        wanted = intersect(local, wanted_here)
        if wanted is not None:
            piece = elements[element - first : element - first + local.volume].view(local.shape)
            _destination(copy, wanted).copy_(piece[wanted.relative_to(local.offsets).slices()])
