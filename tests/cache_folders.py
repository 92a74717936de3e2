"""What a node's cache of ranges takes up at one moment, while others fetch into it."""

import contextlib
import fcntl
import os
from pathlib import Path


def bytes_in_cache(folder: Path) -> int:
    """Of its files, with those that are being written. Nothing is made or removed while they are counted."""
    sizes: dict[int, int] = {}
    with (folder / ".room").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(folder):
            # One that gets its last name meanwhile may be met under both.
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())
