"""Held-out documents as batches, and the unit they are judged in: bits per byte, which no choice of tokenizer flatters.

Each token of a document is counted once, the first one given the end-of-document token before it. Of a flagged store
those tokens are that are labels, and the first one is none. A document longer than T is cut into windows of T labels; a
later window begins with the label before it as its only context.

B: sequences per call, T: seq_len.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.records.flags import is_label, token_ids
from raynium.data.store import OpenStore


@dataclass(frozen=True)
class EvaluationSet:
    """One data-parallel rank's share of the batches; the counts are over all ranks.

    batches: as many, of the same shape, on every rank, since evaluation holds collectives. num_tokens: labels that
    count. num_bytes: of the documents' UTF-8 text.
    """

    batches: list[Batch]
    num_documents: int
    num_tokens: int
    num_bytes: int


def evaluation_set(
    store: OpenStore,
    *,
    seq_len: int,
    batch_size: int,
    data_rank: int,
    data_size: int,
    max_documents: int | None = None,
) -> EvaluationSet:
    """The first `max_documents` held-out documents (by hash of name; None: all) in batches of [batch_size, seq_len].

    The same rows for every `data_size`, dealt out differently; rows that fill up the last call count no label.
    """
    documents = store.heldout_documents(max_documents)
    stream = store.heldout_stream()
    end_of_document = store.manifest.end_of_document_id
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for document in documents:
        stored = stream.read(document.offset, document.num_tokens)
        if store.manifest.flagged:
            ids = token_ids(stored).astype(np.int64)
            tokens, labels = ids[:-1], np.where(is_label(stored), ids, IGNORED_LABEL)[1:]
        else:
            labels = stored.astype(np.int64)
            tokens = np.concatenate([[end_of_document], labels[:-1]])
        rows += [(tokens[i : i + seq_len], labels[i : i + seq_len]) for i in range(0, len(labels), seq_len)]
    tokens_RT = np.full((len(rows), seq_len), end_of_document, dtype=np.int64)
    labels_RT = np.full_like(tokens_RT, IGNORED_LABEL)
    for row, (tokens, labels) in enumerate(rows):
        tokens_RT[row, : len(tokens)] = tokens
        labels_RT[row, : len(labels)] = labels
    columns = {"tokens": tokens_RT, "labels": labels_RT}
    return EvaluationSet(
        batches=dealt_out(
            columns, filler=end_of_document, batch_size=batch_size, data_rank=data_rank, data_size=data_size
        ).batches,
        num_documents=len(documents),
        num_tokens=int((labels_RT != IGNORED_LABEL).sum()),
        num_bytes=sum(document.utf8_bytes for document in documents),
    )


class Dealt(NamedTuple):
    """One data rank's share of rows. begins: of each batch, its first row's place among the rows of all ranks, of which
    there are `num_places` with those that fill up the last call.
    """

    batches: list[Batch]
    begins: list[int]
    num_places: int


def dealt_out(
    columns: Mapping[str, np.ndarray], *, filler: int, batch_size: int, data_rank: int, data_size: int
) -> Dealt:
    """Rows as batches of [batch_size, …], as many on every rank: call c of rank r takes rows [(c·data_size + r)·B, +B),
    so that only the last call is filled up, with rows without a label.

    columns: as of a batch, each [rows, …]. filler: the token of rows that fill up.
    """
    import torch

    assert 0 <= data_rank < data_size
    num_rows, rows_per_call = len(columns["labels"]), batch_size * data_size
    num_calls = -(-num_rows // rows_per_call)
    fill = {"tokens": filler, "labels": IGNORED_LABEL}
    whole = {
        name: np.pad(
            column,
            [(0, num_calls * rows_per_call - num_rows), *[(0, 0)] * (column.ndim - 1)],
            constant_values=fill.get(name, 0),
        )
        for name, column in columns.items()
    }
    begins = [(call * data_size + data_rank) * batch_size for call in range(num_calls)]
    batches = [
        Batch.of({name: torch.from_numpy(column[at : at + batch_size].copy()) for name, column in whole.items()})
        for at in begins
    ]
    return Dealt(batches, begins, num_calls * rows_per_call)


def counts_of_all(sets: Sequence[EvaluationSet]) -> EvaluationSet:
    """The counts of several, as if they were one, without the batches."""
    return EvaluationSet(
        batches=[],
        num_documents=sum(each.num_documents for each in sets),
        num_tokens=sum(each.num_tokens for each in sets),
        num_bytes=sum(each.num_bytes for each in sets),
    )


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """nats: the summed (not averaged) loss over text of `num_bytes` UTF-8 bytes."""
    assert num_bytes > 0
    return nats / math.log(2) / num_bytes
