"""Which documents lie together in a row: a pure function of the stream of tokens, the row's length and the policy.

Documents that begin within one window of the stream are packed together, the longest first, each into the row with the
least space that still holds it (best fit, decreasing). Windows are places in the stream, so rows do not depend on how
it is cut into files, windows have nothing to do with each other, and a row's documents lie near each other. What lies
in a row stands in the order of the stream, and so do the rows of a window, by what they begin with.

A document is its tokens and the one that ends it, all of which are labels; of a flagged store it begins where a flag
says so, and its first token is no label, but what comes before the first one. T: tokens of a row, `data.seq_len`.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from raynium.data.records.flags import begins_document, is_label

# Part of an index's name: another number where the same stream would be packed, or its index written, otherwise.
PACKER_VERSION = 4
# Windows are a part, which is packed at once and is one file of the index: about so many tokens.
PART_TOKENS = 2**26
# Read at once in search of ends of documents: of a store in S3, in several requests.
_CHUNK_TOKENS = 2**24

TooLong = Literal["split", "cut", "leave_out", "refuse"]


class Stream(Protocol):
    """A store's training tokens: `data.tokens.Tokens`."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...


class PackedPart(NamedTuple):
    """The rows of some windows, and what became of the documents that begin there.

    row_begins: int64 [rows + 1], where the pieces of each row begin. pieces: int64 [pieces, 2], (place of the first
    label in the stream, number of labels), row by row. shortest, longest: labels of these documents; 0 where none
    begins. cut_tokens: of documents that were cut, what was dropped. unlearned: pieces of split or cut documents of a
    flagged store that are in no row, since none of their tokens is a label.
    """

    row_begins: np.ndarray
    pieces: np.ndarray
    documents: int
    split: int
    left_out: int
    left_out_tokens: int
    cut: int
    cut_tokens: int
    unlearned: int
    unlearned_tokens: int
    shortest: int
    longest: int


def window_tokens(seq_len: int) -> int:
    """A stretch that is small beside what a node streams at once, and holds 128 rows at least: larger ones would fill
    them better by less than 1 %.
    """
    return max(2**19, 128 * seq_len)


def num_parts(num_tokens: int, seq_len: int) -> int:
    return -(-num_tokens // _part_tokens(seq_len))


def pack_part(stream: Stream, part: int, *, seq_len: int, too_long: TooLong, end_of_document: int | None) -> PackedPart:
    """The part that begins at token `part` times its length. Reads on to where its last document ends.

    end_of_document: None for a flagged stream. DataError if the store is damaged there.
    """
    begin = part * _part_tokens(seq_len)
    end = min(begin + _part_tokens(seq_len), len(stream))
    begins = np.concatenate([np.empty(0, np.int64), *_document_begins(stream, begin, end, end_of_document)])
    if len(begins) == 0:
        return PackedPart(np.zeros(1, np.int64), np.empty((0, 2), np.int64), *[0] * 10)
    after = next((found[0] for found in _document_begins(stream, end, len(stream), end_of_document)), len(stream))
    lengths = np.diff(begins, append=after)
    if end_of_document is None:
        begins, lengths = begins + 1, lengths - 1

    long = lengths > seq_len
    left_out = long if too_long == "leave_out" else np.zeros_like(long)
    cut = long if too_long == "cut" else np.zeros_like(long)
    cut_tokens = int((lengths[cut] - seq_len).sum())
    kept_begins, kept_lengths = begins[~left_out], np.where(cut, seq_len, lengths)[~left_out]
    pieces = _cut(kept_begins, kept_lengths, seq_len)
    counts = -(-kept_lengths // seq_len)
    of_document = np.repeat(np.arange(len(counts)), counts)
    unlearned = np.zeros(len(pieces), bool)
    if end_of_document is None:
        # Of a document that is whole some token is a label.
        for piece in np.flatnonzero(long[~left_out][of_document]).tolist():
            unlearned[piece] = not is_label(stream.read(*pieces[piece].tolist())).any()
    unlearned_tokens = int(pieces[unlearned, 1].sum())
    pieces, of_document = pieces[~unlearned], of_document[~unlearned]
    pieces_of = np.bincount(of_document, minlength=len(counts))
    # Pieces follow their document's beginning, wherever they lie.
    windows = kept_begins[of_document] // window_tokens(seq_len)
    row_begins, order = [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
    for first, last in _runs(windows):
        rows = _best_fit(pieces[first:last, 1], seq_len)
        order.append(first + np.argsort(rows, kind="stable"))
        row_begins.append(first + np.cumsum(np.bincount(rows)))
    return PackedPart(
        row_begins=np.concatenate(row_begins),
        pieces=pieces[np.concatenate(order)],
        documents=int((pieces_of > 0).sum()),
        split=int(((kept_lengths > seq_len) & (pieces_of > 0)).sum()),
        left_out=int(left_out.sum()),
        left_out_tokens=int(lengths[left_out].sum()),
        cut=int((cut[~left_out] & (pieces_of > 0)).sum()),
        cut_tokens=cut_tokens,
        unlearned=int(unlearned.sum()),
        unlearned_tokens=unlearned_tokens,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
    )


def pack_alone(stream: Stream, *, together: int, seq_len: int, too_long: TooLong) -> PackedPart:
    """One part of the whole flagged stream, each document in a row of its own, in the order of the stream.

    together: so many neighbours stay or go as one. A cut that leaves no label of a document has it go. shortest: of
    each of them the longest, of these the least. DataError if the store is damaged.
    """
    found = _document_begins(stream, 0, len(stream), None)
    begins = np.concatenate([np.empty(0, np.int64), *found])
    lengths = np.diff(begins, append=len(stream)) - 1
    begins += 1
    assert len(begins) % together == 0, f"{len(begins)} documents do not make whole samples of {together}"
    long = lengths > seq_len
    gone = long.copy()
    if too_long == "cut":
        for at in np.flatnonzero(long).tolist():
            gone[at] = not is_label(stream.read(begins.item(at), seq_len)).any()
    left_out = gone.reshape(-1, together).any(1).repeat(together)
    kept = np.minimum(lengths, seq_len)[~left_out]
    cut = long & ~left_out
    return PackedPart(
        row_begins=np.arange(len(kept) + 1),
        pieces=np.stack((begins[~left_out], kept), axis=1),
        documents=len(kept),
        split=0,
        left_out=int(left_out.sum()),
        left_out_tokens=int(lengths[left_out].sum()),
        cut=int(cut.sum()),
        cut_tokens=int((lengths[cut] - seq_len).sum()),
        unlearned=0,
        unlearned_tokens=0,
        shortest=int(lengths.reshape(-1, together).max(1).min()),
        longest=int(lengths.max()),
    )


def _part_tokens(seq_len: int) -> int:
    window = window_tokens(seq_len)
    return max(1, PART_TOKENS // window) * window


def _document_begins(stream: Stream, begin: int, end: int, end_of_document: int | None) -> Iterator[np.ndarray]:
    """Where documents begin in [begin, end), in rising arrays, none of them empty."""
    if end_of_document is None:
        for first in range(begin, end, _CHUNK_TOKENS):
            found = np.flatnonzero(begins_document(stream.read(first, min(_CHUNK_TOKENS, end - first))))
            if len(found):
                yield found + first
        return
    if begin == 0 < end:
        yield np.zeros(1, np.int64)
    # A document begins behind the end of the one before.
    for first in range(max(begin, 1), end, _CHUNK_TOKENS):
        found = np.flatnonzero(stream.read(first - 1, min(_CHUNK_TOKENS, end - first)) == end_of_document)
        if len(found):
            yield found + first


def _cut(begins: np.ndarray, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 [pieces, 2]: documents in pieces of seq_len and what remains, in the order of the stream."""
    counts = -(-lengths // seq_len)
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    done = numbers * seq_len
    return np.stack((np.repeat(begins, counts) + done, np.minimum(np.repeat(lengths, counts) - done, seq_len)), axis=1)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, last) of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True) if len(values) else ()


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """int64, the row of each piece, rows counted in the order of their first pieces."""
    rows = np.empty(len(lengths), np.int64)
    # Space left → the rows that have it; the spaces that some row has, rising.
    having: dict[int, list[int]] = {}
    spaces: list[int] = []
    num_rows = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = num_rows, seq_len
            num_rows += 1
        else:
            space = spaces[at]
            row = having[space].pop()
            if not having[space]:
                del spaces[at]
        rows[piece] = row
        space -= length
        if space:
            waiting = having.setdefault(space, [])
            if not waiting:
                insort(spaces, space)
            waiting.append(row)
    _, firsts, rows = np.unique(rows, return_index=True, return_inverse=True)
    ranks = np.empty_like(firsts)
    ranks[np.argsort(firsts)] = np.arange(len(firsts))
    return ranks[rows]
