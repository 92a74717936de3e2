"""Runs without Ray and without the seconds in which torchrun and each of its ranks load torch anew."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from raynium.rank.ports import free_port


class Ended(NamedTuple):
    returncode: int
    log: str


def standalone(
    job: Path,
    *overrides: str,
    ranks: int = 2,
    more_environment: Mapping[str, str] = {},
    kill_once: Path | None = None,
) -> Ended:
    """What `torchrun --nproc-per-node RANKS -m raynium.standalone JOB OVERRIDES…` comes to.

    kill_once: all ranks are killed as soon as this path exists.
    """
    environment = {
        **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
    }
    with tempfile.NamedTemporaryFile() as log:
        asked = {
            "log": log.name,
            "folder": os.getcwd(),
            "environment": os.environ | more_environment | environment,
            "arguments": [str(job), *overrides],
            "kill_once": kill_once and str(kill_once),
        }
        forker = _forker()
        assert forker.stdin is not None and forker.stdout is not None
        try:
            forker.stdin.write(json.dumps(asked) + "\n")
            forker.stdin.flush()
            status = int(forker.stdout.readline())
        except BaseException:
            # A test that is out of time leaves no ranks behind to the next one.
            os.killpg(forker.pid, signal.SIGKILL)
            _forker.cache_clear()
            raise
        return Ended(status, Path(log.name).read_text())


def trained(job: Path, *overrides: str, ranks: int = 2, more_environment: Mapping[str, str] = {}) -> str:
    """The log of ranks that have ended well."""
    ended = standalone(job, *overrides, ranks=ranks, more_environment=more_environment)
    assert ended.returncode == 0, ended.log
    return ended.log


@cache
def _forker() -> "subprocess.Popen[str]":
    """`_standalone_ranks.py`, for as long as this process lives."""
    program = Path(__file__).with_name("_standalone_ranks.py")
    forker = subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Leaving closes its stdin, which ends it.
    atexit.register(forker.__exit__, None, None, None)
    return forker
