"""The folder of this machine's disk that runs use for what need not outlive it: metric spools, data caches, logs."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from raynium.errors import StoreError


def scratch_folder(parent: str | None = None) -> Path:
    """`<temporary folder>/raynium-<uid>`, the same on every node. Raises StoreError if others may write it."""
    folder = Path(parent or tempfile.gettempdir(), f"raynium-{os.getuid()}")
    remedy = "Remove it, or set TMPDIR to a folder of yours"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}. {remedy}") from error
    # Anybody may make folders and links in /tmp; what a stranger can write or point elsewhere we do not use.
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise StoreError(
            f"{folder} must be a folder of user {os.getuid()} that nobody else may write; it has owner {found.st_uid} "
            f"and mode {stat.filemode(found.st_mode)}. {remedy}"
        )
    return folder


def log_folder(run_url: str) -> Path:
    """Where a run's driver and node agents write their logs on this machine."""
    name = run_url.rstrip("/").rpartition("/")[2]
    return scratch_folder() / "logs" / f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:8]}"
