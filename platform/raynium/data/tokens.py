"""Token ids in mapped files, as one long sequence; no token leaves here before its checksum was compared."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raynium.data.manifest import ShardFiles, StoredFile, StoreManifest
from raynium.errors import DataError
from raynium.storage.checksum import FileChecksums, checksum, num_units, to_text
from raynium.storage.local_files import mapped

# So many rows of a shard, so short, are faster taken together than one by one.
MANY_ROWS, SHORT_TOKENS = 24, 1024


class Tokens(Protocol):
    """One long sequence of tokens. What is read was verified; DataError if it is damaged."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is read: the shards'."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), in the shards' dtype. Nobody writes into them."""
        ...

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[rows, length] in the shards' dtype: row r holds tokens [starts[r], starts[r] + length)."""
        ...


class Shard:
    """The tokens of one file. `check` before every use: each unit's checksum is computed once in a process's life.

    Nothing is opened before the first use. Threads may share it. Two that come to a unit at once may both compute it,
    which does no harm.
    """

    def __init__(self, folder: Path, file: StoredFile, dtype: np.dtype[Any], unit_bytes: int):
        """unit_bytes is a multiple of the dtype's size."""
        self.num_tokens = file.size_bytes // dtype.itemsize
        self.dtype = dtype
        self._folder, self._file, self._unit_bytes = folder, file, unit_bytes
        # No unit is left to check.
        self.all_seen = False

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.frombuffer(self._bytes, self.dtype)

    def check(self, starts: Iterable[int], length: int) -> None:
        """Of tokens [start, start + length) for each start. DataError names the first unit that is damaged."""
        if self.all_seen:
            return
        seen, unit_tokens = self._seen, self._unit_bytes // self.dtype.itemsize
        for start in starts:
            first, end = start // unit_tokens, (start + length - 1) // unit_tokens + 1
            while (unit := seen.find(0, first, end)) >= 0:
                check_unit(self._folder / self._file.name, self._bytes, self._expected, unit)
                seen[unit] = 1
                self.all_seen = 0 not in seen

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[rows, length], as `Tokens.gather`: several times as fast as one slice after the other where rows are short.

        The shard is seen as all its windows, [tokens - length + 1, length] over the same memory.
        """
        self.check(starts.tolist(), length)
        tokens = self.tokens
        windows = np.ndarray(
            (len(tokens) - length + 1, length), tokens.dtype, buffer=tokens, strides=2 * tokens.strides
        )
        return windows[starts]

    @cached_property
    def _bytes(self) -> memoryview:
        return mapped_file(self._folder, self._file)

    @cached_property
    def _expected(self) -> FileChecksums:
        return unit_checksums(self._folder, self._file, self._unit_bytes)

    @cached_property
    def _seen(self) -> bytearray:
        """A unit that was found right has a 1."""
        return bytearray(num_units(self._file.size_bytes, self._unit_bytes))


class Shards:
    """Those of one subset of a store, each made when it is first asked for: there may be 17,000."""

    def __init__(self, folder: Path, files: ShardFiles, manifest: StoreManifest):
        self.dtype = manifest.numpy_dtype
        self._folder, self._files, self._unit_bytes = folder, files, manifest.unit_bytes
        self._opened: list[Shard | None] = [None] * len(files)

    def __len__(self) -> int:
        return len(self._opened)

    def __getitem__(self, index: int) -> Shard:
        if (shard := self._opened[index]) is None:
            # Of two threads that come at once one opens it in vain, which does no harm.
            shard = self._opened[index] = Shard(self._folder, self._files[index], self.dtype, self._unit_bytes)
        return shard


def mapped_file(folder: Path, file: StoredFile) -> memoryview:
    """A file of a store, not yet verified. Raises DataError unless it is there in its right size."""
    found = None
    with suppress(FileNotFoundError), (folder / file.name).open("rb") as opened:
        if (found := os.fstat(opened.fileno()).st_size) == file.size_bytes:
            return mapped(opened, found)
    raise DataError(
        f"document store {folder} is damaged: {file.name} ({size_in_words(found, file.size_bytes)}); "
        "delete the folder and build or copy the store again"
    )


def size_in_words(found: int | None, expected: int) -> str:
    """found: None if there is no file."""
    return f"{'missing' if found is None else f'{found} bytes'}, expected {expected} bytes"


class TokenStream:
    """The tokens of shards, one after the other."""

    def __init__(self, shards: Shards, tokens: Sequence[int]):
        """tokens: in each shard."""
        self._shards = shards
        self._begins = [0, *accumulate(tokens)]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._shards.dtype

    def __len__(self) -> int:
        return self._begins[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), in the shards' dtype; a view of the file unless they cross shards.

        DataError if the file is damaged there.
        """
        assert 0 <= start < start + length <= self._begins[-1]
        index = bisect_right(self._begins, start) - 1
        shard, begin = self._shards[index], start - self._begins[index]
        if begin + length <= shard.num_tokens:
            if not shard.all_seen:
                shard.check((begin,), length)
            return shard.tokens[begin : begin + length]
        pieces: list[np.ndarray] = []
        while length:
            shard, begin = self._shards[index], start - self._begins[index]
            pieces.append(shard.tokens[begin : begin + length])
            taken = len(pieces[-1])
            shard.check((begin,), taken)
            index, start, length = index + 1, start + taken, length - taken
        return np.concatenate(pieces)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[rows, length] in the shards' dtype: row r holds tokens [starts[r], starts[r] + length).

        DataError if a file is damaged there.
        """
        if len(self._shards) == 1:
            return self._shards[0].gather(starts, length)
        indices = np.searchsorted(self._begins, starts, side="right") - 1
        rows = np.empty((len(starts), length), dtype=self.dtype)
        if length <= SHORT_TOKENS and len(starts) >= MANY_ROWS * len(self._shards):
            within = starts - np.array(self._begins)[indices]
            for index in range(len(self._shards)):
                shard = self._shards[index]
                chosen = np.flatnonzero((indices == index) & (within + length <= shard.num_tokens))
                rows[chosen] = shard.gather(within[chosen], length)
                indices[chosen] = -1
        for row, (start, index) in enumerate(zip(starts.tolist(), indices.tolist(), strict=True)):
            if index < 0:
                continue
            # As `read`, without a call for each row that lies in one shard.
            shard, begin = self._shards[index], start - self._begins[index]
            if begin + length <= shard.num_tokens:
                if not shard.all_seen:
                    shard.check((begin,), length)
                rows[row] = shard.tokens[begin : begin + length]
            else:
                rows[row] = self.read(start, length)
        return rows


def unit_checksums(folder: Path, file: StoredFile, unit_bytes: int) -> FileChecksums:
    """Of a file in a local folder. DataError if what stands beside it is missing or damaged."""
    try:
        content = (folder / file.units_name).read_bytes()
    except FileNotFoundError:
        content = b""
    return file.units(content, unit_bytes, where=str(folder))


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
