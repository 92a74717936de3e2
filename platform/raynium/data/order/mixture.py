"""Which store a sample comes from: every beginning of the order holds each store by its weight, to within two samples.

Nothing is drawn. Stores are the leaves of a binary tree, and at each fork every sample goes left or right by a count:
of the first j samples that came to a fork, floor(j·p + f) go left, where p is the left side's share of the fork's
weight and f, between 0 and 1, its phase. That is exact in integers, and any sample can be asked for alone. Its cost:
a store's deviation is what its fork rounds, at most one half where f is, and its share of what every fork above it
rounds. In Huffman's tree the heavy stores stand near the root, and weights grow from fork to fork like Fibonacci's
numbers: ½·(1 + 1 + ½ + ⅓ + ⅕ + …) < 1.69 samples.

Where a stage begins, another tree takes over. The stores are then ahead of their weights or behind by fractions of a
sample, which must not add up over stages: each fork takes the phase that makes good most of what its two sides are
ahead of one another, on average over their stores. (The sums over them do not do: many light stores, each a little
ahead, would hold back a heavy one beside them by all of it.) The order before a stage does not depend on that stage.
"""

import heapq
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from raynium.config.schema import DataSection

# Numbers of a fork stay within 64 bits for so many samples at once, where the weights are usual ones.
SAMPLES_AT_ONCE = 4096
# Of a fork's phase.
PHASES = 1024


class Weighting(NamedTuple):
    """What a stage mixes. first_sample: of the stage. weights: of each store, not negative, not all 0."""

    first_sample: int
    weights: tuple[Fraction, ...]


@dataclass(frozen=True)
class _Fork:
    """Of the first j samples that come here, floor((j · step + start) / whole) go left."""

    left: "_Fork | int"
    right: "_Fork | int"
    step: int
    start: int
    whole: int

    def left_of(self, samples: int) -> int:
        return (samples * self.step + self.start) // self.whole

    def goes_left(self, before: int, number: int) -> np.ndarray:
        """bool [number]: of samples [before, before + number) of this fork."""
        _, rest = divmod(before * self.step + self.start, self.whole)
        # Python's integers where numpy's are too short: exact, and slower.
        fits = number * self.step + self.whole < 2**63
        counts = (np.arange(number + 1, dtype=np.int64 if fits else object) * self.step + rest) // self.whole
        return np.diff(counts).astype(bool)


class Mixture:
    """The stores of samples, which are counted from 0 over all stages."""

    def __init__(self, stages: Sequence[Weighting]):
        """stages: the first from sample 0, each next one from a later sample."""
        firsts = [stage.first_sample for stage in stages]
        assert firsts[0] == 0 and all(a < b for a, b in itertools.pairwise(firsts))
        self.num_stores = len(stages[0].weights)
        self._firsts, self._trees = firsts, []
        # Of each store: samples before the stage, and by how much that is more than its weights say.
        self._counts_before = [[0] * self.num_stores]
        ahead = [Fraction(0)] * self.num_stores
        for number, stage in enumerate(stages):
            assert len(stage.weights) == self.num_stores
            self._trees.append(_planted(stage.weights, ahead))
            if number + 1 < len(stages):
                length = firsts[number + 1] - firsts[number]
                counts = _leaf_counts(self._trees[-1], length, self.num_stores)
                total = sum(stage.weights)
                ahead = [
                    each + count - length * weight / total
                    for each, count, weight in zip(ahead, counts, stage.weights, strict=True)
                ]
                self._counts_before.append([a + b for a, b in zip(self._counts_before[-1], counts, strict=True)])

    def deal(self, first: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of samples [first, first + number): (store, place among the samples of that store), int64 [number] each."""
        stores, places = np.empty(number, np.int64), np.empty(number, np.int64)
        done = 0
        while done < number:
            stage = bisect_right(self._firsts, first + done) - 1
            end = self._firsts[stage + 1] if stage + 1 < len(self._firsts) else first + number
            count = min(number - done, end - first - done, SAMPLES_AT_ONCE)
            before = first + done - self._firsts[stage]
            for store, at, found in _dealt(self._trees[stage], before, np.arange(done, done + count)):
                place = self._counts_before[stage][store] + at
                stores[found], places[found] = store, np.arange(place, place + len(found))
            done += count
        return stores, places

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each store."""
        stage = max(0, bisect_right(self._firsts, samples) - 1)
        counts = _leaf_counts(self._trees[stage], samples - self._firsts[stage], self.num_stores)
        return [a + b for a, b in zip(self._counts_before[stage], counts, strict=True)]

    def samples_with(self, number: int, store: int, *, most: int) -> int:
        """The fewest samples that hold `number` of a store, of `most` samples, which hold as many."""
        return bisect_left(range(most), number, key=lambda samples: self.counts(samples)[store])


def mixture_of(data: DataSection, global_batch_size: int) -> Mixture:
    """Of a config. Weights are read as they are written: 0.1 is a tenth."""
    names = [store.name for store in data.stores]
    stages = {0: [store.weight for store in data.stores]}
    for stage in data.stages:
        stages[(stage.from_step - 1) * global_batch_size] = [stage.weights[name] for name in names]
    return Mixture([Weighting(first, tuple(Fraction(str(each)) for each in stages[first])) for first in sorted(stages)])


@dataclass(frozen=True)
class _Pair:
    """Two nodes of a tree whose forks have no phases yet. weight, stores: of all stores below."""

    left: "_Pair | _Leaf"
    right: "_Pair | _Leaf"
    weight: Fraction
    stores: tuple[int, ...]


@dataclass(frozen=True)
class _Leaf:
    weight: Fraction
    stores: tuple[int, ...]


def _planted(weights: Sequence[Fraction], ahead: Sequence[Fraction]) -> _Fork | int:
    """Huffman's tree over the stores that have a weight; ties are settled by their numbers."""
    ties = itertools.count()
    leaves = [_Leaf(weight, (store,)) for store, weight in enumerate(weights) if weight > 0]
    heap: list[tuple[Fraction, int, _Pair | _Leaf]] = [(leaf.weight, next(ties), leaf) for leaf in leaves]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, left), (_, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        pair = _Pair(left, right, left.weight + right.weight, left.stores + right.stores)
        heapq.heappush(heap, (pair.weight, next(ties), pair))
    return _phased(heap[0][2], ahead, Fraction(0))


def _phased(node: _Pair | _Leaf, ahead: Sequence[Fraction], rounded: Fraction) -> _Fork | int:
    """The forks of a tree. rounded: by how much those above begin ahead with what they send here."""
    if isinstance(node, _Leaf):
        return node.stores[0]

    def mean_ahead(stores: tuple[int, ...]) -> Fraction:
        return sum((ahead[store] for store in stores), Fraction(0)) / len(stores)

    half, share = Fraction(1, 2), node.left.weight / node.weight
    wanted_left = mean_ahead(node.left.stores) - share * rounded
    wanted_right = mean_ahead(node.right.stores) - (1 - share) * rounded
    # With a phase of 1 a sample would have gone left before one came.
    phase = Fraction(min(max(int((half - (wanted_left - wanted_right) / 2) * PHASES), 0), PHASES - 1), PHASES)
    return _Fork(
        _phased(node.left, ahead, share * rounded + half - phase),
        _phased(node.right, ahead, (1 - share) * rounded - half + phase),
        step=share.numerator * phase.denominator,
        start=phase.numerator * share.denominator,
        whole=share.denominator * phase.denominator,
    )


def _leaf_counts(tree: _Fork | int, samples: int, num_stores: int) -> list[int]:
    counts, waiting = [0] * num_stores, [(tree, samples)]
    while waiting:
        node, number = waiting.pop()
        if isinstance(node, int):
            counts[node] = number
        else:
            left = node.left_of(number)
            waiting += [(node.left, left), (node.right, number - left)]
    return counts


def _dealt(tree: _Fork | int, before: int, positions: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(store, samples of it before, positions of its samples) of each store that has some here."""
    waiting = [(tree, before, positions)]
    while waiting:
        node, before, positions = waiting.pop()
        if not len(positions):
            continue
        if isinstance(node, int):
            yield node, before, positions
            continue
        goes_left, left_before = node.goes_left(before, len(positions)), node.left_of(before)
        waiting.append((node.left, left_before, positions[goes_left]))
        waiting.append((node.right, before - left_before, positions[~goes_left]))


ONE_STORE = Mixture([Weighting(0, (Fraction(1),))])
