"""Blocks of tensors in columns, and the rules that all must keep, checked for a whole manifest at once. No torch.

A manifest may have millions of blocks. An object for each would take gigabytes and a minute in every rank that loads,
so a tensor's blocks are columns of integers, and no check has a step of its own for each block.

Numbers are below 2^60, and so are the bytes of a block: sums and products of them fit int64.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from secrets import randbits
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raynium.checkpoint.format.boxes import Box, Ints, intersect

LIMIT = 2**60
# So many are checked at a time.
GROUP_BLOCKS = 2**16
# Of a shard's data; it divides every unit, so no element straddles two units.
ALIGNMENT_BYTES = 4096

# [blocks], or [] where all blocks of the tensor have the same number.
Column = NDArray[np.int64]

# Products of two remainders fit 64 bits.
_PRIME = np.uint64(2**31 - 1)


class Block(NamedTuple):
    """Where a part of a tensor lies: `shard` counts in the manifest's `shards`, `end` is excluded."""

    shard: int
    offsets: Ints
    shape: Ints
    begin: int
    end: int

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.shape)


@dataclass(frozen=True, eq=False)
class Blocks:
    """All blocks of one tensor: of each number a column [blocks], of places one for each dim."""

    item_bytes: int
    shards: Column
    offsets: tuple[Column, ...]
    shapes: tuple[Column, ...]
    begins: Column

    @classmethod
    def of(
        cls,
        item_bytes: int,
        *,
        shards: Column,
        offsets: Sequence[Column],
        shapes: Sequence[Column],
        begins: Column,
    ) -> "Blocks":
        """Columns [blocks] or []; `shards` is [blocks]. ValueError where one has another length."""
        if shards.ndim != 1 or not len(shards):
            raise ValueError("shards is not a list of one number or more, one for each block")

        def whole(column: Column) -> Column:
            if column.ndim and len(column) != len(shards):
                raise ValueError(f"a column has {len(column)} numbers for {len(shards)} blocks")
            # This takes no memory where it is one number.
            return np.broadcast_to(column, shards.shape)

        return cls(item_bytes, shards, tuple(map(whole, offsets)), tuple(map(whole, shapes)), whole(begins))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Block:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        shape = tuple(int(column[index]) for column in self.shapes)
        offsets = tuple(int(column[index]) for column in self.offsets)
        begin, end = int(self.begins[index]), int(self.begins[index])
        end += Box(offsets, shape).volume * self.item_bytes
        return Block(int(self.shards[index]), offsets, shape, begin, end)

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))

    def meeting(self, box: Box) -> Iterator[tuple[Block, Box]]:
        """The blocks that share elements with `box`, and what they share; a step in Python for these only."""
        hit = np.ones(len(self), dtype=bool)
        for offsets, lengths, start, length in zip(self.offsets, self.shapes, *box, strict=True):
            hit &= np.maximum(offsets, start) < np.minimum(offsets + lengths, start + length)
        for index in np.flatnonzero(hit).tolist():
            block = self[index]
            shared = intersect(box, block.box)
            assert shared is not None
            yield block, shared


def to_column(value: Any) -> Column:
    """A column from JSON: a list of integers from 0 to below 2^60, or one such integer, else ValueError; ours stays."""
    if isinstance(value, np.ndarray):
        return value
    numbers = value if type(value) is list else [value]
    # To isinstance and to numpy, bool is an int.
    if not set(map(type, numbers)) <= {int}:
        raise ValueError("not a valid integer, or list of integers")
    try:
        column = np.array(numbers, dtype=np.int64)
    except OverflowError:
        raise ValueError("an integer is not less than 2^60") from None
    if len(column) and (column.min() < 0 or column.max() >= LIMIT):
        raise ValueError("an integer is not greater than or equal to 0 and less than 2^60")
    return column if type(value) is list else column.reshape(())


def shortest(column: Column) -> Column:
    """[] if all its numbers are the same: then the manifest has it once."""
    return column[:1].reshape(()) if (column == column[0]).all() else column


# ---- the rules ----------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """What the rules are about."""

    name: str
    global_shape: Ints
    blocks: Blocks


class _Group:
    """Tensors of one number of dims, their blocks one after the other.

    first: of each tensor its first block. rows, indices: of each block its tensor, in this group and in the manifest.
    """

    def __init__(self, tensors: Sequence[Tensor], *, indices: Sequence[int]):
        counts = np.array([len(tensor.blocks) for tensor in tensors])
        self.tensors = tensors
        self.first = np.cumsum(counts) - counts
        self.rows = np.repeat(np.arange(len(tensors)), counts)
        self.indices = np.repeat(np.array(indices), counts)
        self.num_dims = len(tensors[0].global_shape)

    @cached_property
    def shards(self) -> Column:
        return np.concatenate([tensor.blocks.shards for tensor in self.tensors])

    @cached_property
    def begins(self) -> Column:
        return np.concatenate([tensor.blocks.begins for tensor in self.tensors])

    def offsets(self, dim: int) -> Column:
        return np.concatenate([tensor.blocks.offsets[dim] for tensor in self.tensors])

    def lengths(self, dim: int) -> Column:
        return np.concatenate([tensor.blocks.shapes[dim] for tensor in self.tensors])

    def sizes(self, dim: int) -> Column:
        """Of each tensor, along one dim."""
        return np.array([tensor.global_shape[dim] for tensor in self.tensors], dtype=np.int64)

    @cached_property
    def item_bytes(self) -> Column:
        """Of each block."""
        return np.array([tensor.blocks.item_bytes for tensor in self.tensors])[self.rows]

    @cached_property
    def num_bytes(self) -> Column:
        """Of each block. ValueError where that is more than 2^60."""
        num_bytes = self.item_bytes.copy()
        for dim in range(self.num_dims):
            lengths = self.lengths(dim)
            too_large = lengths > LIMIT // np.maximum(num_bytes, 1)
            self.refuse_if(too_large, lambda _, block: f"a block of shape {block.shape} is too large")
            num_bytes *= lengths
        return num_bytes

    def refuse_if(self, wrong: NDArray[np.bool_], text: Callable[[Tensor, Block], str]) -> None:
        """ValueError about the first block for which `wrong` [blocks] is set."""
        if wrong.any():
            at = int(np.argmax(wrong))
            tensor = self.tensors[self.rows[at]]
            raise ValueError(f"{tensor.name}: {text(tensor, tensor.blocks[at - int(self.first[self.rows[at]])])}")


def _groups(tensors: Sequence[Tensor]) -> Iterator[_Group]:
    """Together all of them, about GROUP_BLOCKS blocks in a group: what a check takes is bounded."""
    by_dims: dict[int, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_dims[len(tensor.global_shape)].append(index)
    for of_dims in by_dims.values():
        indices: list[int] = []
        count = 0
        for index in of_dims:
            indices.append(index)
            count += len(tensors[index].blocks)
            if count >= GROUP_BLOCKS or index == of_dims[-1]:
                yield _Group([tensors[index] for index in indices], indices=indices)
                indices, count = [], 0


@dataclass(frozen=True, eq=False)
class Ranges:
    """The bytes of all blocks that have any, in the order of files and places [blocks]."""

    tensors: Column
    shards: Column
    begins: Column
    ends: Column

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Ranges":
        return cls.joined(map(cls.of_group, _groups(tensors)))

    @classmethod
    def of_group(cls, group: _Group) -> "Ranges":
        """In the order of its tensors."""
        return cls(group.indices, group.shards, group.begins, group.begins + group.num_bytes)

    @classmethod
    def joined(cls, parts: Iterable["Ranges"]) -> "Ranges":
        each = [(part.tensors, part.shards, part.begins, part.ends) for part in parts]
        tensors, shards, begins, ends = (np.concatenate(columns) for columns in zip(*each, strict=True))
        order = np.lexsort((begins, shards))
        order = order[ends[order] > begins[order]]
        return cls(tensors[order], shards[order], begins[order], ends[order])

    def tensors_in(self, shard: int, begin: int, end: int) -> list[int]:
        """Those that have bytes in this range of a data file; indices, ascending."""
        low, high = np.searchsorted(self.shards, (shard, shard + 1))
        first = low + np.searchsorted(self.ends[low:high], begin, side="right")
        last = low + np.searchsorted(self.begins[low:high], end)
        return np.unique(self.tensors[first:last]).tolist()


def check_blocks(
    tensors: Sequence[Tensor], *, files: Sequence[tuple[str, int]], first_byte: int = ALIGNMENT_BYTES
) -> None:
    """Every block lies in its file, at a place for its type, no two share a byte, and each tensor is covered once.

    files: key and bytes of each data file. first_byte: before which none may begin. ValueError says which block of
    which tensor does not. n·log n for n blocks.
    """
    sizes = np.array([num_bytes for _, num_bytes in files], dtype=np.int64)
    parts: list[Ranges] = []
    for group in _groups(tensors):
        group.refuse_if(group.shards >= len(sizes), lambda _, block: f"shard {block.shard} of {len(sizes)}")
        misplaced = (group.begins < first_byte) | (group.begins % group.item_bytes != 0)
        group.refuse_if(misplaced, lambda _, block: f"byte {block.begin} is no place for its elements")
        outside = group.begins + group.num_bytes > sizes[group.shards]
        group.refuse_if(outside, lambda _, block: f"bytes {block.begin}-{block.end} lie outside its shard")
        _check_tiling(group)
        parts.append(Ranges.of_group(group))
    ranges = Ranges.joined(parts)
    shared = (ranges.shards[1:] == ranges.shards[:-1]) & (ranges.begins[1:] < ranges.ends[:-1])
    if shared.any():
        at = int(np.argmax(shared))
        first, second = (tensors[index].name for index in ranges.tensors[at : at + 2])
        raise ValueError(f"{first} and {second} share bytes of {files[ranges.shards[at]][0]}")


def _check_tiling(group: _Group) -> None:
    """ValueError for the first tensor that its blocks do not cover exactly once.

    A block may be empty only where the whole tensor is; then any will do.

    That no block lies outside is checked one by one. Then blocks cover a tensor exactly once if their volumes add up
    to its volume, whatever lengths the intervals between cuts are given. They are given random ones, twice, in the
    field of integers modulo a prime. If an element is covered twice or not at all, that sum is a polynomial in them
    which is not zero, of a degree of at most the number of dims: it happens to vanish with a probability of
    (dims / 2^31)^2, about 10^-18 for a matrix. It needs no pairs of blocks, whatever the layout.
    """
    full = np.ones(len(group.tensors), dtype=bool)
    for dim in range(group.num_dims):
        full &= group.sizes(dim) > 0
    group.refuse_if(full[group.rows] & (group.num_bytes == 0), lambda *_: "a block is empty")
    weights = [np.ones(len(group.rows), dtype=np.uint64) for _ in range(2)]
    wholes = [np.ones(len(group.tensors), dtype=np.uint64) for _ in range(2)]
    for dim in range(group.num_dims):
        starts = group.offsets(dim)
        ends = starts + group.lengths(dim)
        sizes = group.sizes(dim)
        group.refuse_if(
            ends > sizes[group.rows],
            lambda tensor, block: f"block {_text(block)} lies outside the shape {tensor.global_shape}",
        )
        key = randbits(64)
        for total, low, high in ((weights, starts, ends), (wholes, np.zeros_like(sizes), sizes)):
            for product, first, last in zip(total, _random(low, key), _random(high, key), strict=True):
                product *= last + _PRIME - first
                product %= _PRIME
    wrong = np.zeros(len(group.tensors), dtype=bool)
    for weight, whole in zip(weights, wholes, strict=True):
        wrong |= np.add.reduceat(weight, group.first) % _PRIME != whole
    if (wrong & full).any():
        tensor = group.tensors[int(np.argmax(wrong & full))]
        raise ValueError(f"{tensor.name}: {_tiling_problem(tensor)}")


def _random(places: Column, key: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Two numbers below _PRIME for each place, the same for the same place and key (the mixing of splitmix64)."""
    mixed = places.astype(np.uint64) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed % _PRIME, (mixed >> np.uint64(32)) % _PRIME


def _tiling_problem(tensor: Tensor) -> str:
    """How its blocks, which all lie inside, fail to cover it. Names two that overlap if neighbours do."""
    blocks = tensor.blocks
    order = np.lexsort(blocks.offsets[::-1]).tolist() if blocks.offsets else range(len(blocks))
    previous: Block | None = None
    covered = 0
    for index in order:
        block = blocks[index]
        covered += block.box.volume
        if previous is not None and intersect(previous.box, block.box):
            return f"blocks {_text(previous)} and {_text(block)} overlap"
        previous = block
    total = Box((), tensor.global_shape).volume
    return f"blocks cover {covered:,} of {total:,} elements" if covered < total else "blocks overlap"


def _text(block: Block) -> str:
    return f"{block.offsets} + {block.shape}"
