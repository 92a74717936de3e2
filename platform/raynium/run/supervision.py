"""Which orphaned runs a supervisor starts, and when. Pure: it is told what is seen, and the time."""

from dataclasses import dataclass
from typing import Literal

# Until a job's driver has taken its run: Ray's packages, imports, and what the run's data asks for.
FIRST_PAUSE_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 900.0
# Without a newer checkpoint. With the pauses between them, two hours.
MOST_STARTS = 12

Decision = Literal["leave", "wait", "start", "give up"]


@dataclass(frozen=True)
class Seen:
    """One run at one look.

    orphaned: see `RunRecord.is_orphaned`. has_job: one is pending or running on the supervisor's cluster.
    committed_step: of its newest checkpoint.
    """

    url: str
    orphaned: bool
    has_job: bool
    committed_step: int | None


@dataclass
class _Starts:
    """Of one run, since it had this checkpoint."""

    committed_step: int | None
    count: int = 0
    not_before: float = 0.0


class Supervision:
    """All that one supervisor remembers of its runs. Times are of its own steady clock, in seconds."""

    def __init__(self) -> None:
        self._starts: dict[str, _Starts] = {}

    def decide(self, seen: Seen, *, now: float) -> Decision:
        """start: submit it now, and tell `started`. give up: it was started too often without getting anywhere."""
        if not seen.orphaned:
            return "leave"
        starts = self._starts.get(seen.url)
        if starts is None or starts.committed_step != seen.committed_step:
            starts = self._starts[seen.url] = _Starts(seen.committed_step)
        if seen.has_job or now < starts.not_before:
            return "wait"
        if starts.count == MOST_STARTS:
            return "give up"
        return "start"

    def started(self, url: str, *, now: float) -> None:
        """A cluster took the job. One that refused it, as a head that just comes up does, is asked at the next look."""
        starts = self._starts[url]
        starts.not_before = now + min(FIRST_PAUSE_SECONDS * 2.0**starts.count, LONGEST_PAUSE_SECONDS)
        starts.count += 1
