"""Held-out pairs as the columns that a task asks for: rows, chosen and rejected by turns."""

import numpy as np

from raynium.config.schema import DataSection
from raynium.data.batch import IGNORED_LABEL
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
