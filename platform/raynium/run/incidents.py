"""What went wrong in a run, and what it cost: one record for each fault. Pure; clocks are handed in."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

# Of what failed: ranks (of themselves, or since a peer did), node agents, the coordinator, Ray Train's controller, the
# driver; a checkpoint that could not be saved.
What = Literal["ranks", "agents", "coordinator", "controller", "driver", "checkpoint"]

# Of the newest, in the run record; and at once on the page and in `raynium status`.
KEPT = 200
SHOWN = 8


@dataclass(frozen=True)
class Incident:
    """One fault of a run.

    key: it has it in every process that tells of it. unix: when it was seen. where: hosts, "" if it was on none. step:
    the farthest that the run had come. seconds: until the next step was done; None while that is not. phases: what they
    went to, where the agent saw it all. steps: that had to be taken again.
    """

    key: str
    unix: float
    what: What
    where: str
    cause: str
    step: int
    seconds: float | None = None
    steps: int = 0
    phases: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Incidents:
    """Of one process that sees them, in the order in which they were seen. now: of its steady clock."""

    def __init__(self, life: str):
        """life: a name that no other process has."""
        self._life = life
        self._number = 0
        self._seen: dict[str, Incident] = {}
        # Those that the run has not recovered from → when they were seen.
        self._open: dict[str, float] = {}

    def opens(self, what: What, *, where: str, cause: str, step: int, unix: float, now: float) -> None:
        """The run does not get on."""
        self._number += 1
        key = f"{self._life}-{self._number}"
        self._seen[key] = Incident(key, unix, what, where, cause, step)
        self._open[key] = now
        for old in list(self._seen)[:-KEPT]:
            del self._seen[old]

    def notes(self, what: What, *, where: str, cause: str, step: int, unix: float) -> None:
        """The run got on."""
        self.opens(what, where=where, cause=cause, step=step, unix=unix, now=0.0)
        key, _ = self._open.popitem()
        self._seen[key] = replace(self._seen[key], seconds=0.0)

    def began_from(self, step: int) -> None:
        """Other ranks start after this step."""
        for key in self._open:
            if (each := self._seen.get(key)) is not None:
                self._seen[key] = replace(each, steps=max(0, each.step - step))

    def stepped(self, *, now: float, phases: dict[str, float] | None = None) -> None:
        """The ranks that follow have done a step. phases: of the recovery, in seconds, from the fault that was last."""
        for key, since in self._open.items():
            if (each := self._seen.get(key)) is not None:
                self._seen[key] = replace(each, seconds=now - since)
        if self._open and phases is not None and (last := self._seen.get(list(self._open)[-1])) is not None:
            self._seen[last.key] = replace(last, phases=phases)
        self._open.clear()

    def seen(self) -> tuple[Incident, ...]:
        """The newest, oldest first."""
        return tuple(self._seen.values())


def merged(known: Sequence[dict[str, Any]], news: Iterable[Incident]) -> list[dict[str, Any]]:
    """Those of the run record with what was heard since, by time, the newest KEPT of them."""
    by_key = {each["key"]: each for each in known} | {each.key: each.to_json() for each in news}
    return sorted(by_key.values(), key=lambda each: each["unix"])[-KEPT:]
