"""Files that others wrote, read where they lie: as a Python file that can be sought, from a disk or from S3. No torch.

    open_reading("/texts/a.parquet")
    open_reading("s3://bucket/web/a.jsonl.zst", profile="research")

Their names are as their writers liked; `Store` has rules for what we write.
"""

import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from raynium.storage.backend import Backend
from raynium.storage.store import open_backend

# A window of a file, which doubles while reading goes on where the last one ended. The largest hides S3's latency: the
# next is fetched while one is read.
FIRST_WINDOW_BYTES = 256 * 1024
MOST_WINDOW_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Found:
    """A file under a folder. name: relative to it, "/"-separated."""

    name: str
    num_bytes: int
    modified_unix: float


def list_objects(url: str, *, recursive: bool, profile: str | None = None) -> Iterator[Found]:
    """What lies under a folder in S3, of whatever name, in no order. Raises StoreError."""
    _, backend = open_backend(url, _options(profile))
    listing = backend.list("", recursive=recursive)
    return (Found(name, num_bytes, listing.modified_unix[name]) for name, num_bytes in listing.sizes.items())


def find_object(url: str, *, profile: str | None = None) -> Found:
    """One object in S3. Raises KeyMissing, StoreError."""
    bucket, key = _bucket_and_key(url)
    return Found(key.rpartition("/")[2], _bucket(bucket, profile).size(key), 0.0)


def open_reading(place: str, *, profile: str | None = None) -> "io.BufferedReader[io.RawIOBase]":
    """A file to read and seek: of a path, or of an s3:// URL. Close it.

    profile: of the AWS configuration (its keys, role, region and endpoint); None: what the environment says. Raises
    OSError for a path, KeyMissing and StoreError for a URL, also while it is read.
    """
    if not place.startswith("s3://"):
        return io.BufferedReader(io.FileIO(place), MOST_WINDOW_BYTES // 8)
    bucket, key = _bucket_and_key(place)
    return io.BufferedReader(_Object(_bucket(bucket, profile), key), FIRST_WINDOW_BYTES)


class _Object(io.RawIOBase):
    """One object of a bucket; its size is asked for once. Not safe to use from several threads."""

    def __init__(self, backend: Backend, key: str):
        self._backend, self._key = backend, key
        self._num_bytes = backend.size(key)
        self._position = 0
        self._begin, self._window = 0, memoryview(b"")
        # Of the window after this one, which is being fetched: None until reading went on over the end of a window.
        self._ahead: Future[memoryview] | None = None
        self._ahead_begin = 0
        self._pool: ThreadPoolExecutor | None = None

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

    def readinto(self, buffer: "memoryview") -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self._num_bytes - self._position)]
        if not target:
            return 0
        inside = self._position - self._begin
        if not 0 <= inside < len(self._window):
            if len(target) > MOST_WINDOW_BYTES:
                # Straight to where it is wanted.
                self._backend.read_into(self._key, self._position, [target])
                self._position += len(target)
                return len(target)
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
        """To where reading stands."""
        goes_on = self._position == self._begin + len(self._window) and len(self._window) > 0
        num_bytes = min(2 * len(self._window), MOST_WINDOW_BYTES) if goes_on else FIRST_WINDOW_BYTES
        fetched, self._ahead = self._ahead, None
        if fetched is not None and self._ahead_begin == self._position:
            self._window = fetched.result()
        else:
            self._window = self._fetch(self._position, num_bytes)
        self._begin = self._position
        ends = self._begin + len(self._window)
        if goes_on and ends < self._num_bytes:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._ahead_begin = ends
            self._ahead = self._pool.submit(self._fetch, ends, min(2 * len(self._window), MOST_WINDOW_BYTES))

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
