"""How long documents are: counts by length that add up over the parts of a source, whatever its size."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from raynium.data.manifest import Lengths

# Lengths below this are counted one by one, longer ones in as many classes for each doubling.
EXACT = 64


class LengthCounts:
    """Documents by their number of tokens."""

    def __init__(self, counts: Iterable[tuple[int, int]] = ()):
        """counts: as `pairs` gives them."""
        self._counts = Counter(dict(counts))

    def add(self, num_tokens: int) -> None:
        self._counts[_class_of(num_tokens)] += 1

    def update(self, other: "LengthCounts") -> None:
        self._counts.update(other._counts)

    def pairs(self) -> list[tuple[int, int]]:
        """The largest length of each class that has documents, and how many it has; the shortest first."""
        return sorted(self._counts.items())

    def quantiles(self) -> Lengths:
        """Of at least one document."""
        pairs, total = self.pairs(), self._counts.total()
        ends = list(accumulate(number for _, number in pairs))

        def quantile(fraction: float) -> int:
            place = bisect_left(ends, fraction * total)
            return pairs[place][0]

        return Lengths(
            least=pairs[0][0],
            p10=quantile(0.1),
            p50=quantile(0.5),
            p90=quantile(0.9),
            p99=quantile(0.99),
            most=pairs[-1][0],
        )


def _class_of(num_tokens: int) -> int:
    """The largest length that is counted together with this one."""
    shift = max(0, num_tokens.bit_length() - EXACT.bit_length())
    return ((num_tokens >> shift) + 1 << shift) - 1
