"""Whole tensors of a checkpoint, some at a time, so that memory stays bounded however large it is. Needs torch."""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from raynium.checkpoint.format.image import TORCH_DTYPES
from raynium.checkpoint.format.manifest import TensorEntry


def in_file_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """As they lie in the first data file that holds them; ranks lay theirs out alike.

    Neighbours are read by one request and share the unit between them: batches in this order read each byte about
    once, in long requests; in the model's order every small tensor would cost a request and its own whole units.
    """
    return sorted(entries, key=lambda entry: (entry.blocks[0].shard, entry.blocks[0].begin))


class Sized(Protocol):
    """A tensor of which only this is known."""

    @property
    def dtype(self) -> str: ...

    @property
    def global_shape(self) -> tuple[int, ...]: ...


Entry = TypeVar("Entry", bound=Sized)


def in_batches(entries: Iterable[Entry], *, max_bytes: int, dtype: torch.dtype | None = None) -> Iterator[list[Entry]]:
    """Cut a sequence into runs that take at most `max_bytes` in `dtype` (None: their own); a larger tensor is alone."""
    batch: list[Entry] = []
    batch_bytes = 0
    for entry in entries:
        num_bytes = math.prod(entry.global_shape) * (dtype or TORCH_DTYPES[entry.dtype]).itemsize
        if batch and batch_bytes + num_bytes > max_bytes:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(entry)
        batch_bytes += num_bytes
    if batch:
        yield batch


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes in C order; without a copy where they lie so already."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
