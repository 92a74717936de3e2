"""What a task that learns from pairs is given beside the stores' rows: references, and pairs that are held out."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from raynium.config.schema import Config
from raynium.data.batch import IGNORED_LABEL
from raynium.data.evaluation import EvaluationSet, dealt_out
from raynium.data.rows import packed_rows
from raynium.data.store import OpenStore
from raynium.engines.base import Engine
from raynium.rank.held_out_pairs import held_out_pairs
from raynium.rank.origin import Origin
from raynium.rank.reference import ReferencePass
from raynium.tasks.base import Task


class PairData(NamedTuple):
    """references: float32, of all training rows of each store; none where the task asks for none. held_out: by the
    store's name.
    """

    references: list[np.ndarray]
    held_out: dict[str, EvaluationSet]


class _HeldOutRows:
    """See `reference.RowsToRefer`."""

    def __init__(self, columns: Mapping[str, np.ndarray]):
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["labels"])

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: column[rows] for name, column in self._columns.items()}


def pair_data(
    config: Config,
    task: Task,
    engine: Engine,
    documents: list[OpenStore],
    origin: Origin,
    *,
    batch_size: int,
    tell: Callable[[int, int], None],
) -> PairData:
    """Every rank calls it. batch_size: rows of one evaluation call of a data rank. tell: as in `ReferencePass`.

    Nothing for other tasks. Raises DataError if no held-out pair fits a row, StoreError if references can be written
    nowhere.
    """
    if task.rows_per_sample == 1:
        return PairData([], {})
    asked, data = {column.name for column in task.columns}, config.data
    references = ReferencePass(
        engine,
        known_by={"weights": origin.identity(), "dtype": config.engine.dtype},
        run_store=origin.run_store,
        batch_size=batch_size,
        begin=origin.to_the_beginning,
        tell=tell,
    )
    of_train: list[np.ndarray] = []
    held_out: dict[str, EvaluationSet] = {}
    for entry, store in zip(data.stores, documents, strict=True):
        known_by = {"store": store.manifest.identity, "seq_len": data.seq_len, "too_long": data.too_long}
        max_pairs = config.evaluate.max_documents
        columns = held_out_pairs(store, data, max_pairs=max_pairs, with_answers="answer" in asked)
        if "reference" in asked:
            rows = packed_rows(store, data, entry.store, config.run.place)
            of_train.append(references.of(rows, store_url=entry.store, subset="train", **known_by))
            of_held_out = references.of(_HeldOutRows(columns), store_url=entry.store, subset="heldout", **known_by)
            columns["reference"] = of_held_out
        if "nats_weight" in asked:
            # Of an evaluation both means are made of the sums.
            columns["nats_weight"] = np.zeros(len(columns["labels"]), np.float32)
        labels = columns["labels"]
        dealt = dealt_out(
            columns,
            filler=store.manifest.end_of_document_id,
            batch_size=batch_size,
            data_rank=engine.data_rank,
            data_size=engine.data_size,
        )
        num_tokens = int((labels != IGNORED_LABEL).sum())
        held_out[entry.name] = EvaluationSet(dealt.batches, len(labels), num_tokens, num_bytes=0)
    if references.computed:
        origin.restore()
    return PairData(of_train, held_out)
