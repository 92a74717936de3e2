"""Boxes: axis-aligned blocks of an N-dimensional array, as (offsets, shape), and how they meet. No torch.

A tensor of no dims has one element, and one box: ((), ()). Flat ranges count elements in C order.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

Ints = tuple[int, ...]


class Box(NamedTuple):
    """Where a block begins and how far it reaches, one number per dim."""

    offsets: Ints
    shape: Ints

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        """The block as an index into the whole array."""
        return tuple(slice(start, start + length) for start, length in zip(self.offsets, self.shape, strict=True))

    def relative_to(self, origin: Ints) -> "Box":
        """The same block, counted from `origin`."""
        return Box(tuple(start - zero for start, zero in zip(self.offsets, origin, strict=True)), self.shape)


def intersect(first: Box, second: Box) -> Box | None:
    """What two boxes share; None if nothing."""
    starts, lengths = [], []
    for start, length, other_start, other_length in zip(*first, *second, strict=True):
        low, high = max(start, other_start), min(start + length, other_start + other_length)
        if low >= high:
            return None
        starts.append(low)
        lengths.append(high - low)
    return Box(tuple(starts), tuple(lengths))


def boxes_of_flat_range(shape: Ints, start: int, end: int) -> Iterator[tuple[int, Box]]:
    """Cut elements [start, end) of an array of `shape` into boxes that are each contiguous: (first element, box).

    At most 2 × dims + 1 of them: the rest of a begun row, whole rows, the begin of a last row, at each depth.
    """
    if start >= end:
        return
    if not shape:
        yield start, Box((), ())
        return
    # A row has so many elements; rows [first, last) are whole. If first > last both ends lie inside one row.
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        yield from _in_row(shape, last, start, end)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield first * row, Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if last * row < end:
        yield from _in_row(shape, last, last * row, end)


def spans(shape: Ints, box: Box, *, max_gap: int) -> Iterator[tuple[int, int, Box]]:
    """Cut `box`, of an array of `shape`, into boxes that each lie close together: (first element, end, box).

    Between two rows of such a box lie at most `max_gap` elements that are not its own; [first, end) counts them too.
    A box of no elements gives none.
    """
    if box.volume == 0:
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # Dims from `kept` on stay together; from their first element to the last there are `extent`.
    extent = 1
    kept = len(shape)
    while kept and (box.shape[kept - 1] == 1 or strides[kept - 1] - extent <= max_gap):
        kept -= 1
        extent += (box.shape[kept] - 1) * strides[kept]
    starts = [range(start, start + length) for start, length in zip(*box, strict=True)][:kept]
    for index in itertools.product(*starts):
        place = Box((*index, *box.offsets[kept:]), (*(1,) * kept, *box.shape[kept:]))
        first = sum(offset * stride for offset, stride in zip(place.offsets, strides, strict=True))
        yield first, first + extent, place


def _in_row(shape: Ints, index: int, start: int, end: int) -> Iterator[tuple[int, Box]]:
    """`boxes_of_flat_range` for a range inside one index of the first dim."""
    base = index * math.prod(shape[1:])
    for element, box in boxes_of_flat_range(shape[1:], start - base, end - base):
        yield base + element, Box((index, *box.offsets), (1, *box.shape))
