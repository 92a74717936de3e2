"""Whether two checkpoints hold the same tensors, bit for bit, in whatever layouts they were saved. Needs torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from raynium.checkpoint.batches import in_batches, in_file_order
from raynium.checkpoint.catalog import CheckpointRef
from raynium.checkpoint.load import read_batch
from raynium.checkpoint.manifest import TensorEntry

BATCH_BYTES = 256 * 2**20  # of each of the two; the largest tensor if that is more


@dataclass(frozen=True)
class Difference:
    """What is not equal about one tensor."""

    name: str
    text: str


def differences(first: CheckpointRef, second: CheckpointRef) -> Iterator[Difference]:
    """Every tensor that is not the same in both: missing, of another shape or dtype, or with other bytes.

    Names and shapes come first and cost nothing; then all that both have is read. Raises CheckpointDamaged.
    """
    left, right = ({entry.name: entry for entry in ref.manifest.tensors} for ref in (first, second))
    for name in sorted(left.keys() ^ right.keys()):
        yield Difference(name, "is only in the first" if name in left else "is only in the second")
    comparable: list[TensorEntry] = []
    for name in sorted(left.keys() & right.keys()):
        kinds = [f"{entry.dtype} {list(entry.global_shape)}" for entry in (left[name], right[name])]
        if kinds[0] != kinds[1]:
            yield Difference(name, f"is {kinds[0]} in the first and {kinds[1]} in the second")
        else:
            comparable.append(left[name])
    for batch in in_batches(in_file_order(comparable), max_bytes=BATCH_BYTES):
        yield from _other_bytes(read_batch(first, batch), read_batch(second, [right[entry.name] for entry in batch]))


def _other_bytes(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[Difference]:
    return [
        Difference(name, _how(tensor, right[name]))
        for name, tensor in left.items()
        if not torch.equal(_numbers(tensor), _numbers(right[name]))
    ]


def _how(first: torch.Tensor, second: torch.Tensor) -> str:
    count = int((_numbers(first) != _numbers(second)).any(dim=1).sum())
    return f"differs in {count:,} of {first.numel():,} numbers"


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [numbers, bytes of each]: compared as bits, a NaN equals itself and -0 does not equal 0."""
    return tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())
