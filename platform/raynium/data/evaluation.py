"""Held-out documents as batches, and the unit they are judged in: bits per byte, which no choice of tokenizer flatters.

Each token of a document is counted once, the first one given the end-of-document token before it. Of a flagged store
those tokens are that are labels, and the first one is none. A document longer than T is cut into windows of T labels; a
later window begins with the label before it as its only context.

B: sequences per call, T: seq_len.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    assert 0 <= data_rank < data_size
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
    import torch

    rows_per_call = batch_size * data_size
    num_calls = math.ceil(len(rows) / rows_per_call)
    tokens_RT = np.full((num_calls * rows_per_call, seq_len), end_of_document, dtype=np.int64)
    labels_RT = np.full((num_calls * rows_per_call, seq_len), IGNORED_LABEL, dtype=np.int64)
    for row, (tokens, labels) in enumerate(rows):
        tokens_RT[row, : len(tokens)] = tokens
        labels_RT[row, : len(labels)] = labels
    # call c of rank r takes rows [(c·data_size + r)·B, +B), so that padding falls in the last call only
    firsts = [(call * data_size + data_rank) * batch_size for call in range(num_calls)]
    return EvaluationSet(
        batches=[
            Batch(
                tokens_BT=torch.from_numpy(tokens_RT[first : first + batch_size].copy()),
                labels_BT=torch.from_numpy(labels_RT[first : first + batch_size].copy()),
            )
            for first in firsts
        ],
        num_documents=len(documents),
        num_tokens=sum(int((labels != IGNORED_LABEL).sum()) for _, labels in rows),
        num_bytes=sum(document.utf8_bytes for document in documents),
    )


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
