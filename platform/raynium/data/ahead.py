"""Streaming: threads fetch the blocks of rows that the coming steps need; the order is known, so nothing is guessed.

A block is held from the first step that reads it until its lane has gone on to the next one; its range of the cache may
then go. How far ahead threads fetch is bounded by this rank's share of the cache.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raynium.data.order import Samples
from raynium.data.rows import Rows
from raynium.data.streamed import StreamedStore

# Requests in flight: they hide S3's latency, and a block is late only if all of them are.
FETCHERS = 8
# The order is looked through for this many more steps at each step, and never further ahead than that.
STEPS_AT_ONCE = 16
MOST_STEPS_AHEAD = 8192
# A lane that this rank has not read from for so long belongs to another by now.
STALE_STEPS = 1024


class StreamedRows:
    """Rows whose tokens are streamed in blocks of R neighbouring rows. Those of a block are read while it is held."""

    def __init__(self, rows: Rows, store: StreamedStore, *, block_rows: int, row_bytes: int):
        """rows: of the store's training stream. row_bytes: of a row's tokens, as they are stored."""
        self.block_rows, self.traffic, self.used_bytes = block_rows, store.traffic, 0
        self.rows_per_sample = rows.rows_per_sample
        self._rows, self._tokens, self._row_bytes = rows, store.train_stream(), row_bytes

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        self.used_bytes += len(rows) * self._row_bytes
        return self._rows.read(rows)

    def span(self, first: int, end: int) -> tuple[int, int]:
        return self._rows.span(first, end)

    def num_bytes(self, block: int) -> int:
        """That the block takes up in the cache."""
        return self._tokens.num_bytes(*self._span(block))

    def fetch(self, block: int) -> None:
        """Have the block in the cache, if there is room: see `StreamedTokens`. Any thread may call it."""
        self._tokens.fetch(*self._span(block))

    def hold(self, block: int) -> None:
        self._tokens.hold(*self._span(block))

    def let_go(self, block: int) -> None:
        self._tokens.let_go(*self._span(block))

    def _span(self, block: int) -> tuple[int, int]:
        first = block * self.block_rows
        return self._rows.span(first, min(first + self.block_rows, len(self._rows)))


@dataclass
class _Block:
    lane: int
    num_bytes: int
    fetched: "Future[None]"
    last_step: int
    is_held: bool = False
    # The lane has a later one, as far as the order was looked through.
    is_last: bool = True


class Ahead(NamedTuple):
    """How far a rank looks: to the last step, and to so many bytes of blocks that it holds or has fetched."""

    total_steps: int
    max_bytes: int


class FetchAhead:
    """Of one rank. Not thread-safe; `close` ends its threads."""

    def __init__(self, rows: Sequence[Rows], samples: Callable[[int], Samples], ahead: Ahead):
        """rows: of each store, streamed or not. samples: this rank's of a step."""
        self._rows = {number: each for number, each in enumerate(rows) if isinstance(each, StreamedRows)}
        self._samples, self._total_steps, self._max_bytes = samples, *ahead
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="data-fetch")
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._of_lanes: dict[tuple[int, int], tuple[int, int]] = {}
        self._of_steps: dict[int, list[tuple[int, int]]] = {}
        self._num_bytes = 0
        self._wait_seconds = 0.0
        self._looked_through = 0

    def hold(self, step: int) -> None:
        """All rows of this step can be read once this returns. Steps are cheap in order, and may come in any.

        Raises what fetching a block raised, DataError or StoreError: it names the store, the file and the bytes.
        """
        if not self._rows:
            return
        if step not in self._of_steps:
            for key in list(self._blocks):
                self._let_go(key)
            self._of_lanes.clear()
            self._of_steps.clear()
            self._looked_through = step - 1
        until = min(self._total_steps, step + MOST_STEPS_AHEAD, self._looked_through + STEPS_AT_ONCE)
        while self._looked_through < max(step, until) and self._look_at(
            self._looked_through + 1, must=self._looked_through < step
        ):
            self._looked_through += 1
        for key in [key for key, block in self._blocks.items() if self._is_over(block, step)]:
            self._let_go(key)
        for key in self._of_steps.pop(step):
            block = self._blocks[key]
            if not block.is_held:
                began = time.perf_counter()
                block.fetched.result()
                self._rows[key[0]].hold(key[1])
                block.is_held = True
                self._wait_seconds += time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """Of this rank, since it started; none where nothing is streamed."""
        if not self._rows:
            return {}
        stores = self._rows.values()
        return {
            "data/requests": float(sum(each.traffic.requests for each in stores)),
            "data/fetched_bytes": float(sum(each.traffic.fetched_bytes for each in stores)),
            "data/used_bytes": float(sum(each.used_bytes for each in stores)),
            "data/wait_seconds": self._wait_seconds,
        }

    def close(self) -> None:
        """Returns when no thread is left: those that are in a request end with it."""
        self._pool.shutdown(cancel_futures=True)

    def _look_at(self, step: int, *, must: bool) -> bool:
        """Has the step's blocks fetched. False: they are too many for now."""
        samples = self._samples(step)
        wanted: dict[tuple[int, int], int] = {}
        for store, row, lane in zip(
            samples.stores.tolist(), samples.rows.tolist(), samples.lanes.tolist(), strict=True
        ):
            if (rows := self._rows.get(store)) is not None:
                wanted[store, row // rows.block_rows] = lane
        new = {key: self._rows[key[0]].num_bytes(key[1]) for key in wanted if key not in self._blocks}
        if not must and self._num_bytes + sum(new.values()) > self._max_bytes:
            return False
        self._num_bytes += sum(new.values())
        for key, lane in wanted.items():
            if key in new:
                fetched = self._pool.submit(self._rows[key[0]].fetch, key[1])
                self._blocks[key] = _Block(lane, new[key], fetched, step)
            block = self._blocks[key]
            block.lane, block.last_step, block.is_last = lane, step, True
            before = self._of_lanes.get((key[0], lane))
            if before not in (None, key) and before in self._blocks and self._blocks[before].lane == lane:
                self._blocks[before].is_last = False
            self._of_lanes[key[0], lane] = key
        self._of_steps[step] = list(wanted)
        return True

    def _is_over(self, block: _Block, step: int) -> bool:
        return block.last_step < step and (not block.is_last or block.last_step < step - STALE_STEPS)

    def _let_go(self, key: tuple[int, int]) -> None:
        block = self._blocks.pop(key)
        self._num_bytes -= block.num_bytes
        block.fetched.cancel()
        if block.is_held:
            self._rows[key[0]].let_go(key[1])
