"""Ranges of remote files in a folder of this node's disk, within a bound that all processes of the node keep together.

    <key>           a range that is whole
    <key>.partial   one that is being fetched; it has its whole size from the beginning, so that it counts
    <key>.lock      held by whoever fetches it; the others wait, so that a node fetches a range once
    .room           held while room is made and taken, and while a name changes

All locks are the kernel's, which lets go of them when their holder dies. A range that somebody reads is locked for as
long as it is mapped, and is never removed: what is counted is all that takes up space.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raynium.errors import DataError

logger = logging.getLogger(__name__)

# Between two looks whether others have let go of enough.
POLL_SECONDS = 0.02


class NoRoom(DataError):
    """All that the cache holds is being read."""


@dataclass(frozen=True)
class CachedRange:
    """What a range must be. key: names it among all of the cache, as a file's name.

    fill: puts the bytes into the view, or raises. is_right: whether these bytes, found on the disk, are the range's.
    """

    key: str
    num_bytes: int
    fill: Callable[[memoryview], None]
    is_right: Callable[[memoryview], bool]


class RangeCache:
    """Threads and processes may share it, also by several objects for one folder. Nothing is kept in memory."""

    def __init__(self, folder: str | Path, *, max_bytes: int):
        """Raises DataError if the folder cannot be made."""
        self._folder, self._max_bytes = Path(folder), max_bytes
        with self._errors():
            self._folder.mkdir(parents=True, exist_ok=True)

    def hold(self, wanted: CachedRange, *, wait_seconds: float = 0.0) -> memoryview:
        """The range's bytes, fetched if they are not here, and verified. They stay for as long as the view lives.

        wait_seconds: for others to let go of what they read, where there is no room. Raises NoRoom after that; what
        `fill` raises; DataError where the disk fails.
        """
        with self._errors():
            while True:
                if (found := self._found(wanted)) is not None:
                    return found
                with self._fetching(wanted.key):
                    # Whoever held the lock may have fetched it.
                    if not (self._folder / wanted.key).exists():
                        return self._fetched(wanted, time.monotonic() + wait_seconds)

    def used_up(self, key: str) -> None:
        """Says that this range goes first when room is needed."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._folder / key, (0, 0))

    def _found(self, wanted: CachedRange) -> memoryview | None:
        path = self._folder / wanted.key
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            with _closing(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_nlink == 0:
                    # It was removed between the two calls.
                    continue
                view = _mapped(descriptor, wanted.num_bytes)
            if view is not None and wanted.is_right(view):
                return view
            logger.warning("%s is damaged on this disk, and is fetched again", path)
            path.unlink(missing_ok=True)

    def _fetched(self, wanted: CachedRange, deadline: float) -> memoryview:
        path, partial = self._folder / wanted.key, self._folder / f"{wanted.key}.partial"
        while (writable := self._partial(partial, wanted.num_bytes)) is None:
            if time.monotonic() >= deadline:
                raise NoRoom(
                    f"data.cache_bytes = {self._max_bytes:,}: all that lies in {self._folder} is being read, and "
                    f"{wanted.num_bytes:,} bytes more are needed; set it higher, or data.shuffle_lanes or "
                    "data.shuffle_block_bytes lower"
                )
            time.sleep(POLL_SECONDS)
        view = memoryview(writable)
        try:
            wanted.fill(view)
            os.utime(partial)
            # Whoever counts what is there may not meet it under neither name.
            with _locked(self._folder / ".room"):
                partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return view.toreadonly()

    def _partial(self, path: Path, num_bytes: int) -> mmap.mmap | None:
        """A new file of this size, mapped and so locked; None if there is no room for it."""
        with _locked(self._folder / ".room"):
            if not self._has_room(num_bytes):
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            with _closing(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                try:
                    # Blocks, not a hole: what is written through a map has no other way to say that the disk is full.
                    os.posix_fallocate(descriptor, 0, num_bytes)
                    return mmap.mmap(descriptor, num_bytes)
                except BaseException:
                    path.unlink()
                    raise

    def _has_room(self, num_bytes: int) -> bool:
        """Under the room's lock: removes the oldest until so many bytes fit, as far as nobody reads them."""
        entries = []
        with os.scandir(self._folder) as listing:
            for entry in listing:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if status.st_size:
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
        over = sum(size for _, size, _ in entries) + num_bytes - self._max_bytes
        for _, size, path in sorted(entries):
            if over <= 0:
                break
            if _removed(path):
                over -= size
        return over <= 0

    @contextlib.contextmanager
    def _fetching(self, key: str) -> Iterator[None]:
        """The lock's file goes with its holder, so that few are left; whoever waited for it takes a new one."""
        path = self._folder / f"{key}.lock"
        while True:
            with _locked(path) as descriptor:
                if os.fstat(descriptor).st_nlink == 0:
                    continue
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            lower = f" or set data.cache_bytes (now {self._max_bytes:,}) lower" if error.errno == errno.ENOSPC else ""
            raise DataError(
                f"the data cache {self._folder} cannot be used: {error.strerror}; set TMPDIR on the nodes to a folder "
                f"that can be written and has room{lower}"
            ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The descriptor of the file, made if need be, under its exclusive lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with _closing(descriptor):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, num_bytes: int) -> memoryview | None:
    """None if the file has another size. The map has a descriptor of its own, and with it holds the file's lock."""
    if os.fstat(descriptor).st_size != num_bytes:
        return None
    return memoryview(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ))


def _removed(path: str) -> bool:
    """Whether nobody reads or writes the file; it is gone then."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    with _closing(descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.unlink(path)
    return True
