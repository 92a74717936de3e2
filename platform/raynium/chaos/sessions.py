"""Ray nodes as processes of this machine: each leads a session, in which everything is that it starts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from raynium.errors import LaunchError

# What `ray start --block` says once the node is there.
STARTED = b"will now block"
# A node that was killed is gone sooner.
KILLED_SECONDS = 30.0
POLL_SECONDS = 0.05
# Ray gives a node 30 s to start, which on a busy machine is too little: such a try is made again, for as long as the
# caller waits. Others are made so often, since nodes that start at once wait for each other.
TRIES = 3
TIMED_OUT = b"timed out during startup"


def start_ray(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, *, seconds: float = 600.0
) -> "subprocess.Popen[bytes]":
    """`ray start --block` with these, until the node is there. Raises LaunchError if it does not come.

    environment: all of it. log: its output is appended here.
    """
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
    deadline, failed = time.monotonic() + seconds, 0
    while failed < TRIES and time.monotonic() < deadline:
        with log.open("ab") as output:
            before = output.tell()
            node = subprocess.Popen(
                command, env=dict(environment), stdout=output, stderr=output, start_new_session=True
            )
        while node.poll() is None and time.monotonic() < deadline:
            if STARTED in log.read_bytes()[before:]:
                return node
            time.sleep(POLL_SECONDS)
        kill_started([node])
        failed += TIMED_OUT not in log.read_bytes()[before:]
    said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise LaunchError(f"`{' '.join(command)}` did not start a Ray node. It said:\n{said}")


def kill_sessions(leaders: Iterable[int]) -> None:
    """SIGKILL to all that lives in these sessions. Ray's own end takes half a minute, and there is nothing to keep."""
    waiting = list(leaders)
    deadline = time.monotonic() + KILLED_SECONDS
    while waiting := [leader for leader in waiting if pids_of_session(leader)]:
        if time.monotonic() >= deadline:
            raise LaunchError(f"sessions {waiting} do not end, {KILLED_SECONDS:g} s after SIGKILL: see `ps -s`")
        signal_sessions(waiting, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def kill_started(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """`kill_sessions` for processes that this one started; returns when they are gone."""
    started = list(processes)
    kill_sessions(process.pid for process in started)
    for process in started:
        process.wait()


def signal_sessions(leaders: Iterable[int], number: signal.Signals) -> None:
    for pid in [pid for leader in leaders for pid in pids_of_session(leader)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def pids_of_session(leader: int) -> list[int]:
    """The living processes of a session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = stat.read_text(encoding="utf-8", errors="replace")
            state, _parent, _group, session = text.rpartition(")")[2].split()[:4]
            if state != "Z" and int(session) == leader:
                found.append(int(stat.parent.name))
    return found
