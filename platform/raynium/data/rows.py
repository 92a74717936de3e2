"""A store as rows of one length: what the loader reads, whatever way text was cut or packed into them.

T: `data.seq_len`.
"""

from typing import Protocol

import numpy as np

from raynium.data.store import OpenStore
from raynium.errors import DataError


class Rows(Protocol):
    """The training rows of one store, in the order in which they lie there."""

    def __len__(self) -> int:
        """At least 1."""
        ...

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of these rows by name, each of its own memory: "tokens" and "labels", int64 [n, T], and others.

        rows: int64 [n], each in [0, len). A label of IGNORED_LABEL is not counted. The columns are the same for every
        call. DataError if the store is damaged there.
        """
        ...

    def span(self, first: int, end: int) -> tuple[int, int]:
        """(begin, end) in the training stream of all tokens that rows [first, end) are read from."""
        ...


class StreamRows:
    """Windows of T + 1 tokens of the training stream, each beginning on the last token of the one before.

    So every token but the first is a label once; fewer than T tokens at the stream's end are left out.
    """

    def __init__(self, store: OpenStore, seq_len: int):
        """Raises DataError if the training stream is shorter than one window."""
        self._stream = store.train_stream()
        self._seq_len = seq_len
        if len(self._stream) < seq_len + 1:
            raise DataError(
                f"data.seq_len = {seq_len}: document store {store.place} holds {len(self._stream)} training tokens, "
                f"and one sample takes seq_len + 1; set data.seq_len to {len(self._stream) - 1} or less, or add text"
            )

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._seq_len

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        windows = self._stream.gather(rows * self._seq_len, self._seq_len + 1)
        return {"tokens": windows[:, :-1].astype(np.int64), "labels": windows[:, 1:].astype(np.int64)}

    def span(self, first: int, end: int) -> tuple[int, int]:
        return first * self._seq_len, end * self._seq_len + 1
