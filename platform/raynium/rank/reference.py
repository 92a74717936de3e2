"""The log-probabilities that the weights a run begins with give each row: DPO's reference, computed once and kept.

They lie beside the document store, `reference/<key>/<subset>-<first row>-<end>.bin`, and where that cannot be written,
in the run's own store. The key is of all that they depend on, so a file is never another model's or another text's. A
file is a line of JSON that says the same, and float32 values. All data ranks share the pass, which goes on behind the
files that are there.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.base import Engine
from raynium.errors import StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import checksum, to_text
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

REFERENCE_FOLDER = "reference"
# Of one file: a pass that is broken off computes fewer again.
ROWS_PER_FILE = 2**14
_DTYPE = np.dtype("<f4")


class RowsToRefer(Protocol):
    """Rows that a reference is wanted of."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """rows: int64 [n]. "tokens" and "labels", any integers, [n, T]."""
        ...


class ReferencePass:
    """Finds the references of rows, or computes them. Every rank calls the same methods in the same order."""

    def __init__(
        self,
        engine: Engine,
        *,
        known_by: Mapping[str, Any],
        run_store: Store,
        batch_size: int,
        begin: Callable[[], None],
        tell: Callable[[int, int], None],
    ):
        """known_by: what the weights are, and how they compute, as JSON has it. batch_size: rows of an engine's call.

        begin: gives the engine those weights; it is called before the first batch, if there is one. tell: is given the
        rows done and in all, before each batch.
        """
        self._engine, self._known_by, self._run_store = engine, dict(known_by), run_store
        self._batch_size, self._begin, self._tell = batch_size, begin, tell
        self.computed = False

    def of(self, rows: RowsToRefer, *, store_url: str, **known_by: Any) -> np.ndarray:
        """float32, of each row the sum over its labels; the same on all ranks. known_by: what the rows are.

        store_url: of the document store. Raises StoreError if a file can be written in neither place.
        """
        number = len(rows)
        known = self._known_by | known_by | {"rows": number}
        key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
        places = [Store(store_url), self._run_store]
        found = [np.empty(0, np.float32)]
        for first in range(0, number, ROWS_PER_FILE):
            end = min(first + ROWS_PER_FILE, number)
            name = f"{REFERENCE_FOLDER}/{key}/{first:012d}-{end:012d}.bin"
            header = known | {"first": first, "end": end}
            part = self._shared(_read(places, name, header) if self._engine.data_rank == 0 else None, end - first)
            if part is None:
                part = self._compute(rows, first, end)
                if os.environ["RANK"] == "0":
                    _write(places, name, header, part)
            found.append(part)
        return np.concatenate(found)

    def _shared(self, part: np.ndarray | None, number: int) -> np.ndarray | None:
        """What data rank 0 has read, on all ranks."""
        mine = torch.zeros(number + 1)
        if part is not None:
            mine[:-1], mine[-1] = torch.from_numpy(part), 1
        *values, there = self._engine.sum_over_ranks(mine).split([number, 1])
        return values[0].numpy() if there.item() else None

    def _compute(self, rows: RowsToRefer, first: int, end: int) -> np.ndarray:
        if not self.computed:
            self._begin()
            self.computed = True
        engine, batch_size = self._engine, self._batch_size
        values = torch.zeros(end - first)
        for begin in range(first, end, batch_size * engine.data_size):
            self._tell(begin, len(rows))
            mine = np.arange(batch_size) + begin + engine.data_rank * batch_size
            taken = mine[mine < end]
            rows_B = engine.row_log_probs(_batch(rows.read(np.minimum(mine, end - 1)), counted=len(taken)))
            values[taken - first] = rows_B[: len(taken)]
        return engine.sum_over_ranks(values).numpy()


def _batch(columns: Mapping[str, np.ndarray], *, counted: int) -> Batch:
    """With a reference of zeros, since a task's batches have that column. counted: rows at the beginning that do."""
    tokens_BT, labels_BT = (torch.from_numpy(columns[name].astype(np.int64)) for name in ("tokens", "labels"))
    labels_BT[counted:] = IGNORED_LABEL
    return Batch(tokens_BT, labels_BT, {"reference": torch.zeros(len(labels_BT))})


def _content(header: Mapping[str, Any], values: bytes) -> bytes:
    line = json.dumps(dict(header) | {"crc64nvme": to_text(checksum(values))}, sort_keys=True)
    return line.encode() + b"\n" + values


def _read(places: list[Store], name: str, header: Mapping[str, Any]) -> np.ndarray | None:
    """None where no place has a whole one."""
    for place in places:
        try:
            content = place.read(name)
        except KeyMissing:
            continue
        except StoreError as error:
            logger.warning("no reference can be read from %s: %s", place.url, error)
            continue
        values = content.partition(b"\n")[2]
        if content == _content(header, values) and len(values) == _DTYPE.itemsize * (header["end"] - header["first"]):
            return np.frombuffer(values, _DTYPE).astype(np.float32)
        logger.warning("%s is damaged, so it is not used: the reference is computed again", place.uri(name))
    return None


def _write(places: list[Store], name: str, header: Mapping[str, Any], values: np.ndarray) -> None:
    """Raises the StoreError of the last place, if none can be written."""
    content = _content(header, values.astype(_DTYPE).tobytes())
    for place in places:
        try:
            return place.replace(name, content)
        except StoreError as error:
            if place is places[-1]:
                raise
            logger.warning("the reference is kept with the run: %s", error)
