"""From a checkpoint of any layout into this rank's blocks, verified on the way. Needs torch.

The unit of reading is a part (64 MiB): each part that holds needed bytes is read once per rank, its CRC64NVME is
checked, and what is needed is copied out of it. Nothing is unpickled; shapes and places come from the manifest, never
from the data.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from raynium.checkpoint.boxes import Box, boxes_of_flat_range, intersect
from raynium.checkpoint.catalog import CheckpointRef
from raynium.checkpoint.checksum import PART_BYTES, checksum_units, num_units, to_text
from raynium.checkpoint.image import TORCH_DTYPES, dtype_name
from raynium.checkpoint.manifest import Block, FileEntry, TensorEntry
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.store import KeyMissing
from raynium.errors import CheckpointDamaged, CheckpointMismatch

logger = logging.getLogger(__name__)

READERS = 4  # parts read ahead at a time: hides S3's latency; each holds one part in memory
_OPTIONAL_PREFIXES = ("rng/",)  # another layout has other generators
_OPTIONAL_PREFIXES_WITH_WEIGHTS_ONLY = ("rng/", "optimizer/")  # the optimizer then keeps the moments it was built with
_NAMED = 5  # tensors named in a message, of however many


@dataclass(frozen=True)
class Loaded:
    """What came with the tensors."""

    state: Mapping[str, Any]  # as given to `commit_checkpoint`
    absent: tuple[str, ...]  # optional names that were asked for and are not in the checkpoint
    num_bytes_read: int


@dataclass(frozen=True)
class _Copy:
    """A saved block of which something goes into one destination."""

    block: Block
    dtype: torch.dtype
    wanted: Box  # global coordinates
    chunk: Chunk


def load_checkpoint(ref: CheckpointRef, chunks: Sequence[Chunk]) -> Loaded:
    """Fill every chunk's tensor in place. Every rank calls it with its own chunks; ranks do not talk.

    CheckpointMismatch (before anything is read) if a tensor is missing or has another global shape or dtype, except
    that `rng/…` may be missing, and `optimizer/…` where the manifest says weights only: those tensors stay as they
    are. CheckpointDamaged if an object is missing, cut, or changed; tensors are then partly filled.
    """
    absent = _check_match(ref, chunks)
    tensors = {tensor.name: tensor for tensor in ref.manifest.tensors}
    copies: dict[int, list[_Copy]] = defaultdict(list)  # by shard
    for chunk in chunks:
        if chunk.name not in absent:
            for copy in _copies_into(chunk, tensors[chunk.name]):
                copies[copy.block.shard].append(copy)
    _check_sizes(ref, copies)
    num_bytes_read = 0
    with torch.no_grad():
        for shard, part, data in _verified_parts(ref, copies):
            num_bytes_read += len(data)
            begin = part * _part_bytes(ref.manifest.shards[shard])
            for copy in copies[shard]:
                _copy_out(copy, data, begin)
    return Loaded(dict(ref.manifest.state), tuple(sorted(absent)), num_bytes_read)


def read_tensors(ref: CheckpointRef, prefix: str = "model/") -> dict[str, torch.Tensor]:
    """Whole tensors whose names begin with `prefix`, on the CPU, by full name. For one process: sampling."""
    entries = [entry for entry in ref.manifest.tensors if entry.name.startswith(prefix)]
    if not entries:
        raise CheckpointMismatch(f"{ref.uri} holds no tensor named {prefix}…: it has {_some(_names(ref))}")
    return read_batch(ref, entries)


def read_batch(ref: CheckpointRef, entries: Sequence[TensorEntry]) -> dict[str, torch.Tensor]:
    """These tensors, whole, verified, on the CPU, by full name and in this order. Raises as `load_checkpoint`."""
    chunks = [
        Chunk(
            name=entry.name,
            global_shape=entry.global_shape,
            offsets=(0,) * len(entry.global_shape),
            tensor=torch.empty(entry.global_shape, dtype=TORCH_DTYPES[entry.dtype]),
            saved_here=False,
        )
        for entry in entries
    ]
    load_checkpoint(ref, chunks)
    return {chunk.name: chunk.tensor for chunk in chunks}


# ---- what goes where ----------------------------------------------------------------------------------------------


def _check_match(ref: CheckpointRef, chunks: Sequence[Chunk]) -> set[str]:
    """Names of optional tensors that the checkpoint lacks. CheckpointMismatch for anything else that does not fit."""
    tensors = {tensor.name: tensor for tensor in ref.manifest.tensors}
    missing = sorted({chunk.name for chunk in chunks} - tensors.keys())
    optional = _OPTIONAL_PREFIXES_WITH_WEIGHTS_ONLY if ref.manifest.weights_only else _OPTIONAL_PREFIXES
    absent = {name for name in missing if name.startswith(optional)}
    if required := [name for name in missing if name not in absent]:
        unasked = sorted(tensors.keys() - {chunk.name for chunk in chunks})
        raise CheckpointMismatch(
            f"{ref.uri} lacks {_some(required)}, which this run needs; it holds {_some(unasked)}, which this rank does "
            "not ask for: resume with the model and optimizer that saved it"
        )
    differences = [
        f"{chunk.name} is {tensors[chunk.name].dtype} {tensors[chunk.name].global_shape} in the checkpoint and "
        f"{dtype_name(chunk.tensor, chunk.name)} {tuple(chunk.global_shape)} in this run"
        for chunk in chunks
        if chunk.name not in absent
        and (tensors[chunk.name].dtype, tensors[chunk.name].global_shape)
        != (dtype_name(chunk.tensor, chunk.name), tuple(chunk.global_shape))
    ]
    if differences:
        raise CheckpointMismatch(f"{ref.uri} does not fit this run: {_some(differences)}; resume with the same model")
    return absent


def _copies_into(chunk: Chunk, entry: TensorEntry) -> Iterator[_Copy]:
    """The saved blocks that overlap this destination. Together they cover it, because blocks tile the tensor."""
    place = Box(tuple(chunk.offsets), tuple(chunk.tensor.shape))
    whole = Box((0,) * len(entry.global_shape), entry.global_shape)
    assert place.volume == 0 or intersect(place, whole) == place, f"{chunk.name}: {place} lies outside {whole}"
    for block in entry.blocks:
        wanted = intersect(place, block.box)
        if wanted is not None and wanted.volume:
            yield _Copy(block, chunk.tensor.dtype, wanted, chunk)


def _copy_out(copy: _Copy, data: torch.Tensor, data_begin: int) -> None:
    """Copy what `data` (bytes of the shard from `data_begin`) holds of this block into its destination."""
    block = copy.block
    begin, end = max(block.begin, data_begin), min(block.end, data_begin + len(data))
    if begin >= end:
        return
    elements = data[begin - data_begin : end - data_begin].view(copy.dtype)
    item_bytes = copy.dtype.itemsize
    first = (begin - block.begin) // item_bytes
    for element, local in boxes_of_flat_range(block.shape, first, (end - block.begin) // item_bytes):
        here = Box(tuple(a + b for a, b in zip(block.offsets, local.offsets, strict=True)), local.shape)
        wanted = intersect(here, copy.wanted)
        if wanted is not None:
            piece = elements[element - first : element - first + here.volume].view(here.shape)
            source = piece[wanted.relative_to(here.offsets).slices()]
            copy.chunk.tensor[wanted.relative_to(tuple(copy.chunk.offsets)).slices()].copy_(source)


# ---- reading ------------------------------------------------------------------------------------------------------


def _check_sizes(ref: CheckpointRef, copies: Mapping[int, Sequence[_Copy]]) -> None:
    """A missing or cut object is found before memory is spent on it."""
    for index in sorted(copies):
        where, expected = ref.store.uri(ref.shard_key(index)), ref.manifest.shards[index].size
        try:
            size = ref.store.size(ref.shard_key(index))
        except KeyMissing as error:
            raise CheckpointDamaged(f"{where} is missing") from error
        if size != expected:
            raise CheckpointDamaged(f"{where} has {size:,} bytes instead of {expected:,}")


def _needed_parts(ref: CheckpointRef, copies: Mapping[int, Sequence[_Copy]]) -> list[tuple[int, int]]:
    """(shard, part) pairs that hold a byte we want, in file order."""
    needed: set[tuple[int, int]] = set()
    for shard, of_shard in copies.items():
        part_bytes = _part_bytes(ref.manifest.shards[shard])
        for copy in of_shard:
            begin, end = _wanted_bytes(copy)
            needed.update((shard, part) for part in range(begin // part_bytes, (end - 1) // part_bytes + 1))
    return sorted(needed)


def _wanted_bytes(copy: _Copy) -> tuple[int, int]:
    """The range of the file from the first to the last wanted element of the block."""
    local = copy.wanted.relative_to(copy.block.offsets)
    first = last = 0
    for size, start, length in zip(copy.block.shape, *local, strict=True):
        first = first * size + start
        last = last * size + start + length - 1
    item_bytes = copy.dtype.itemsize
    return copy.block.begin + first * item_bytes, copy.block.begin + (last + 1) * item_bytes


def _verified_parts(
    ref: CheckpointRef, copies: Mapping[int, Sequence[_Copy]]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(shard, part, its bytes), each needed part once, in file order; READERS of them are read ahead.

    The bytes are valid until the next one is asked for: their memory is used again.
    """
    waiting = deque(_needed_parts(ref, copies))
    if not waiting:
        return
    largest = max(min(_part_bytes(ref.manifest.shards[i]), ref.manifest.shards[i].size) for i, _ in waiting)
    free: SimpleQueue[torch.Tensor] = SimpleQueue()
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-read") as pool:
        running: deque[tuple[int, int, torch.Tensor, Future[torch.Tensor]]] = deque()
        try:
            for _ in range(min(READERS, len(waiting))):
                free.put(torch.empty(largest, dtype=torch.uint8))
            while waiting or running:
                while waiting and not free.empty():
                    shard, part = waiting.popleft()
                    buffer = free.get()
                    running.append((shard, part, buffer, pool.submit(_read_part, ref, shard, part, buffer)))
                shard, part, buffer, read = running.popleft()
                yield shard, part, read.result()
                free.put(buffer)
        finally:
            for *_, read in running:
                read.cancel()


def _part_bytes(entry: FileEntry) -> int:
    return max(1, PART_BYTES // entry.unit_bytes) * entry.unit_bytes


def _read_part(ref: CheckpointRef, shard: int, part: int, buffer: torch.Tensor) -> torch.Tensor:
    """Read one part into `buffer` and check it; the filled front of `buffer`."""
    entry = ref.manifest.shards[shard]
    begin = part * _part_bytes(entry)
    length = min(_part_bytes(entry), entry.size - begin)
    view = buffer.numpy().data[:length]
    ref.store.read_into(ref.shard_key(shard), begin, view)
    first = begin // entry.unit_bytes
    expected = entry.checksums.unit_crcs[first : first + num_units(length, entry.unit_bytes)]
    for unit, (found, wanted) in enumerate(
        zip(checksum_units(view, entry.unit_bytes).unit_crcs, expected, strict=True)
    ):
        if found != wanted:
            where = begin + unit * entry.unit_bytes
            raise CheckpointDamaged(
                f"{ref.store.uri(ref.shard_key(shard))} is damaged in bytes {where:,} to "
                f"{min(where + entry.unit_bytes, entry.size):,}: CRC64NVME {to_text(found)} instead of {to_text(wanted)}"
            )
    return buffer[:length]


def _names(ref: CheckpointRef) -> list[str]:
    return [tensor.name for tensor in ref.manifest.tensors]


def _some(items: Sequence[str]) -> str:
    """The first few of `items` and how many there are."""
    listed = ", ".join(items[:_NAMED]) or "nothing"
    return f"{listed} and {len(items) - _NAMED} more" if len(items) > _NAMED else listed
