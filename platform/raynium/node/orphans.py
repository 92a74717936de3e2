"""What ranks have started and a killed agent has left behind: compilers, which run for hours with gigabytes and locks.

The ranks die with their agent, by the kernel's hand; what they started does not. So every process that a rank starts
carries the agent's mark in its environment, and whoever comes next to this node ends those whose agent is dead.
"""

import contextlib
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from raynium.storage.process import pid_namespace, pid_started

logger = logging.getLogger(__name__)

# "<pid namespace>/<pid>/<start time>" of the agent. A container's pids mean nothing outside of it, so what carries
# another namespace than ours is left alone.
AGENT_VARIABLE = "RAYNIUM_AGENT"
# Within these the kernel has ended a rank whose agent is dead.
LEADER_SECONDS = 10.0


def agent_mark() -> dict[str, str]:
    """The variable for ranks of this process."""
    pid = os.getpid()
    return {AGENT_VARIABLE: f"{pid_namespace()}/{pid}/{pid_started(pid)}"}


def end_orphans() -> list[str]:
    """Kills the processes on this node whose mark names a dead agent, and their groups; a line for each of them.

    Sees those whose environment this user may read. Linux only: elsewhere nothing is found.
    """
    if platform.system() != "Linux":
        return []
    ended: dict[int, str] = {}
    # Again, since one that dies may just have started another. One that is slow to die is not waited for.
    while found := {pid: command for pid, command in _orphans() if pid not in ended}:
        for pid, command in found.items():
            ended[pid] = f"process {pid} ({command}) was left behind by a node agent that is dead, and is killed"
            logger.warning(ended[pid])
            _kill(pid, orphans=found)
    return list(ended.values())


def _kill(pid: int, *, orphans: dict[int, str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        group = os.getpgid(pid)
        # A rank leads the group of all that it started, and dies with its agent. A leader that lives on is somebody
        # else, and not ours to kill.
        deadline = time.monotonic() + LEADER_SECONDS
        while not (is_ours := group in orphans or not pid_started(group)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if is_ours:
            os.killpg(group, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _orphans() -> Iterator[tuple[int, str]]:
    """(pid, command line) of each that has not ended, and is no other user's."""
    namespace = pid_namespace()
    wanted = f"{AGENT_VARIABLE}={namespace}/".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            if wanted not in environment or not pid_started(int(folder.name)):
                continue
            mark = next(each for each in environment.split(b"\0") if each.startswith(wanted))
            agent, started = mark.removeprefix(wanted).decode().split("/")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if pid_started(int(agent)) != started:
            yield int(folder.name), command[:80]
