"""A store as rows of one length: what the loader reads, whatever way text was cut or packed into them.

T: `data.seq_len`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from raynium.config.schema import DataSection
from raynium.data.manifest import StoreManifest
from raynium.data.packed_index import Packable, ensure_index
from raynium.data.packing.pairs import PairRows
from raynium.data.packing.rows import PackedRows, columns_of
from raynium.data.store import DocumentStore, OpenStore
from raynium.errors import DataError


class Rows(Protocol):
    """The training samples of one store, in the order in which they lie there; most are a row each.

    rows_per_sample: neighbouring rows that are one sample. `row` and `len` count samples.
    """

    rows_per_sample: int

    def __len__(self) -> int:
        """At least 1."""
        ...

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of these samples by name: "tokens" and "labels", of any type of integers, [n *
        rows_per_sample, T], and others.

        rows: int64 [n], each in [0, len). A label of IGNORED_LABEL is not counted. The columns are the same for every
        call, and may lie in one another's memory. DataError if the store is damaged there.
        """
        ...

    def span(self, first: int, end: int) -> tuple[int, int]:
        """(begin, end) in the training stream of all tokens that rows [first, end) are read from."""
        ...


class StreamRows:
    """Windows of T + 1 tokens of the training stream, each beginning on the last token of the one before.

    So every token but the first is a label once; fewer than T tokens at the stream's end are left out.
    """

    rows_per_sample = 1

    def __init__(self, store: OpenStore, seq_len: int):
        """Raises DataError if the training stream is shorter than one window."""
        self._stream = store.train_stream()
        self.seq_len = seq_len
        # No row needs any of it.
        self._filler = np.empty(seq_len, self._stream.dtype)
        self._num_rows = stream_rows(store.manifest, seq_len, where=store.place)

    def __len__(self) -> int:
        return self._num_rows

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        windows = self._stream.gather(rows * self.seq_len, self.seq_len + 1)
        return {"tokens": windows[:, :-1], "labels": windows[:, 1:]}

    def spans(self, row: int) -> list[np.ndarray]:
        """The window, as stored; see `PackedRows.spans`."""
        return [self._stream.read(row * self.seq_len, self.seq_len + 1)]

    def joined(self, rows: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        """As `PackedRows.joined`."""
        return columns_of(rows, filler=self._filler, documents=False)

    def span(self, first: int, end: int) -> tuple[int, int]:
        return first * self.seq_len, end * self.seq_len + 1


def stream_rows(manifest: StoreManifest, seq_len: int, *, where: str) -> int:
    """How many rows `StreamRows` has. Raises DataError if there is none; where: names the store."""
    tokens = manifest.train.tokens
    if tokens < seq_len + 1:
        raise DataError(
            f"data.seq_len = {seq_len}: document store {where} holds {tokens} training tokens, "
            f"and one sample takes seq_len + 1; set data.seq_len to {tokens - 1} or less, or add text"
        )
    return (tokens - 1) // seq_len


def open_rows(store: OpenStore, data: DataSection, *homes: str, with_answers: bool = False) -> Rows:
    """A store's rows as data.packing says, and in pairs where it holds those. Raises DataError if there is none.

    with_answers: as in `PairRows`.

    homes: see `packable`. Any process of a node may call it: one makes the index of packed rows, where it is missing,
    and others wait.
    """
    refuse_windows_of_records(store.manifest, data, where=store.place)
    if data.packing == "stream":
        return StreamRows(store, data.seq_len)
    rows = packed_rows(store, data, *homes)
    return PairRows(rows, with_answers=with_answers) if store.manifest.documents_per_record > 1 else rows


def packed_rows(store: OpenStore, data: DataSection, *homes: str) -> PackedRows:
    """Those of a store with data.packing documents, as `open_rows`."""
    known = packable(store, *homes)
    index = ensure_index(known, data)
    if isinstance(store, DocumentStore):
        # All of the store is on this node, whose rows come in any order.
        index.copy_all()
    return PackedRows(known.stream, index, end_of_document=known.end_of_document, flagged=known.flagged)


def refuse_windows_of_records(manifest: StoreManifest, data: DataSection, *, where: str) -> None:
    """Raises DataError where records would be cut into windows."""
    if manifest.flagged and data.packing == "stream":
        raise DataError(
            f"data.packing is stream, and {where} holds {manifest.recipe.records.format}, of which each is learned on "  # pyright: ignore[reportOptionalMemberAccess]
            "its own: set data.packing to documents"
        )


def num_labels(rows: Rows, seq_len: int) -> int:
    """Of all rows that `open_rows` gave: each position of a stream's, and of packed ones all but what fills them up."""
    return rows.index.filled if isinstance(rows, PackedRows | PairRows) else len(rows) * seq_len


def packable(store: OpenStore, *homes: str) -> Packable:
    """homes: the folder or URL of the store, which nodes may have copies of; others where its index may lie."""
    homes = homes or (store.place,)
    return Packable(
        stream=store.train_stream(),
        end_of_document=store.manifest.end_of_document_id,
        identity=store.manifest.identity,
        place=homes[0],
        copy=store.path if isinstance(store, DocumentStore) else None,
        homes=homes,
        flagged=store.manifest.flagged,
        together=store.manifest.documents_per_record,
    )
