"""Telling one process from another on this machine, also from a later one that got its pid. Standard library only."""

import os
import platform


def boot_id() -> str:
    """Differs after each boot, so that a pid of an earlier one is nobody's."""
    if platform.system() != "Linux":
        return ""
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()


def is_halted(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process. False where nobody can say."""
    fields = _stat(pid)
    return bool(fields) and fields[0] in ("T", "t")


def cpu_ticks(pid: int) -> int | None:
    """Processor time that all threads of the process have used; None where nobody can say."""
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else None


def pid_started(pid: int) -> str:
    """The process's start time in clock ticks since boot; empty when there is no such process."""
    if platform.system() != "Linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        return str(pid)
    fields = _stat(pid)
    # One that has ended stays in the table until its parent asks how.
    return fields[19] if fields and fields[0] not in ("Z", "X") else ""


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on, since the second is a name that may hold spaces; [] if none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
