"""A shuffle that reads blocks of neighbouring rows, so that one request to S3 serves many of them.

The rows of a store lie in blocks of R, the last one shorter. In each epoch the blocks are shuffled and dealt to L
lanes, a round of L blocks at a time. Sample p of the epoch is the next row of lane p mod L, and the rows of a block
come in a shuffle of their own. So at any time at most L blocks are in use, neighbours in the text come L samples apart
or more, and each row comes once an epoch. What makes no whole round, fewer than L blocks and the short one, comes last,
as one shuffle of its rows; a store of fewer than L blocks is nothing else.

Everything is computed from (seed, epoch, p): see `permutation.py`.
"""

import numpy as np

from raynium.data.order.permutation import shuffled, shuffled_within


class BlockShuffle:
    """The order of one store's rows, for `Order`. R: block_rows. L: lanes."""

    def __init__(self, num_rows: int, *, seed: int, block_rows: int, lanes: int):
        assert num_rows >= 1 and block_rows >= 1 and lanes >= 1
        self._num_rows, self._seed = num_rows, seed
        self._block_rows, self._lanes = block_rows, lanes
        self._full_blocks = num_rows // block_rows
        # Positions of an epoch that lie in whole rounds.
        self._in_rounds = self._full_blocks // lanes * lanes * block_rows

    def rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, epoch) of this store's samples by their places among its samples, all int64 [n]."""
        epochs, positions = np.divmod(places, self._num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            rows[chosen] = self._rows_of(positions[chosen], epoch)
        return rows, epochs

    def lanes(self, places: np.ndarray) -> np.ndarray:
        """int64 [n], each in [0, L): samples of one lane read the same block until it is used up.

        Of what makes no whole round, each block has a lane.
        """
        epochs, positions = np.divmod(places, self._num_rows)
        lanes = positions % self._lanes
        left = positions >= self._in_rounds
        for epoch in np.unique(epochs[left]).tolist():
            chosen = left & (epochs == epoch)
            lanes[chosen] = self._left(positions[chosen], epoch) // self._block_rows
        return lanes

    def _rows_of(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        left = positions >= self._in_rounds
        turns, lanes = np.divmod(positions, self._lanes)
        rounds, offsets = np.divmod(turns, self._block_rows)
        numbers = rounds * self._lanes + lanes
        if left.any():
            # Whole blocks that are left come first among these, then the short one.
            numbers[left], offsets[left] = np.divmod(
                self._in_rounds + self._left(positions[left], epoch), self._block_rows
            )
        short = numbers == self._full_blocks
        rows = numbers * self._block_rows + offsets
        rows[~short] = self._row(numbers[~short], offsets[~short], epoch)
        return rows

    def _left(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Of positions behind the whole rounds: which of the rows that are left, int64 [n]."""
        length = self._num_rows - self._in_rounds
        return shuffled(positions - self._in_rounds, length=length, seed=self._seed, epoch=epoch)

    def _row(self, turns: np.ndarray, offsets: np.ndarray, epoch: int) -> np.ndarray:
        """Of the `turns`-th block of an epoch, the `offsets`-th row in that block's own order."""
        if not turns.size:
            return turns
        blocks = shuffled(turns, length=self._full_blocks, seed=self._seed, epoch=epoch)
        within = shuffled_within(offsets, blocks, length=self._block_rows, seed=self._seed, epoch=epoch)
        return blocks * self._block_rows + within
