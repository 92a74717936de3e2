"""Held-out pairs as batches, of the columns that a task asks for. R: rows, chosen and rejected by turns."""

from collections.abc import Mapping

import numpy as np
import torch

from raynium.config.schema import DataSection
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.evaluation import EvaluationSet
from raynium.data.packing.pairs import ROWS_PER_PAIR, with_answer_column
from raynium.data.records.flags import is_label, token_ids
from raynium.data.store import OpenStore
from raynium.errors import DataError


def held_out_pairs(
    store: OpenStore, data: DataSection, *, max_pairs: int | None, with_answers: bool = False
) -> dict[str, np.ndarray]:
    """The columns of the first pairs of held-out documents (by hash of name), as `PairRows` has them of those trained
    on. Pairs that are longer than a row are cut or left out, as data.too_long says. DataError for damage.
    """
    documents = store.heldout_documents(None if max_pairs is None else ROWS_PER_PAIR * max_pairs)
    stream, end = store.heldout_stream(), store.manifest.end_of_document_id
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    for at in range(0, len(documents), ROWS_PER_PAIR):
        pair = [stream.read(each.offset, each.num_tokens) for each in documents[at : at + ROWS_PER_PAIR]]
        fits = data.too_long == "cut" or all(len(stored) <= data.seq_len + 1 for stored in pair)
        pair = [stored[: data.seq_len + 1] for stored in pair]
        if not fits or not all(is_label(stored[1:]).any() for stored in pair):
            continue
        for stored in pair:
            ids = token_ids(stored).astype(np.int64)
            filler = data.seq_len - (len(ids) - 1)
            tokens.append(np.pad(ids[:-1], (0, filler), constant_values=end))
            labels.append(np.pad(ids[1:], (0, filler), constant_values=IGNORED_LABEL))
            learned.append(np.pad(is_label(stored[1:]), (0, filler)))
    if not tokens:
        raise DataError(
            f"data.seq_len = {data.seq_len}: of the {len(documents) // ROWS_PER_PAIR} held-out pairs of {store.place} "
            "that are looked at, none fits: raise data.seq_len, or set data.too_long to cut"
        )
    shape = (len(tokens), data.seq_len)
    columns = {"tokens": np.reshape(tokens, shape), "labels": np.reshape(labels, shape).astype(np.int64)}
    learned_RT = np.reshape(learned, shape).astype(bool)
    if with_answers:
        return with_answer_column(columns, learned_RT)
    columns["labels"][~learned_RT] = IGNORED_LABEL
    return columns


def pair_evaluation_set(
    columns: Mapping[str, np.ndarray], *, batch_size: int, data_rank: int, data_size: int, filler: int
) -> EvaluationSet:
    """Rows in whole pairs, dealt out as `evaluation_set` does. filler: the token of rows that fill up the last call."""
    rows = len(columns["labels"])
    rows_per_call = batch_size * data_size
    num_calls = -(-rows // rows_per_call)
    fill = {"tokens": filler, "labels": IGNORED_LABEL}
    whole = {
        name: np.pad(
            column,
            [(0, num_calls * rows_per_call - rows), *[(0, 0)] * (column.ndim - 1)],
            constant_values=fill.get(name, 0),
        )
        for name, column in columns.items()
    }
    firsts = [(call * data_size + data_rank) * batch_size for call in range(num_calls)]
    return EvaluationSet(
        batches=[
            Batch.of({name: torch.from_numpy(column[at : at + batch_size].copy()) for name, column in whole.items()})
            for at in firsts
        ],
        num_documents=rows,
        num_tokens=int((columns["labels"] != IGNORED_LABEL).sum()),
        num_bytes=0,
    )
