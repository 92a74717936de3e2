"""A node agent's own log, which holds its ranks' output, beside Ray's: Ray's goes with its session."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from raynium.node.scratch import log_folder

# Of one run on one node: a month of progress bars must not fill the disk. The oldest file is dropped.
FILE_BYTES = 64 * 2**20
OLDER_FILES = 4


def log_to_file(run_url: str, seat: int) -> None:
    """This process's log goes to the run's folder on this node, from here on."""
    path = log_folder(run_url) / f"node-{seat:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        path, maxBytes=FILE_BYTES, backupCount=OLDER_FILES, encoding="utf-8", errors="replace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ours = logging.getLogger("raynium")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


def node_logs(run_url: str) -> list[Path]:
    """The log files of the nodes that are this machine, by node and from the oldest to the newest; [] if none is."""
    newest = sorted(log_folder(run_url).glob("node-*.log"))
    return [
        file
        for path in newest
        for file in (*(path.with_name(f"{path.name}.{age}") for age in range(OLDER_FILES, 0, -1)), path)
        if file.exists()
    ]
