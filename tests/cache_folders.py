"""What a node's cache of ranges takes up at one moment, while others fetch into it."""

import contextlib
import fcntl
import os
from pathlib import Path


def bytes_in_cache(folder: Path) -> int:
    """Of its files, with those that are being written. Nothing is made or removed while they are counted."""
    total = 0
    with (folder / ".room").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total
