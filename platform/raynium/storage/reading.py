"""Files that others wrote, read where they lie: as a Python file that can be sought, from a disk or from S3. No torch.

    open_reading("/texts/a.parquet")
    open_reading("s3://bucket/web/a.jsonl.zst", profile="research")

Their names are as their writers liked; `Store` has rules for what we write.
"""

import io
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from raynium.config.plain_file import plain_size
from raynium.storage.backend import Backend
from raynium.storage.store import open_backend

# What is fetched at once of an object: little where nobody has said what will be read (a table's footer); of what
# `will_read` says, from a first window to the largest, each with the next one on its way. That hides S3's latency.
LONE_WINDOW_BYTES = 64 * 1024
FIRST_WINDOW_BYTES = 512 * 1024
MOST_WINDOW_BYTES = 8 * 2**20
_GROWTH = 4
# So many files are opened before they are wanted.
OPEN_AHEAD = 16


@dataclass(frozen=True)
class Found:
    """A file under a folder. name: relative to it, "/"-separated. version: as in `backend.Head`."""

    name: str
    num_bytes: int
    version: str


def list_objects(url: str, *, recursive: bool, profile: str | None = None) -> Iterator[Found]:
    """What lies under a folder in S3, of whatever name, in no order. Raises StoreError."""
    _, backend = open_backend(url, _options(profile))
    listing = backend.list("", recursive=recursive)
    return (Found(name, num_bytes, listing.versions[name]) for name, num_bytes in listing.sizes.items())


def find_object(url: str, *, profile: str | None = None) -> Found:
    """One object in S3. Raises KeyMissing, StoreError."""
    bucket, key = _bucket_and_key(url)
    head = _bucket(bucket, profile).head(key)
    return Found(key.rpartition("/")[2], head.num_bytes, head.version)


def find_file(path: Path) -> Found:
    """One file on a disk, or the linked one. Raises OSError, also if it is none."""
    return Found(path.name, plain_size(path), str(path.stat().st_mtime_ns))


def version_of(stream: "io.BufferedReader[Any]") -> str:
    """Of the file that `open_reading` opened, when it did: as in `backend.Head`."""
    raw = stream.raw
    return raw.version if isinstance(raw, _Object) else str(os.fstat(raw.fileno()).st_mtime_ns)


def open_reading(place: str, *, profile: str | None = None) -> "io.BufferedReader[io.RawIOBase]":
    """A file to read and seek: of a path, or of an s3:// URL. Close it.

    profile: of the AWS configuration (its keys, role, region and endpoint); None: what the environment says. Raises
    OSError for a path, KeyMissing and StoreError for a URL, also while it is read.
    """
    if not place.startswith("s3://"):
        return io.BufferedReader(io.FileIO(place), FIRST_WINDOW_BYTES)
    bucket, key = _bucket_and_key(place)
    return io.BufferedReader(_Object(_bucket(bucket, profile), key), LONE_WINDOW_BYTES)


def will_read(stream: "io.BufferedReader[Any]", begin: int, end: int) -> None:
    """Say that these bytes of a file will be read forward: of an object they are fetched ahead of use."""
    if isinstance(stream.raw, _Object):
        stream.raw.will_read(begin, end)


def open_each(places: Sequence[str], *, profile: str | None = None) -> "Generator[io.BufferedReader[Any], None, None]":
    """Each in its turn, as `open_reading`, and closed when the next is asked for.

    Objects in S3 are opened ahead of use, several at once: small ones cost little beside the waits for the server.
    """
    if not any(place.startswith("s3://") for place in places):
        for place in places:
            with open_reading(place) as stream:
                yield stream
        return
    coming = iter(places)
    waiting: deque[Future[io.BufferedReader[Any]]] = deque()
    pool = ThreadPoolExecutor(OPEN_AHEAD, thread_name_prefix="open-ahead")
    try:
        while True:
            for place in islice(coming, OPEN_AHEAD - len(waiting)):
                waiting.append(pool.submit(open_reading, place, profile=profile))
            if not waiting:
                return
            with waiting.popleft().result() as stream:
                yield stream
    finally:
        for future in waiting:
            future.cancel()
            future.add_done_callback(_close_opened)
        pool.shutdown(wait=False)


def _close_opened(future: "Future[io.BufferedReader[Any]]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


class _Object(io.RawIOBase):
    """One object of a bucket; its size is asked for once. Not safe to use from several threads."""

    def __init__(self, backend: Backend, key: str):
        self._backend, self._key = backend, key
        self._num_bytes, _, self.version = backend.head(key)
        self._position = 0
        self._begin, self._window = 0, memoryview(b"")
        # Of what was said to be read: the bytes, and how many the next window has.
        self._wanted, self._next_bytes = range(0), FIRST_WINDOW_BYTES
        # Its begin, its bytes, and it, on its way.
        self._ahead: tuple[int, int, Future[memoryview]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        if self._num_bytes <= FIRST_WINDOW_BYTES:
            self._window = self._fetch(0, self._num_bytes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def will_read(self, begin: int, end: int) -> None:
        self._wanted, self._next_bytes = range(begin, min(end, self._num_bytes)), FIRST_WINDOW_BYTES

    def readinto(self, buffer: "memoryview") -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self._num_bytes - self._position)]
        if not target:
            return 0
        inside = self._position - self._begin
        if not 0 <= inside < len(self._window):
            self._move_window()
            inside = 0
        some = self._window[inside : inside + len(target)]
        target[: len(some)] = some
        self._position += len(some)
        return len(some)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._window, self._ahead = memoryview(b""), None
        super().close()

    def _move_window(self) -> None:
        """To where reading stands; it stays where it is if that fails."""
        if self._position not in self._wanted:
            window = self._fetch(self._position, LONE_WINDOW_BYTES)
        else:
            if self._ahead is None or self._ahead[0] != self._position:
                self._ahead = self._start_fetch(self._position)
            begin, num_bytes, coming = self._ahead
            # The next is on its way before this one is waited for.
            self._ahead = self._start_fetch(begin + num_bytes) if begin + num_bytes in self._wanted else None
            window = coming.result()
        self._begin, self._window = self._position, window

    def _start_fetch(self, begin: int) -> tuple[int, int, "Future[memoryview]"]:
        self._pool = self._pool or ThreadPoolExecutor(2, thread_name_prefix="read-ahead")
        num_bytes = min(self._next_bytes, self._wanted.stop - begin)
        self._next_bytes = min(_GROWTH * self._next_bytes, MOST_WINDOW_BYTES)
        return begin, num_bytes, self._pool.submit(self._fetch, begin, num_bytes)

    def _fetch(self, begin: int, num_bytes: int) -> memoryview:
        window = memoryview(bytearray(min(num_bytes, self._num_bytes - begin)))
        self._backend.read_into(self._key, begin, [window])
        return window


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


# A client of S3 takes tens of milliseconds to make.
@lru_cache(maxsize=16)
def _bucket(name: str, profile: str | None) -> Backend:
    return open_backend(f"s3://{name}", _options(profile))[1]


def _options(profile: str | None) -> dict[str, str]:
    return {} if profile is None else {"profile": profile}
