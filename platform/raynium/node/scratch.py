"""The folder of this machine's disk that runs use for what need not outlive it: metric spools, data caches, logs."""

import hashlib
import os
import tempfile
from pathlib import Path

from raynium.config.local_folders import scratch_folder, temporary_parent
from raynium.node.orphans import end_orphans
from raynium.storage.own_folder import remove_left, shared_memory_folder

# Linux allows no longer path for a socket. The deepest of ours are Ray's, in a folder of its own.
SOCKET_PATH_BYTES = 107
_DEEPEST = f"/raynium-{os.getuid()}.ray-12345678/ray/session_2026-11-29_03-10-48_123456_1234567/sockets/plasma_store"
LIMIT = f"a path of at most {SOCKET_PATH_BYTES - len(_DEEPEST)} bytes"


def allows_sockets(folder: Path) -> bool:
    """Whether sockets below it, in folders of our own, have paths that Linux takes."""
    return len(os.fsencode(folder)) + len(_DEEPEST) <= SOCKET_PATH_BYTES


def sockets_parent() -> Path:
    """The temporary folder, or /tmp where that is too long a path for sockets, as Slurm's job folders are."""
    folder = temporary_parent()
    return folder if allows_sockets(folder) else Path("/tmp")


def clean_up() -> list[str]:
    """Ends and removes what this user's killed processes have left on this machine; a line for each."""
    folders = {tempfile.gettempdir(), "/tmp", os.environ.get("RAY_TMPDIR", "/tmp"), str(shared_memory_folder())}
    left = [each for folder in sorted(folders) for each in remove_left(Path(folder))]
    return [*end_orphans(), *(f"removed {each}" for each in left)]


def log_folder(run_url: str) -> Path:
    """Where a run's driver and node agents write their logs on this machine."""
    name = run_url.rstrip("/").rpartition("/")[2]
    return scratch_folder() / "logs" / f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:8]}"
