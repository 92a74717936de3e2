"""Files that are whole or absent, whatever dies while they are written: locks, atomic writes, checksums."""

import fcntl
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from raynium.errors import StoreError
from raynium.storage.checksum import FileChecksums, checksum_units

logger = logging.getLogger(__name__)


def look(question: Callable[[], bool]) -> bool:
    """The answer of `path.exists` and its like. StoreError where pathlib has none: this user may not look there."""
    try:
        return question()
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}; give a path that this user may look at") from error


@contextmanager
def exclusive(lock_path: Path, what: str) -> Iterator[None]:
    """Hold the lock for the block; waits for other threads, processes, and nodes on a shared file system.

    The kernel lets go of it when the holder dies, so a lock is never stale; the empty file stays.
    """
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is at it, waiting", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, also after a power cut. Call it under a lock."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksums(path: Path, unit_bytes: int) -> FileChecksums:
    """Of the file as it is now. Against damage, not forgery: S3 stores the same kind for each object."""
    with path.open("rb") as file:
        return checksum_units(mapped(file, os.fstat(file.fileno()).st_size), unit_bytes)


def mapped(file: BinaryIO, size: int) -> memoryview:
    """The file's bytes without a copy, for as long as the view or a slice of it is referred to."""
    return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
