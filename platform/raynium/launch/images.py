"""Where snapshot images live: memory of the node that outlives a rank, and ends with its agent."""

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from raynium.launch.process import pid_started

logger = logging.getLogger(__name__)


def shared_memory_folder() -> Path:
    """Memory that files can live in. Where there is none (not Linux) the temporary folder stands in."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else Path(tempfile.gettempdir())


def make_image_folder(run_name: str, parent: Path | None = None) -> Path:
    """A folder of this process's own; those that killed agents of this user left behind are removed first.

    Nobody else would: an agent that was killed leaves gigabytes of memory that no process owns.
    """
    parent = parent or shared_memory_folder()
    for folder in parent.glob(f"raynium-{os.getuid()}-*"):
        owner = re.fullmatch(r"raynium-\d+-(\d+)-(\d+)-.*", folder.name)
        if owner is not None and pid_started(int(owner[1])) != owner[2]:
            logger.info("removing %s, left by a killed node agent", folder)
            shutil.rmtree(folder, ignore_errors=True)  # two agents may start at once, and either may remove it
    mine = parent / f"raynium-{os.getuid()}-{os.getpid()}-{pid_started(os.getpid())}-{run_name}"
    mine.mkdir(mode=0o700)
    return mine
