"""Rows of whole documents, by the index that says what lies in each. T: `data.seq_len`."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from raynium.data.batch import IGNORED_LABEL
from raynium.data.packing.index import OpenIndex
from raynium.data.packing.packer import Stream
from raynium.data.records.flags import is_label, token_ids

# More pieces of a row than these are read at once, with what lies between them, where that is so many tokens at most.
_FEW_PIECES, _SPAN_TOKENS = 4, 2**21


class PackedRows:
    """Rows of whole documents, with a column "documents": int32 [n, T], rising from 0 in each row. See `rows.Rows`.

    Positions that fill a row up are a document of their own, without a label. A document begins on the end of the one
    before it in the store, so that every token of it is a label; a later piece of a long one on the token before it.
    Of a flagged store it begins on its own first token, and what a flag says to be no label is none.
    """

    rows_per_sample = 1

    def __init__(self, stream: Stream, index: OpenIndex, *, end_of_document: int, flagged: bool = False):
        """index: of the stream. flagged: whether its tokens are."""
        self._stream, self._end_of_document, self._flagged = stream, end_of_document, flagged
        self.index, self._part = index.index, index.part
        self._seq_len = index.index.seq_len
        # What rows are filled up with, as tokens are stored.
        self._filler = np.full(self._seq_len, end_of_document, stream.dtype)

    def __len__(self) -> int:
        return self.index.num_rows

    def read(self, rows: np.ndarray, *, unmasked: bool = False) -> dict[str, np.ndarray]:
        """unmasked: of a flagged store, labels are all tokens; a column "learned", bool, says which of them count."""
        pieces: list[np.ndarray] = []
        contexts: list[int] = []
        numbers: list[int] = []
        fillers: list[tuple[int, int]] = []
        for at, in_row in enumerate(self._look_up(rows)):
            self._read_row(in_row, pieces, contexts)
            number = len(in_row)
            filled = in_row[0][1] if number == 1 else sum([length for _, length in in_row])
            if filled < self._seq_len:
                pieces.append(self._filler[filled:])
                contexts.append(self._end_of_document)
                fillers.append((at * self._seq_len + filled, (at + 1) * self._seq_len))
                number += 1
            numbers += range(number)
        stored = np.concatenate(pieces)
        lengths = np.array([len(piece) for piece in pieces])
        # Each label is the next one's context, but where a piece begins.
        tokens = np.empty_like(stored)
        tokens[1:] = stored[:-1]
        tokens[lengths.cumsum() - lengths] = contexts
        labels = stored.astype(np.int64)
        if self._flagged:
            labels, tokens = token_ids(stored).astype(np.int64), token_ids(tokens)
            if not unmasked:
                labels[~is_label(stored)] = IGNORED_LABEL
        for begin, end in fillers:
            labels[begin:end] = IGNORED_LABEL
        documents = np.array(numbers, np.int32).repeat(lengths)
        columns = {"tokens": tokens, "labels": labels, "documents": documents}
        if unmasked:
            columns["learned"] = is_label(stored) & (labels != IGNORED_LABEL)
        return {name: column.reshape(len(rows), self._seq_len) for name, column in columns.items()}

    def lengths(self) -> np.ndarray:
        """int64, of each row the positions that are a document's. DataError if the index is damaged."""
        parts = [self._part(number) for number, rows in enumerate(self.index.rows) if rows]
        return np.concatenate([np.add.reduceat(pieces[:, 1], begins[:-1]) for begins, pieces in parts])

    def _look_up(self, rows: np.ndarray) -> Iterator[list[list[int]]]:
        """The pieces of each row."""
        if len(self.index.rows) == 1:
            row_begins, pieces = self._part(0)
            for begin, end in zip(row_begins[rows].tolist(), row_begins[rows + 1].tolist(), strict=True):
                yield pieces[begin:end].tolist()
            return
        parts = np.searchsorted(self._part_ends, rows, side="right")
        for part, row in zip(parts.tolist(), (rows - self._part_begins[parts]).tolist(), strict=True):
            row_begins, pieces = self._part(part)
            yield pieces[row_begins[row] : row_begins[row + 1]].tolist()

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Documents of one window lie in each other's way: it may be the whole window's."""
        spans: list[tuple[int, int]] = []
        first_part, last_part = np.searchsorted(self._part_ends, (first, end - 1), side="right").tolist()
        for part in range(first_part, last_part + 1):
            # One long document leaves parts between its beginning and its end without a row.
            if not self.index.rows[part]:
                continue
            row_begins, pieces = self._part(part)
            of_part = np.array((first, end)) - self._part_begins[part]
            piece, piece_end = row_begins[of_part.clip(0, len(row_begins) - 1)].tolist()
            found = pieces[piece:piece_end]
            spans.append((int(found[:, 0].min()), int(found.sum(axis=1).max())))
        return max(min(begin for begin, _ in spans) - 1, 0), max(end for _, end in spans)

    def _read_row(self, in_row: list[list[int]], pieces: list[np.ndarray], contexts: list[int]) -> None:
        """Adds the labels of each piece, and the token before them."""
        # A row is not empty, and its pieces are in the order of the stream.
        begin = max(in_row[0][0] - 1, 0)
        reach = in_row[-1][0] + in_row[-1][1] - begin
        near = self._stream.read(begin, reach) if len(in_row) > _FEW_PIECES and reach <= _SPAN_TOKENS else None
        for place, count in in_row:
            if place == 0:
                pieces.append(self._stream.read(0, count))
                contexts.append(self._end_of_document)
                continue
            if near is None:
                span = self._stream.read(place - 1, count + 1)
            else:
                span = near[place - 1 - begin : place + count - begin]
            contexts.append(span.item(0))
            pieces.append(span[1:])

    @cached_property
    def _part_ends(self) -> np.ndarray:
        return np.cumsum(self.index.rows)

    @cached_property
    def _part_begins(self) -> np.ndarray:
        return self._part_ends - self.index.rows
