"""Rows of whole documents, by the index that says what lies in each. T: `data.seq_len`."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from raynium.data.batch import IGNORED_LABEL
from raynium.data.packing.index import OpenIndex
from raynium.data.packing.packer import Stream
from raynium.data.records.flags import is_label, token_ids


class PackedRows:
    """Rows of whole documents, with a column "documents": int32 [n, T], rising from 0 in each row. See `rows.Rows`.

    Positions that fill a row up are a document of their own, without a label. A document begins on the end of the one
    before it in the store, so that every token of it is a label; a later piece of a long one on the token before it.
    Of a flagged store it begins on its own first token, and what a flag says to be no label is none.
    """

    rows_per_sample = 1

    def __init__(self, stream: Stream, index: OpenIndex, *, end_of_document: int, flagged: bool = False):
        """index: of the stream. flagged: whether its tokens are."""
        self._stream, self.flagged = stream, flagged
        self.index, self._part = index.index, index.part
        # Of each part the number of the row behind its last; and it as Python numbers are had from.
        self._ends = list(accumulate(self.index.rows))
        self._views: dict[int, tuple[memoryview[int], memoryview[int]]] = {}
        self._seq_len = index.index.seq_len
        # What rows are filled up with, as tokens are stored.
        self.filler = np.full(self._seq_len, end_of_document, stream.dtype)

    def __len__(self) -> int:
        return self.index.num_rows

    def read(self, rows: np.ndarray, *, unmasked: bool = False) -> dict[str, np.ndarray]:
        """unmasked: of a flagged store, labels are all tokens; a column "learned", bool, says which of them count."""
        return self.joined([self.spans(row) for row in rows.tolist()], unmasked=unmasked)

    def spans(self, row: int) -> list[np.ndarray]:
        """The pieces of a row, each behind the token before it: as stored, mostly views. At least one."""
        read, pieces, begin, end = self._stream.read, *self._look_up(row)
        return [
            read(place - 1, pieces[at + 1] + 1)
            if (place := pieces[at])
            else np.append(self.filler[:1], read(0, pieces[at + 1]))
            for at in range(begin, end, 2)
        ]

    def joined(self, rows: Sequence[Sequence[np.ndarray]], *, unmasked: bool = False) -> dict[str, np.ndarray]:
        """The columns of rows by their `spans`, which may be other stores' of the same kind."""
        return columns_of(rows, filler=self.filler, documents=True, flagged=self.flagged, unmasked=unmasked)

    def lengths(self) -> np.ndarray:
        """int64, of each row the positions that are a document's. DataError if the index is damaged."""
        parts = [self._part(number) for number, rows in enumerate(self.index.rows) if rows]
        return np.concatenate([np.add.reduceat(pieces[:, 1], begins[:-1]) for begins, pieces in parts])

    def _look_up(self, row: int) -> "tuple[memoryview[int], int, int]":
        """Places and lengths in turns, and from where to where those of this row are. No numpy: that costs more."""
        part = bisect_right(self._ends, row) if len(self._ends) > 1 else 0
        if (views := self._views.get(part)) is None:
            row_begins, pieces = self._part(part)
            views = self._views[part] = row_begins.data, pieces.reshape(-1).data
        begins, pieces = views
        row -= self._ends[part] - self.index.rows[part]
        return pieces, 2 * begins[row], 2 * begins[row + 1]

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Documents of one window lie in each other's way: it may be the whole window's."""
        spans: list[tuple[int, int]] = []
        first_part, last_part = (bisect_right(self._ends, row) for row in (first, end - 1))
        for part in range(first_part, last_part + 1):
            # One long document leaves parts between its beginning and its end without a row.
            if not self.index.rows[part]:
                continue
            row_begins, pieces = self._part(part)
            of_part = np.array((first, end)) - (self._ends[part] - self.index.rows[part])
            piece, piece_end = row_begins[of_part.clip(0, len(row_begins) - 1)].tolist()
            found = pieces[piece:piece_end]
            spans.append((int(found[:, 0].min()), int(found.sum(axis=1).max())))
        return max(min(begin for begin, _ in spans) - 1, 0), max(end for _, end in spans)


def columns_of(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    filler: np.ndarray,
    documents: bool,
    flagged: bool = False,
    unmasked: bool = False,
) -> dict[str, np.ndarray]:
    """The columns of rows, each given as its `spans`, which make a row of T tokens or less. See `rows.Rows`.

    filler: [T], of which shorter rows get their rest. documents: whether there is a column of them. flagged, unmasked:
    as in `PackedRows`. Most of what this takes is for its calls, so it makes few, of numpy for all rows at once.
    """
    assert not unmasked or flagged
    seq_len, end = len(filler), 0
    pieces: list[np.ndarray] = []
    # What fills rows up, and the documents of a row after its first, by (begin, end) in the columns.
    fillers: list[tuple[int, int]] = []
    later: list[tuple[int, int, int]] = []
    for spans in rows:
        pieces += spans
        row_end, number = end + seq_len, 0
        for span in spans:
            begin, end = end, end + len(span) - 1
            if number:
                later.append((begin, end, number))
            number += 1
        if end < row_end:
            pieces.append(filler[end - row_end - 1 :])
            fillers.append((end, row_end))
            later.append((end, row_end, number))
            end = row_end
    dtype = None if flagged else np.int64
    tokens = np.concatenate([piece[:-1] for piece in pieces], dtype=dtype)
    labels = stored = np.concatenate([piece[1:] for piece in pieces], dtype=dtype)
    if flagged:
        tokens, labels = (token_ids(column).astype(np.int64) for column in (tokens, stored))
        if not unmasked:
            labels[~is_label(stored)] = IGNORED_LABEL
    for begin, end in fillers:
        labels[begin:end] = IGNORED_LABEL
    columns = {"tokens": tokens, "labels": labels}
    if documents:
        columns["documents"] = np.zeros(len(labels), np.int32)
        for begin, end, number in later:
            columns["documents"][begin:end] = number
    if unmasked:
        columns["learned"] = is_label(stored) & (labels != IGNORED_LABEL)
    return {name: column.reshape(len(rows), seq_len) for name, column in columns.items()}
