"""Token ids in mapped files, as one long sequence; no token leaves here before its checksum was compared."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from raynium.errors import DataError
from raynium.storage.checksum import FileChecksums, checksum, to_text
from raynium.storage.local_files import mapped


class Shard:
    """The tokens of one file. `check` before every use: each unit's checksum is computed once in a process's life.

    Threads may share it. Two that come to a unit at once may both compute it, which does no harm.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], expected: FileChecksums):
        """expected.unit_bytes is a multiple of the dtype's size."""
        with path.open("rb") as file:
            self._bytes = mapped(file, expected.size)
        self.tokens = np.frombuffer(self._bytes, dtype)
        self._path, self._expected = path, expected
        self._unit_tokens = expected.unit_bytes // dtype.itemsize
        # A unit that was found right has a 1.
        self._seen = bytearray(len(expected.unit_crcs))
        self._all_seen = False

    def check(self, starts: Iterable[int], length: int) -> None:
        """Of tokens [start, start + length) for each start. DataError names the first unit that is damaged."""
        if self._all_seen:
            return
        seen, unit_tokens = self._seen, self._unit_tokens
        for start in starts:
            first, end = start // unit_tokens, (start + length - 1) // unit_tokens + 1
            while (unit := seen.find(0, first, end)) >= 0:
                check_unit(self._path, self._bytes, self._expected, unit)
                seen[unit] = 1
                self._all_seen = 0 not in seen


class TokenStream:
    """The tokens of shards, one after the other."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._begins = [0, *accumulate(len(shard.tokens) for shard in shards)]

    def __len__(self) -> int:
        return self._begins[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), in the shards' dtype; a view of the file unless they cross shards.

        DataError if the file is damaged there.
        """
        assert 0 <= start < start + length <= len(self)
        index = bisect_right(self._begins, start) - 1
        shard, begin = self._shards[index], start - self._begins[index]
        piece = shard.tokens[begin : begin + length]
        shard.check((begin,), len(piece))
        if len(piece) == length:
            return piece
        return np.concatenate([piece, self.read(start + len(piece), length - len(piece))])

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[rows, length] in the shards' dtype: row r holds tokens [starts[r], starts[r] + length).

        DataError if a file is damaged there.
        """
        if len(self._shards) == 1:
            # The shard seen as all its windows, [tokens - length + 1, length] over the same memory: one numpy call
            # copies every row, up to five times as fast as the loop below when rows are short.
            [shard] = self._shards
            shard.check(starts.tolist(), length)
            tokens = shard.tokens
            all_windows = np.ndarray(
                (len(tokens) - length + 1, length), tokens.dtype, buffer=tokens, strides=2 * tokens.strides
            )
            return all_windows[starts]
        rows = np.empty((len(starts), length), dtype=self._shards[0].tokens.dtype)
        for row, start in enumerate(starts.tolist()):
            rows[row] = self.read(start, length)
        return rows


def check_unit(path: Path, content: memoryview, expected: FileChecksums, unit: int) -> None:
    """DataError unless this unit of the file's content has the checksum it was built with."""
    begin = unit * expected.unit_bytes
    end = begin + expected.unit_length(unit)
    found = checksum(content[begin:end])
    if found != expected.unit_crcs[unit]:
        raise DataError(
            f"{path} is damaged in unit {unit}, bytes {begin:,} to {end:,}: CRC64NVME {to_text(found)} instead of "
            f"{to_text(expected.unit_crcs[unit])}, so it is not used. `raynium data verify {path.parent}` finds all "
            "damage; delete that folder, and build or copy the store again"
        )
