"""Ends Ray nodes that a test started, each the leader of a session of its own (`start_new_session=True`)."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path


def kill_sessions(leaders: Iterable[int]) -> None:
    """SIGKILL to all that lives in these sessions. Ray's own end takes half a minute, and there is nothing to keep."""
    waiting = list(leaders)
    deadline = time.monotonic() + 30
    while waiting := [leader for leader in waiting if pids_of_session(leader)]:
        assert time.monotonic() < deadline, f"sessions {waiting} do not end"
        for pid in [pid for leader in waiting for pid in pids_of_session(leader)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def kill_started(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """`kill_sessions` for processes that this one started; returns when they are gone."""
    started = list(processes)
    kill_sessions(process.pid for process in started)
    for process in started:
        process.wait()


def pids_of_session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _parent, _group, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and int(session) == leader:
                found.append(int(stat.parent.name))
    return found
