"""Two flags in the top bits of a stored token, in stores of records: the first of its document, and not a label.

So one stream of tokens says what is to be learned: order, shuffle, mixtures, streaming and checksums see tokens only.
"""

from typing import Any

import numpy as np

NUM_FLAGS = 2


def flagged(tokens: np.ndarray, labels: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """One document as it is stored. tokens: of any integers, [n], n ≥ 1. labels: bool [n].

    The first token is context alone, whatever `labels` says: nothing comes before it.
    """
    assert len(tokens) == len(labels) >= 1
    first, masked = _bits(dtype)
    stored = tokens.astype(dtype)
    stored[~labels] |= masked
    stored[0] |= first | masked
    return stored


def begins_document(stored: np.ndarray) -> np.ndarray:
    """bool, of the shape of what is given."""
    return (stored & _bits(stored.dtype)[0]) != 0


def is_label(stored: np.ndarray) -> np.ndarray:
    """bool, of the shape of what is given."""
    return (stored & _bits(stored.dtype)[1]) == 0


def token_ids(stored: np.ndarray) -> np.ndarray:
    """The tokens without their flags, of the same type."""
    first, masked = _bits(stored.dtype)
    return stored & ~(first | masked)


def _bits(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    top = 8 * dtype.itemsize - 1
    return dtype.type(1 << top), dtype.type(1 << top - 1)
