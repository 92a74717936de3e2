"""The points that a lost node would take with it: rank 0's node has accepted them, and MLflow has not got them yet."""

from collections import deque
from dataclasses import dataclass

from raynium.tracking.tracker import Point

# Values of metrics, some megabytes: of a run whose MLflow is away for long, the newest.
MOST_VALUES = 50_000


@dataclass(frozen=True)
class PointsKept:
    """Of rank 0's node, in the order in which it took them. pending: values that it has for MLflow, these too."""

    points: tuple[Point, ...]
    pending: int


@dataclass(frozen=True)
class TakesRank0:
    """A node that begins to send to MLflow asks for what was not sent. step: that its ranks go on from."""

    step: int


class PendingPoints:
    """What the coordinator knows of them."""

    def __init__(self) -> None:
        self._points = deque[Point]()
        self._values = 0

    def keep(self, kept: PointsKept) -> None:
        """What is older than all that is pending, MLflow has."""
        for point in kept.points:
            self._points.append(point)
            self._values += len(point.metrics)
        most = min(kept.pending, MOST_VALUES)
        while self._points and self._values - len(self._points[0].metrics) >= most:
            self._values -= len(self._points.popleft().metrics)

    def handed_over(self, step: int) -> tuple[Point, ...]:
        """To whoever goes on from this step; what came after it is computed again, and belongs to nobody any more."""
        self._points = deque(point for point in self._points if point.step <= step)
        self._values = sum(len(point.metrics) for point in self._points)
        return tuple(self._points)
