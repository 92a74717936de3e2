"""Which row of which store sample i is: a pure function of what the run was given and i.

A sample's store comes from the mixture; the m-th sample of a store is a row of it by that store's shuffle. Nothing is
drawn and nothing is remembered, so any sample can be asked for alone, at any world size.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from raynium.data.order.mixture import ONE_STORE, Mixture
from raynium.data.order.permutation import shuffled


class Samples(NamedTuple):
    """Where samples lie, in their order; each is int64 [n].

    stores: the store's number. rows: of that store. epochs: how often that store was gone through before. lanes: of
    that store's shuffle; samples of one lane lie near each other.
    """

    stores: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray
    lanes: np.ndarray


class Shuffle(Protocol):
    """The order of one store's rows. Each row comes once in every epoch of so many samples of that store as it has
    rows.
    """

    def rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, epoch) of a store's samples by their places among the samples of that store, all int64 [n]."""
        ...

    def lanes(self, places: np.ndarray) -> np.ndarray:
        """int64 [n]: rows of samples that have the same one lie near each other. All zero where that is of no use."""
        ...


class RowShuffle:
    """All rows anew in every epoch: `permutation`."""

    def __init__(self, num_rows: int, *, seed: int):
        self._num_rows, self._seed = num_rows, seed

    def rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, positions = np.divmod(places, self._num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = shuffled(positions[chosen], length=self._num_rows, seed=self._seed, epoch=int(epoch))
        return rows, epochs

    def lanes(self, places: np.ndarray) -> np.ndarray:
        return np.zeros_like(places)


class Order:
    """The samples of a run, counted from 0 over all steps."""

    def __init__(self, shuffles: Sequence[Shuffle], mixture: Mixture = ONE_STORE):
        """shuffles: of each store of the mixture, by its number."""
        assert len(shuffles) == mixture.num_stores
        self._shuffles, self._mixture = shuffles, mixture

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each store."""
        return self._mixture.counts(samples)

    def samples(self, first: int, number: int) -> Samples:
        """Samples [first, first + number)."""
        stores, places = self._mixture.deal(first, number)
        rows, epochs, lanes = np.empty_like(places), np.empty_like(places), np.empty_like(places)
        for store, shuffle in enumerate(self._shuffles):
            chosen = np.flatnonzero(stores == store)
            rows[chosen], epochs[chosen] = shuffle.rows(places[chosen])
            lanes[chosen] = shuffle.lanes(places[chosen])
        return Samples(stores, rows, epochs, lanes)


def seed_of_store(seed: int, number: int) -> int:
    """Of a store's shuffle, by its number in the mixture. The first has the run's: alone it keeps its order."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"raynium store {seed} {number}".encode(), digest_size=8).digest(), "little")
