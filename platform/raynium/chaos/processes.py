"""The processes of a run on this machine, found in the sessions of its driver and nodes. Linux, by /proc."""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# What a driver is started as below is a Ray actor, by the name that Ray gives its process; ranks and the uploader name
# themselves (`rank/entry.py`).
COORDINATOR, CONTROLLER = "ray::RunCoordinator", "ray::TrainController"
RANK, UPLOADER = "rank-", "uploader"


@dataclass(frozen=True)
class Process:
    """name: as `ps -o comm` shows it, 15 characters at most. command: its first words. session: pid of its leader."""

    pid: int
    parent: int
    session: int
    name: str
    command: str


@dataclass(frozen=True)
class RunProcesses:
    """Those of one run at one moment."""

    driver: int
    others: dict[int, Process]

    @classmethod
    def of(cls, driver: int, leaders: Collection[int] = ()) -> "RunProcesses":
        """driver: the leader of its session. leaders: of the sessions of a cluster's nodes, unless the driver has a
        cluster of its own.
        """
        sessions = {driver, *leaders}
        return cls(driver, {each.pid: each for each in _everybody() if each.session in sessions and each.pid != driver})

    def ranks(self) -> list[Process]:
        """By rank."""
        return sorted((each for each in self.others.values() if each.name.startswith(RANK)), key=lambda each: each.name)

    def uploaders(self) -> list[Process]:
        """None before the first upload."""
        return [each for each in self.others.values() if each.name == UPLOADER]

    def agents(self) -> list[Process]:
        """Each is the parent of the process that its ranks are forked from."""
        templates = [self.others.get(rank.parent) for rank in self.ranks()]
        pids = {template.parent for template in templates if template is not None}
        return [self.others[pid] for pid in sorted(pids) if pid in self.others]

    def coordinators(self) -> list[Process]:
        return [each for each in self.others.values() if each.command.startswith(COORDINATOR)]

    def controllers(self) -> list[Process]:
        return [each for each in self.others.values() if each.command.startswith(CONTROLLER)]


def _everybody() -> list[Process]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            head, _, fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
            state, parent, _group, session = fields.split()[:4]
            if state != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Process(int(folder.name), int(parent), int(session), head.partition("(")[2], command))
    return found
