"""Files that are whole or absent, whatever dies while they are written: locks, atomic writes, checksums."""

import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from awscrt.checksums import crc64nvme

logger = logging.getLogger(__name__)

READ_BYTES = 2**24


@contextmanager
def exclusive(lock_path: Path, what: str) -> Iterator[None]:
    """Hold the lock for the block; waits for other threads, processes, and nodes on a shared file system.

    The kernel lets go of it when the holder dies, so a lock is never stale; the empty file stays.
    """
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as file:
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


def checksum(path: Path) -> str:
    """CRC64NVME of the file, 16 hex digits.

    Against damage, not forgery. Not sha256, because S3 stores this very checksum for each object (so a store there can
    be checked without reading it) and it runs at memory speed: 27 GiB/s against 1.7.
    """
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            crc = crc64nvme(piece, crc)
    return f"{crc:016x}"


def mapped(file: BinaryIO, size: int) -> memoryview:
    """The file's bytes without a copy, for as long as the view or a slice of it is referred to."""
    return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
