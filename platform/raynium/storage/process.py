"""Telling one process from another on this machine, also from a later one that got its pid. Standard library only."""

import contextlib
import os
import platform
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same pid."""

    host: str
    pid_table: str
    pid: int
    pid_started: str

    def lives_here(self) -> bool | None:
        """Whether it lives, if it is of this host and can be looked at; None where only what it writes can tell."""
        with contextlib.suppress(OSError):
            if self.host == socket.gethostname() and self.pid_table == pid_table():
                return pid_started(self.pid) == self.pid_started
        return None


def this_process() -> Owner:
    return Owner(socket.gethostname(), pid_table(), os.getpid(), pid_started(os.getpid()))


def pid_table() -> str:
    """Where a pid names one process: differs after each boot, and between the containers of one machine."""
    if platform.system() != "Linux":
        return ""
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return f"{file.read().strip()} {pid_namespace()}"


def pid_namespace() -> str:
    """Of this process; a name without a slash."""
    return os.readlink("/proc/self/ns/pid") if platform.system() == "Linux" else ""


def is_halted(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process. False where nobody can say."""
    fields = _stat_if_readable(pid)
    return bool(fields) and fields[0] in ("T", "t")


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal. True where nobody can say."""
    caught = _status(pid).get("SigCgt")
    return caught is None or bool(int(caught, 16) >> (number - 1) & 1)


def where_it_waits(pid: int) -> str:
    """The process's state in words, and the kernel's function that it sleeps in: "S (sleeping), in futex_wait"."""
    state = _status(pid).get("State", "state unknown")
    try:
        with open(f"/proc/{pid}/wchan", encoding="utf-8") as file:
            place = file.read().strip()
    except OSError:
        place = ""
    return f"{state}, in {place}" if place not in ("", "0") else state


def cpu_ticks(pid: int) -> int | None:
    """Processor time that all threads of the process have used; None where nobody can say."""
    fields = _stat_if_readable(pid)
    return int(fields[11]) + int(fields[12]) if fields else None


def pid_started(pid: int) -> str:
    """The process's start time in clock ticks since boot; empty when there is no such process.

    OSError when this process may not look, or has no file descriptor left to look with: that says nothing of the other.
    """
    if platform.system() != "Linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        return str(pid)
    fields = _stat(pid)
    # One that has ended stays in the table until its parent asks how.
    return fields[19] if fields and fields[0] not in ("Z", "X") else ""


def _status(pid: int) -> dict[str, str]:
    """Fields of /proc/PID/status by their names; {} if there is none."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return {name: text.strip() for name, _, text in (line.partition(":") for line in file)}
    except (FileNotFoundError, ProcessLookupError):
        return {}


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on, since the second is a name that may hold spaces; [] if none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stat_if_readable(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return _stat(pid)
    return []
