"""The snapshots that an agent's ranks keep in memory, seen from outside."""

import contextlib
from pathlib import Path

from raynium.storage.own_folder import shared_memory_folder


def held_images(pid: int) -> list[Path]:
    """Files in the folders of shared memory whose lock that process holds."""
    opened = set()
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        # It may be closed by the time that it is read.
        with contextlib.suppress(FileNotFoundError):
            opened.add(descriptor.readlink())
    return sorted(
        file for folder in opened if folder.parent == shared_memory_folder() for file in folder.glob("rank-*")
    )
