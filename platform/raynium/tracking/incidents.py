"""What went wrong in a run, and what it cost: one record for each fault. Pure; clocks are handed in."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

# Of what failed: ranks (of themselves, or since a peer did), node agents, the coordinator, Ray Train's controller, the
# driver; a checkpoint that could not be saved; a step that was not learned from; the run itself, which has ended; what
# is beside training: a process that uploads, MLflow.
What = Literal[
    "ranks",
    "agents",
    "coordinator",
    "controller",
    "driver",
    "checkpoint",
    "step",
    "node",
    "run",
    "uploader",
    "mlflow",
]

# Of the newest, in the run record; and at once on the page and in `raynium status`.
KEPT = 200
SHOWN = 8


@dataclass(frozen=True)
class Incident:
    """One fault of a run.

    key: it has it in every process that tells of it. unix: when it was seen. where: hosts, "" if it was on none. step:
    the farthest that the run had come. seconds: until the next step was done; None while that is not. steps:
    that had to be taken again.
    """

    key: str
    unix: float
    what: What
    where: str
    cause: str
    step: int
    seconds: float | None = None
    steps: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Incidents:
    """Of one process that sees them, in the order in which they were seen."""

    def __init__(self, life: str, *, unix: Callable[[], float], steady: Callable[[], float]):
        """life: a name that no other process has. unix, steady: clocks."""
        self._life, self._unix, self._steady = life, unix, steady
        self._number = 0
        self._seen: dict[str, Incident] = {}
        # Those that the run has not recovered from → since when, less what they lasted before; how far the run had
        # come; and the steps that had to be taken again before.
        self._open: dict[str, tuple[float, int, int]] = {}

    def opens(self, what: What, *, where: str, cause: str, step: int, key: str | None = None) -> None:
        """The run does not get on. key: of one that may have been seen before, and lasts again; None: it is a new one.

        What it cost is the sum then, and the cause the one that is given now.
        """
        if key is None:
            self._number += 1
            key = f"{self._life}-{self._number}"
        now, before = self._steady(), self._seen.get(key)
        if before is None:
            self._seen[key] = Incident(key, self._unix(), what, where, cause, step)
            self._open[key] = now, step, 0
        else:
            self._seen[key] = replace(before, cause=cause, step=max(step, before.step), seconds=None)
            self._open.setdefault(key, (now - (before.seconds or 0.0), step, before.steps))
        for old in list(self._seen)[:-KEPT]:
            del self._seen[old]

    def notes(self, what: What, *, where: str, cause: str, step: int, key: str | None = None) -> None:
        """The run gets on all the same. key: as above."""
        if key in self._open:
            return
        before = self._seen.get(key or "")
        self.opens(what, where=where, cause=cause, step=step, key=key)
        key, _ = self._open.popitem()
        self._seen[key] = replace(self._seen[key], seconds=before.seconds if before is not None else 0.0)

    def began_from(self, step: int) -> None:
        """Other ranks start after this step."""
        for key, (_, came_to, before) in self._open.items():
            if (each := self._seen.get(key)) is not None:
                self._seen[key] = replace(each, steps=before + max(0, came_to - step))

    def stepped(self) -> None:
        """The ranks that follow have done a step."""
        for key, (since, *_) in self._open.items():
            if (each := self._seen.get(key)) is not None:
                self._seen[key] = replace(each, seconds=self._steady() - since)
        self._open.clear()

    def seen(self) -> tuple[Incident, ...]:
        """The newest, oldest first."""
        return tuple(self._seen.values())


def merged(known: Sequence[dict[str, Any]], news: Iterable[Incident]) -> list[dict[str, Any]]:
    """Those of the run record with what was heard since, by time, the newest KEPT of them."""
    by_key = {each["key"]: each for each in known} | {each.key: each.to_json() for each in news}
    return sorted(by_key.values(), key=lambda each: each["unix"])[-KEPT:]


def settled(known: Sequence[dict[str, Any]], *, unix: float, resume_step: int) -> list[dict[str, Any]]:
    """A step was done after `resume_step`, before which nobody who saw these lived to tell that they were over."""
    return [
        each
        if each["seconds"] is not None
        else each | {"seconds": max(0.0, unix - each["unix"]), "steps": max(0, each["step"] - resume_step)}
        for each in known
    ]


def row(incident: dict[str, Any]) -> tuple[str, str, str, str]:
    """What failed and where, why, at which step, and what it cost: of one of the run record."""
    where = f" on {incident['where']}" if incident["where"] else ""
    if (seconds := incident["seconds"]) is None:
        lost = "not over yet"
    else:
        again = f", {incident['steps']:,} step(s) again" if incident["steps"] else ""
        lost = f"{seconds:.1f} s{again}"
    return f"{incident['what']}{where}", " ".join(incident["cause"].split()), f"{incident['step']:,}", lost
