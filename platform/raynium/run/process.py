"""Telling one process from another on this machine, also from a later one that got its pid. Standard library only."""

import os
import platform


def boot_id() -> str:
    """Differs after each boot, so that a pid of an earlier one is nobody's."""
    if platform.system() != "Linux":
        return ""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def pid_started(pid: int) -> str:
    """The process's start time in clock ticks since boot; empty when there is no such process."""
    if platform.system() != "Linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        return str(pid)
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The second field is the name in brackets and may hold spaces; the start time is the 22nd.
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""
