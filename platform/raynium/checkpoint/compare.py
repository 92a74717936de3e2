"""Whether two checkpoints hold the same tensors, bit for bit, in whatever layouts they were saved. Needs torch."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from raynium.checkpoint.format.batches import in_batches, in_file_order
from raynium.checkpoint.format.manifest import TensorEntry
from raynium.checkpoint.load import read_batch
from raynium.checkpoint.ref import CheckpointRef

# Of each of the two; the largest tensor if that is more.
BATCH_BYTES = 256 * 2**20
# The number of a layer, or of a rank: blocks.7.norm.weight, rng/rank-00003.
_INDEX = re.compile(r"(?<=[.-])[0-9]+(?=\.|$)")

Outcome = Literal["equal", "different", "only in the first", "only in the second"]
OUTCOMES: tuple[Outcome, ...] = ("equal", "different", "only in the first", "only in the second")


@dataclass(frozen=True)
class Difference:
    """What is not equal about one tensor. The outcome is never "equal".

    num_different: numbers with other bits; None where the two cannot be compared number by number.
    """

    name: str
    outcome: Outcome
    text: str
    num_different: int | None = None
    num_numbers: int = 0


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common: the names of all tensors of either, sorted, and the differences, too.

    Groups are what stands before a name's last slash: model, optimizer/exp_avg.
    """

    names: tuple[str, ...]
    differences: tuple[Difference, ...]

    def counts(self) -> dict[str, dict[Outcome, int]]:
        """Group → how many tensors came to each outcome."""
        outcomes: dict[str, Outcome] = {each.name: each.outcome for each in self.differences}
        found: dict[str, Counter[Outcome]] = defaultdict(Counter)
        for name in self.names:
            found[_group(name)][outcomes.get(name, "equal")] += 1
        return {group: {outcome: counter[outcome] for outcome in OUTCOMES} for group, counter in found.items()}

    def lines(self) -> list[str]:
        """The differences in words, one line for all layers (or ranks) of which the same is to be said."""
        total = Counter(_without_index(name) for name in self.names)
        folded: dict[tuple[str, str], list[Difference]] = defaultdict(list)
        for each in self.differences:
            kind = each.text if each.num_different is None else f"of {each.num_numbers}"
            folded[_without_index(each.name), kind].append(each)
        return [_line(pattern, found, total[pattern]) for (pattern, _), found in folded.items()]


def compare(first: CheckpointRef, second: CheckpointRef) -> Comparison:
    """Reads both. Raises CheckpointDamaged."""
    names = {entry.name for ref in (first, second) for entry in ref.manifest.tensors}
    found = sorted(differences(first, second), key=lambda each: each.name)
    return Comparison(tuple(sorted(names)), tuple(found))


def differences(first: CheckpointRef, second: CheckpointRef) -> Iterator[Difference]:
    """Every tensor that is not the same in both: missing, of another shape or dtype, or with other bytes.

    Names and shapes come first and cost nothing; then all that both have is read. Raises CheckpointDamaged.
    """
    left, right = ({entry.name: entry for entry in ref.manifest.tensors} for ref in (first, second))
    for name in sorted(left.keys() ^ right.keys()):
        outcome: Outcome = "only in the first" if name in left else "only in the second"
        yield Difference(name, outcome, text=f"is {outcome}")
    comparable: list[TensorEntry] = []
    for name in sorted(left.keys() & right.keys()):
        kinds = [f"{entry.dtype} {list(entry.global_shape)}" for entry in (left[name], right[name])]
        if kinds[0] != kinds[1]:
            yield Difference(name, "different", f"is {kinds[0]} in the first and {kinds[1]} in the second")
        else:
            comparable.append(left[name])
    for batch in in_batches(in_file_order(comparable), max_bytes=BATCH_BYTES):
        yield from _other_bytes(read_batch(first, batch), read_batch(second, [right[entry.name] for entry in batch]))


def _other_bytes(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[Difference]:
    return [
        _other_numbers(name, tensor, right[name])
        for name, tensor in left.items()
        if not torch.equal(_numbers(tensor), _numbers(right[name]))
    ]


def _other_numbers(name: str, first: torch.Tensor, second: torch.Tensor) -> Difference:
    count = int((_numbers(first) != _numbers(second)).any(dim=1).sum())
    return Difference(name, "different", _in_numbers([count], first.numel()), count, first.numel())


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [numbers, bytes of each]: compared as bits, a NaN equals itself and -0 does not equal 0."""
    return tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())


# ---- words --------------------------------------------------------------------------------------------------------


def _group(name: str) -> str:
    return name.rpartition("/")[0]


def _without_index(name: str) -> str:
    return _INDEX.sub("*", name, count=1)


def _line(pattern: str, found: list[Difference], total: int) -> str:
    """found: of `total` tensors whose names fit the pattern, those of which the same is to be said."""
    if total == 1:
        return f"{found[0].name} {found[0].text}"
    indices = [int(_INDEX.search(each.name)[0]) for each in found]  # pyright: ignore[reportOptionalSubscript]
    name = pattern.replace("*", f"[{_ranges(indices)}]", 1)
    text = found[0].text
    if found[0].num_different is not None:
        text = _in_numbers([each.num_different or 0 for each in found], found[0].num_numbers)
    return f"{name} {text} ({'all' if len(found) == total else f'{len(found)} of'} {total})"


def _in_numbers(counts: list[int], of: int) -> str:
    least, most = min(counts), max(counts)
    return f"differs in {least:,}{f' to {most:,}' if most > least else ''} of {of:,} numbers"


def _ranges(indices: Iterable[int]) -> str:
    """0, 1, 2, 5 → "0-2,5"."""
    runs = groupby(enumerate(sorted(indices)), key=lambda place: place[1] - place[0])
    spans = [[index for _, index in run] for _, run in runs]
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
