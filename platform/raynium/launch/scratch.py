"""The folder of this machine's disk that runs use for what need not outlive it: metric spools, data caches, logs."""

import hashlib
import os
import tempfile
from pathlib import Path

from raynium.errors import StoreError


def scratch_folder() -> Path:
    """`<temporary folder>/raynium-<uid>`, the same on every node. Raises StoreError if it is somebody else's."""
    folder = Path(tempfile.gettempdir(), f"raynium-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat().st_uid
    if owner != os.getuid():  # anybody may make folders in /tmp; what a stranger can write we do not use
        raise StoreError(
            f"{folder} belongs to user {owner}, not to {os.getuid()}. Remove it, or set TMPDIR to a folder of yours"
        )
    return folder


def log_folder(run_url: str) -> Path:
    """Where a run's driver and node agents write their logs on this machine."""
    name = run_url.rstrip("/").rpartition("/")[2]
    return scratch_folder() / "logs" / f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:8]}"
