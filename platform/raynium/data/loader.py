"""Training batches: the samples of a step by the order, read from their stores, so that the whole state is the step.

Step s, counted from 1, takes samples [(s-1)·B, s·B). Within a step they are put in the order of their stores and lanes
where the shuffle has lanes, so that each rank reads the same few blocks for long, whatever the world size.
B: sequences per step over all ranks, T: `data.seq_len`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from raynium.config.schema import Config
from raynium.data.access import block_rows, row_bytes
from raynium.data.ahead import Ahead, FetchAhead, StreamedRows
from raynium.data.batch import Batch
from raynium.data.mixed import metrics_of_stores
from raynium.data.order import Order, RowShuffle, Samples, Shuffle, seed_of_store
from raynium.data.order.block_shuffle import BlockShuffle
from raynium.data.order.mixture import mixture_of
from raynium.data.packing.pairs import PairRows, ReferencedRows, nats_weights_of_step
from raynium.data.packing.rows import PackedRows
from raynium.data.rows import Rows, StreamRows, num_labels, open_rows
from raynium.data.store import OpenStore
from raynium.data.streamed import StreamedStore
from raynium.data.tokens import SHORT_TOKENS

# The order is computed for many steps at once: one numpy call costs the same for 1 as for 1,000 samples.
SAMPLES_AT_ONCE = 4096
# So are rows read, where no store is streamed: about so many bytes of tokens and labels.
BYTES_AT_ONCE = 2**19
# Of a step's samples so many are named one by one.
NAMED = 32


class Loader:
    """One data-parallel rank's batches. Ranks of one tensor-parallel group pass the same `data_rank`.

    The global batch is the ranks' batches in rank order, the same at every `data_size`. Not thread-safe; no collective.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        order: Order,
        *,
        global_batch_size: int,
        data_rank: int,
        data_size: int,
        steps_per_read: int = 1,
        ahead: Ahead | None = None,
        told: Callable[[int], dict[str, float]] = lambda step: {},
        of_step: Callable[[Samples], dict[str, np.ndarray]] | None = None,
    ):
        """rows: of each store, by the order's numbers of them. steps_per_read: whose rows are read at once; 1 with
        `ahead`, where some are streamed. told: more metrics. of_step: more columns of this rank's rows, by the samples
        of all ranks.
        """
        assert 0 <= data_rank < data_size
        assert global_batch_size % (data_size * rows[0].rows_per_sample) == 0, "samples are whole on each rank"
        self._rows, self._order = rows, order
        self._rows_per_sample = rows[0].rows_per_sample
        self._step_samples = global_batch_size // self._rows_per_sample
        self._rank_samples = self._step_samples // data_size
        self._data_rank = data_rank
        self._steps_at_once = max(1, SAMPLES_AT_ONCE // self._step_samples)
        # One is read from, another is looked ahead in.
        self._of_steps = lru_cache(4)(self._compute)
        self._steps_per_read = steps_per_read
        self._columns = lru_cache(1)(self._read_steps)
        # If rows of several stores can be put together as they are stored: short windows are faster taken by store.
        self._spanned = _spanned(rows)
        self._told, self._of_step = told, of_step
        self._fetching = FetchAhead(rows, self.samples, ahead) if ahead else None

    def batch(self, step: int) -> Batch:
        """This rank's share of a step: contiguous tensors on the CPU, [B / data_size, T].

        DataError if a store is damaged there; StoreError if it is streamed and cannot be read.
        """
        if self._fetching:
            self._fetching.hold(step)
        part, number = divmod(step - 1, self._steps_per_read)
        rows = self._rank_samples * self._rows_per_sample
        first, end = number * rows, (number + 1) * rows
        columns = {name: column[first:end] for name, column in self._columns(part).items()}
        if self._of_step is not None:
            columns |= self._of_step(self.samples_of_all(step))
        return Batch.of({name: torch.from_numpy(column) for name, column in columns.items()})

    def batch_of(self, step: int, data_rank: int) -> Batch:
        """Any data rank's share of a step, as that rank's `batch` has it: read now, for what is rarely wanted."""
        columns = self._read([self._place(step, data_rank)])
        if self._of_step is not None:
            columns |= self._of_step(self.samples_of_all(step))
        return Batch.of({name: torch.from_numpy(column) for name, column in columns.items()})

    def samples(self, step: int) -> Samples:
        """Where this rank's samples of a step lie, each int64."""
        samples, mine = self._place(step, self._data_rank)
        return Samples(*(column[mine] for column in samples))

    def samples_of_all(self, step: int) -> Samples:
        """Those of all ranks."""
        part, number = divmod(step - 1, self._steps_at_once)
        of_step = slice(number * self._step_samples, (number + 1) * self._step_samples)
        return Samples(*(column[of_step] for column in self._of_steps(part)))

    def names(self, step: int) -> str:
        """The samples of a step, of all ranks, in words: their numbers in the run's order, counted from 0, and where
        they lie: rows of stores, which are numbered as the mixture has them.
        """
        first, samples = (step - 1) * self._step_samples, self.samples_of_all(step)
        places = [f"{store}:{row}" for store, row in zip(samples.stores.tolist(), samples.rows.tolist(), strict=True)]
        more = f" and {len(places) - NAMED:,} more" if len(places) > NAMED else ""
        return (
            f"its samples are {first:,} to {first + self._step_samples - 1:,} of the run's order, store:row "
            f"{', '.join(places[:NAMED])}{more}"
        )

    def tokens(self, step: int, *, most: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """The first samples of a step, of all ranks: number in the run's order, store, row, and tokens, [T] or more.

        Raises as `batch`. It reads one after the other, whatever was fetched ahead: for a step that went wrong.
        """
        first, samples = (step - 1) * self._step_samples, self.samples_of_all(step)
        for place, (store, row) in enumerate(zip(samples.stores[:most], samples.rows[:most], strict=True)):
            tokens = self._rows[store].read(np.array([row]))["tokens"]
            yield first + place, int(store), int(row), tokens.reshape(-1)

    def _place(self, step: int, data_rank: int) -> tuple[Samples, slice]:
        """Samples of many steps, and which of them are that rank's of this one."""
        assert step >= 1
        part, number = divmod(step - 1, self._steps_at_once)
        first = number * self._step_samples + data_rank * self._rank_samples
        return self._of_steps(part), slice(first, first + self._rank_samples)

    def metrics(self, step: int) -> dict[str, float]:
        """Once `batch(step)` was given: what this rank fetched, if rows are streamed, and what came of each store."""
        return (self._fetching.metrics() if self._fetching else {}) | self._told(step)

    def close(self) -> None:
        """Ends the threads that fetch."""
        if self._fetching:
            self._fetching.close()

    def _compute(self, part: int) -> Samples:
        """Of all ranks, for `steps_at_once` steps."""
        number = self._steps_at_once * self._step_samples
        samples = self._order.samples(part * number, number)
        if not samples.lanes.any():
            return samples
        steps = np.arange(number) // self._step_samples
        sorted_places = np.lexsort((samples.lanes, samples.stores, steps))
        return Samples(*(column[sorted_places] for column in samples))

    def _read_steps(self, part: int) -> dict[str, np.ndarray]:
        """This rank's rows of `steps_per_read` steps, in the order of the samples."""
        first = part * self._steps_per_read + 1
        steps = range(first, first + self._steps_per_read)
        return self._read([self._place(step, self._data_rank) for step in steps])

    def _read(self, places: Sequence[tuple[Samples, slice]]) -> dict[str, np.ndarray]:
        rows = np.concatenate([samples.rows[mine] for samples, mine in places])
        if len(self._rows) == 1:
            return {
                name: values.astype(_type(name, values), copy=False)
                for name, values in self._rows[0].read(rows).items()
            }
        stores = np.concatenate([samples.stores[mine] for samples, mine in places])
        if (spanned := self._spanned) is not None:
            spans = [spanned[store].spans(row) for store, row in zip(stores.tolist(), rows.tolist(), strict=True)]
            return spanned[0].joined(spans)
        columns: dict[str, np.ndarray] = {}
        by_store, end, of_sample = np.argsort(stores, kind="stable"), 0, self._rows_per_sample
        for store, count in enumerate(np.bincount(stores).tolist()):
            if count == 0:
                continue
            begin, end = end, end + count
            chosen = by_store[begin:end]
            for name, values in self._rows[store].read(rows[chosen]).items():
                if name not in columns:
                    columns[name] = np.empty((len(by_store), of_sample, *values.shape[1:]), _type(name, values))
                columns[name][chosen] = values.reshape(count, of_sample, *values.shape[1:])
        return {name: values.reshape(-1, *values.shape[2:]) for name, values in columns.items()}


def _spanned(rows: Sequence[Rows]) -> Sequence[StreamRows] | Sequence[PackedRows] | None:
    packed = [each for each in rows if isinstance(each, PackedRows)]
    windows = [each for each in rows if isinstance(each, StreamRows) and each.seq_len > SHORT_TOKENS]
    if len(packed) == len(rows) and len({each.flagged for each in packed}) == 1:
        return packed
    return windows if len(windows) == len(rows) else None


def _type(name: str, values: np.ndarray) -> np.dtype[Any]:
    """Of a batch's column: torch looks up and counts by int64, whatever tokens are stored as."""
    return np.dtype(np.int64) if name in ("tokens", "labels") else values.dtype


def open_loader(
    config: Config,
    stores: Sequence[OpenStore],
    *,
    data_rank: int,
    data_size: int,
    cache_sharers: int = 1,
    columns: Collection[str] = (),
    references: Sequence[np.ndarray] = (),
) -> Loader:
    """The loader of a run. Raises DataError if a store has not as much as one row.

    cache_sharers: how many of the node's ranks fetch into its cache and read different samples. columns: that the task
    asks for. references: of each store's rows, for the column "reference".
    """
    data, train = config.data, config.train
    rows: list[Rows] = [
        open_rows(store, data, entry.store, config.run.place, with_answers="answer" in columns)
        for store, entry in zip(stores, data.stores, strict=True)
    ]
    # None or all: the stores of a run hold records of one format.
    pairs = [each for each in rows if isinstance(each, PairRows)]
    of_step = nats_weights_of_step(pairs, data_size=data_size) if "nats_weight" in columns else None
    samples_per_step = train.global_batch_size // rows[0].rows_per_sample
    shuffles = [_shuffle(config, number, store, len(rows[number])) for number, store in enumerate(stores)]
    order = Order(shuffles, mixture_of(data, samples_per_step))
    num_rows = [len(each) for each in rows]
    labels = [num_labels(each, data.seq_len) for each in rows]
    for number, reference in enumerate(references):
        rows[number] = ReferencedRows(pairs[number], reference)
    streamed = any(isinstance(store, StreamedStore) for store in stores)
    bytes_per_step = 16 * data.seq_len * train.global_batch_size // data_size
    for number, store in enumerate(stores):
        if isinstance(store, StreamedStore):
            rows[number] = StreamedRows(
                rows[number],
                store,
                block_rows=block_rows(data, store.manifest),
                row_bytes=row_bytes(data, store.manifest),
            )
    return Loader(
        rows,
        order,
        global_batch_size=train.global_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        steps_per_read=1 if streamed else max(1, BYTES_AT_ONCE // bytes_per_step),
        ahead=Ahead(train.num_steps, data.cache_bytes // cache_sharers) if streamed else None,
        told=lambda step: metrics_of_stores(
            config, order.counts(step * samples_per_step), num_rows=num_rows, num_labels=labels
        ),
        of_step=of_step,
    )


def _shuffle(config: Config, number: int, store: OpenStore, num_rows: int) -> Shuffle:
    data, seed = config.data, seed_of_store(config.run.seed, number)
    if data.shuffle == "rows":
        return RowShuffle(num_rows, seed=seed)
    return BlockShuffle(num_rows, seed=seed, block_rows=block_rows(data, store.manifest), lanes=data.shuffle_lanes)
