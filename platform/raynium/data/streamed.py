"""Tokens of a store that is not on this machine: what is read is fetched, verified and kept in the node's cache.

A request takes the bytes of one stretch of tokens, widened to whole units, since a unit has one checksum. A shard's
checksums are fetched when something of it is first needed, and prove themselves by the manifest.
"""

import threading
from bisect import bisect_right
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raynium.data.manifest import ShardFiles, StoredFile, StoreManifest
from raynium.data.remote import find_manifest
from raynium.data.store import OpenStore, no_store, refuse_other_data
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import FileChecksums
from raynium.storage.range_cache import CachedRange, NoRoom, RangeCache
from raynium.storage.store import Store
from raynium.storage.verify import wrong_units

# What is read without having been held comes in pieces of this size: held-out documents, one after the other.
PIECE_BYTES = 4 * 2**20
# Pieces of one long read, such as packing has, that are fetched at once: they hide S3's latency.
PIECES_AT_ONCE = 8
# Shards whose checksums are kept in memory, of 8 bytes per 256 KiB.
SHARDS_KNOWN = 1024
# For other ranks to let go of what they read; they may be in a long evaluation.
NO_ROOM_SECONDS = 600.0


class Traffic:
    """What this process has fetched so far. Threads share it."""

    def __init__(self) -> None:
        self.requests = 0
        self.fetched_bytes = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """One request."""
        with self._lock:
            self.requests += 1
            self.fetched_bytes += num_bytes


class RemoteFiles:
    """The files of one store at a URL, as verified ranges. Threads may share it."""

    def __init__(self, store: Store, *, unit_bytes: int, cache: RangeCache, traffic: Traffic):
        self.store, self.unit_bytes, self.cache, self.traffic = store, unit_bytes, cache, traffic
        self._known = lru_cache(SHARDS_KNOWN)(self._fetch_checksums)
        # Of each shard: threads that come at once must not all fetch them.
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def read(self, file: StoredFile) -> bytes:
        """All of a small file."""
        content = memoryview(bytearray(file.size_bytes))
        if file.size_bytes:
            self._fill(file, 0, content)
        return bytes(content)

    def widened(self, file: StoredFile, begin: int, end: int) -> tuple[int, int]:
        """The bytes that are fetched for bytes [begin, end) of a file."""
        unit = self.unit_bytes
        return begin // unit * unit, min(-(-end // unit) * unit, file.size_bytes)

    def cached(self, file: StoredFile, begin: int, end: int) -> CachedRange:
        """begin, end: from `widened`. Its name in the cache says what it holds, not where it came from."""

        def is_right(content: memoryview) -> bool:
            return not wrong_units(content, self._checksums(file), self._units(begin, end))

        return CachedRange(
            key=f"{file.crc:016x}-{file.size_bytes}-{begin}-{end}",
            num_bytes=end - begin,
            fill=lambda content: self._fill(file, begin, content),
            is_right=is_right,
        )

    def _checksums(self, file: StoredFile) -> FileChecksums:
        with self._locks[file.name]:
            return self._known(file)

    def _units(self, begin: int, end: int) -> range:
        return range(begin // self.unit_bytes, -(-end // self.unit_bytes))

    def _fill(self, file: StoredFile, begin: int, content: memoryview) -> None:
        end = begin + len(content)
        expected, where = self._checksums(file), f"bytes {begin:,} to {end:,} of {self.store.uri(file.name)}"
        self._request(file.name, where, begin, content)
        if wrong := wrong_units(content, expected, self._units(begin, end)):
            first = wrong[0] * self.unit_bytes
            raise DataError(
                f"{self.store.uri(file.name)} is damaged in unit {wrong[0]}, bytes {first:,} to "
                f"{first + expected.unit_length(wrong[0]):,} (wrong CRC64NVME), so it is not used. `raynium data "
                f"verify {self.store.url}` finds all damage; build or upload the store again"
            )

    def _request(self, name: str, where: str, begin: int, content: memoryview) -> None:
        try:
            self.store.read_into(name, begin, content)
        except KeyMissing as error:
            raise DataError(
                f"{where}: there is no such file, so the store is damaged; build or upload it again"
            ) from error
        except StoreError as error:
            raise StoreError(f"{where} cannot be read: {error}") from error
        self.traffic.add(len(content))

    def _fetch_checksums(self, file: StoredFile) -> FileChecksums:
        content = bytearray(8 * -(-file.size_bytes // self.unit_bytes))
        if content:
            self._request(file.units_name, self.store.uri(file.units_name), 0, memoryview(content))
        return file.units(bytes(content), self.unit_bytes, where=self.store.url)


class _Window(NamedTuple):
    """Tokens [begin, end) of the stream, held in the cache."""

    begin: int
    end: int
    tokens: np.ndarray


class StreamedTokens:
    """The tokens of remote shards, one after the other, as `tokens.TokenStream` has those of local ones.

    What is held is read without a request. `fetch` and `num_bytes` may be called by any thread, the rest by one.
    """

    def __init__(self, files: RemoteFiles, shards: ShardFiles, dtype: np.dtype[Any]):
        self.dtype = dtype
        self._files, self._shards = files, shards
        self._begins = [0, *accumulate(shards.tokens)]
        # By where they begin. Those of packed rows overlap, and several may be the same.
        self._windows: list[_Window] = []
        self._window_begins = np.empty(0, np.int64)
        # Of each window and those before it, which one reaches furthest.
        self._furthest: list[int] = []
        self._last_piece: _Window | None = None

    def __len__(self) -> int:
        return self._begins[-1]

    def num_bytes(self, begin: int, end: int) -> int:
        """That lie in the cache while tokens [begin, end) do."""
        return sum(last - first for _, first, last in self._ranges(begin, end))

    def fetch(self, begin: int, end: int) -> None:
        """Have tokens [begin, end) in the cache, if there is room. Raises DataError or StoreError."""
        for shard, first, last in self._ranges(begin, end):
            try:
                self._files.cache.hold(self._files.cached(shard, first, last))
            except NoRoom:
                # Whoever needs it waits for room; what is only wanted soon does not.
                return

    def hold(self, begin: int, end: int) -> None:
        """Keep tokens [begin, end) at hand, fetched if they are not in the cache, until `let_go`."""
        self._windows.append(self._held(begin, end))
        self._sort()

    def let_go(self, begin: int, end: int) -> None:
        """Of what `hold` was given, one. It goes first when the cache needs room."""
        del self._windows[[each[:2] for each in self._windows].index((begin, end))]
        self._sort()
        self._used_up(begin, end)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length); fetched where they are not held. Raises DataError or StoreError."""
        assert 0 <= start < start + length <= len(self)
        index = int(np.searchsorted(self._window_begins, start, side="right")) - 1
        if index >= 0 and start + length <= (window := self._windows[self._furthest[index]]).end:
            return window.tokens[start - window.begin : start - window.begin + length]
        if len(spans := self._piece_spans(start, start + length)) > 1:
            with ThreadPoolExecutor(PIECES_AT_ONCE, thread_name_prefix="data-pieces") as pool:
                list(pool.map(self.fetch, *zip(*spans, strict=True)))
        pieces: list[np.ndarray] = []
        while length:
            window = self._piece(start)
            pieces.append(window.tokens[start - window.begin :][:length])
            start, length = start + len(pieces[-1]), length - len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[rows, length]: row r holds tokens [starts[r], starts[r] + length), as `read` has them."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        # Which window each is in, for all in one call; `read` takes a while to find one.
        indices = np.searchsorted(self._window_begins, starts, side="right") - 1
        for row, (start, index) in enumerate(zip(starts.tolist(), indices.tolist(), strict=True)):
            begin, end, tokens = self._windows[self._furthest[index]] if index >= 0 else (0, 0, rows)
            if start + length <= end:
                rows[row] = tokens[start - begin : start - begin + length]
            else:
                rows[row] = self.read(start, length)
        return rows

    def _used_up(self, begin: int, end: int) -> None:
        for shard, first, last in self._ranges(begin, end):
            self._files.cache.used_up(self._files.cached(shard, first, last).key)

    def _piece_spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of single shards that these tokens are fetched in."""
        most, spans = PIECE_BYTES // self.dtype.itemsize, list[tuple[int, int]]()
        while start < stop:
            index = bisect_right(self._begins, start) - 1
            begin = self._begins[index] + (start - self._begins[index]) // most * most
            start = min(begin + most, self._begins[index + 1])
            spans.append((begin, start))
        return spans

    def _piece(self, start: int) -> _Window:
        """The stretch with this token."""
        last = self._last_piece
        if last is None or not last.begin <= start < last.end:
            # Before the next one comes, so that two are never held.
            self._last_piece = None
            if last is not None:
                self._used_up(last.begin, last.end)
            self._last_piece = last = self._held(*self._piece_spans(start, start + 1)[0])
        return last

    def _held(self, begin: int, end: int) -> _Window:
        parts = []
        for (shard, first, last), (_, exact_first, exact_last) in zip(
            self._ranges(begin, end), self._exact(begin, end), strict=True
        ):
            view = self._files.cache.hold(self._files.cached(shard, first, last), wait_seconds=NO_ROOM_SECONDS)
            parts.append(np.frombuffer(view[exact_first - first : exact_last - first], self.dtype))
        return _Window(begin, end, parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _ranges(self, begin: int, end: int) -> list[tuple[StoredFile, int, int]]:
        """(shard, first byte, last byte + 1) of whole units."""
        return [(shard, *self._files.widened(shard, *exact)) for shard, *exact in self._exact(begin, end)]

    def _exact(self, begin: int, end: int) -> list[tuple[StoredFile, int, int]]:
        """The same, of these tokens alone."""
        found = []
        index = bisect_right(self._begins, begin) - 1
        while begin < end:
            until = min(end, self._begins[index + 1])
            first, last = begin - self._begins[index], until - self._begins[index]
            found.append((self._shards[index], first * self.dtype.itemsize, last * self.dtype.itemsize))
            index, begin = index + 1, until
        return found

    def _sort(self) -> None:
        self._windows.sort(key=lambda window: window.begin)
        self._window_begins = np.array([window.begin for window in self._windows], np.int64)
        ends = [window.end for window in self._windows]
        self._furthest = list(accumulate(range(len(ends)), lambda best, new: new if ends[new] > ends[best] else best))


class StreamedStore(OpenStore):
    """A store at a URL that is read where it lies; `open_streamed` opens one. Its streams are one each, so that rows
    read what was held of them. traffic: of training tokens.
    """

    def __init__(self, store: Store, manifest: StoreManifest, cache: RangeCache):
        self.manifest, self.traffic = manifest, Traffic()
        self._files = RemoteFiles(store, unit_bytes=manifest.unit_bytes, cache=cache, traffic=Traffic())
        self._train_files = RemoteFiles(store, unit_bytes=manifest.unit_bytes, cache=cache, traffic=self.traffic)

    @property
    def place(self) -> str:
        return self._files.store.url

    def train_stream(self) -> StreamedTokens:
        return self._train

    def heldout_stream(self) -> StreamedTokens:
        return self._heldout

    def read_file(self, name: str) -> bytes:
        return self._files.read(self.manifest.small_file(name))

    @cached_property
    def _train(self) -> StreamedTokens:
        return StreamedTokens(self._train_files, self.manifest.train_shards, self.manifest.numpy_dtype)

    @cached_property
    def _heldout(self) -> StreamedTokens:
        return StreamedTokens(self._files, self.manifest.heldout_shards, self.manifest.numpy_dtype)


def open_streamed(path: str | Path, cache: RangeCache, *, identity: str | None = None) -> StreamedStore:
    """Of a store at a URL, or in a folder that is far away (NFS). identity: that it must have.

    Raises DataError if there is no store, another one, or of another format, or if it cannot be read.
    """
    manifest = find_manifest(path)
    if manifest is None:
        raise no_store(path)
    refuse_other_data(manifest, identity, where=str(path))
    return StreamedStore(Store(path), manifest, cache)
