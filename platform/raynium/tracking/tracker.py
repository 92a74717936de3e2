"""The seam between training and MLflow: what the node agent calls, and a fake that needs no MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from raynium.tracking.metrics import check_metrics


@dataclass(frozen=True)
class TrackerStatus:
    """Counters of one tracker since it was made. A point is one (name, step, value).

    points_repeated: not sent because MLflow already holds a point of that name and step. points_pending: accepted and
    not yet confirmed by MLflow, those of an earlier process included. points_lost: refused because both disk and memory
    were full. last_error: of the last attempt, None when it succeeded. failing_seconds: since the first in a row.
    """

    points_appended: int = 0
    points_sent: int = 0
    points_repeated: int = 0
    points_pending: int = 0
    points_lost: int = 0
    artifacts_pending: int = 0
    last_error: str | None = None
    failing_seconds: float = 0.0

    def __str__(self) -> str:
        lost = f"; {self.points_lost} points lost: the disk was full" if self.points_lost else ""
        left = {"point": self.points_pending, "file": self.artifacts_pending}
        waiting = " and ".join(f"{number:,} {what}(s)" for what, number in left.items() if number) or "nothing"
        if self.last_error is None:
            return f"not yet in MLflow, on disk until it takes them: {waiting}{lost}"
        return (
            f"MLflow unreachable for {self.failing_seconds:.0f} s: {waiting} on disk for it{lost} ({self.last_error})"
        )


@dataclass(frozen=True)
class Point:
    """The metrics of one step, as given to `append`."""

    step: int
    unix_ms: int
    metrics: dict[str, float]


class Tracker(Protocol):
    """Where the metrics of one run go. Only the agent of rank 0's node has one."""

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int, again: bool = False) -> dict[str, float]:
        """Accept the points of one step without waiting for any server. Those of STEADY are none while nothing changes,
        unless another tracker accepted them before.

        Returns those that are. Raises ValueError for a name outside METRICS or a value that is no number.
        """
        ...

    def waiting(self, *, most_values: int) -> list[Point]:
        """The newest of those that MLflow has not got, in their order: of no more values than this.

        Any thread. Raises TrackingError where a disk does not give them.
        """
        ...

    def artifact(self, path: str, text: str) -> None:
        """Accept a text file of the run (UTF-8); a later one of the same path replaces it."""
        ...

    def status(self) -> TrackerStatus: ...

    def close(self, *, timeout_seconds: float, drop_after: int | None = None) -> TrackerStatus:
        """Try to deliver what is left; the status says what remains. Nothing may be appended afterwards.

        drop_after: another tracker has the steps after this one.
        """
        ...


class MemoryTracker:
    """Keeps everything in lists: for tests, and for runs that nobody tracks."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.artifacts: dict[str, str] = {}
        self.closed = False

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int, again: bool = False) -> dict[str, float]:
        assert not self.closed
        check_metrics(metrics)
        self.points.append(Point(step, unix_ms, dict(metrics)))
        return dict(metrics)

    def waiting(self, *, most_values: int) -> list[Point]:
        return []

    def artifact(self, path: str, text: str) -> None:
        assert not self.closed
        self.artifacts[path] = text

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in the order they were appended, repeats included."""
        return [(point.step, point.metrics[name]) for point in self.points if name in point.metrics]

    def status(self) -> TrackerStatus:
        num_points = sum(len(point.metrics) for point in self.points)
        return TrackerStatus(points_appended=num_points, points_sent=num_points)

    def close(self, *, timeout_seconds: float, drop_after: int | None = None) -> TrackerStatus:
        self.closed = True
        return self.status()
