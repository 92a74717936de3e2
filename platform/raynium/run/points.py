"""The points that a lost node would take with it: rank 0's node has accepted them, and MLflow has not got them yet.

The coordinator knows them, and the store does from each commit on: who goes on from that checkpoint, of whatever driver
and on whatever nodes, sends them.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from raynium.errors import StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store
from raynium.tracking.metrics import check_metrics
from raynium.tracking.tracker import Point

# In the run's store: those of the newest commit.
WAITING_NAME = "waiting-points.json"
# Values of metrics, some megabytes: of a run whose MLflow is away for long, the newest.
MOST_VALUES = 50_000


@dataclass(frozen=True)
class PointsKept:
    """Of rank 0's node, in the order in which it took them. pending: values that it has for MLflow, these too.

    are_all: the newest MOST_VALUES of them are these; else those before are known, or are asked for.
    """

    points: tuple[Point, ...]
    pending: int
    are_all: bool = False


@dataclass(frozen=True)
class TakesRank0:
    """A node that begins to send to MLflow asks for what was not sent. step: that its ranks go on from."""

    step: int


class PendingPoints:
    """What the coordinator knows of them."""

    def __init__(self) -> None:
        self._points = deque[Point]()
        self._values = 0
        # Of the node that has rank 0.
        self._has_asked_for_all = False

    def up_to(self, step: int) -> tuple[Point, ...]:
        """Those that a state of this step has behind it."""
        return tuple(point for point in self._points if point.step <= step)

    def found(self, points: Sequence[Point]) -> None:
        """In the store, where a coordinator before this one has left them."""
        self._points.extendleft(reversed(points))
        self._values += sum(len(point.metrics) for point in points)

    def keep(self, kept: PointsKept) -> bool:
        """What is older than all that is pending, MLflow has. True: there are some that were not told here, because
        this coordinator is younger than they, or an agent before that one took them: it is to tell all.
        """
        if kept.are_all:
            self._points.clear()
            self._values = 0
        for point in kept.points:
            self._points.append(point)
            self._values += len(point.metrics)
        most = min(kept.pending, MOST_VALUES)
        while self._points and self._values - len(self._points[0].metrics) >= most:
            self._values -= len(self._points.popleft().metrics)
        asks = self._values < most and not self._has_asked_for_all
        self._has_asked_for_all |= asks
        return asks

    def handed_over(self, step: int) -> tuple[Point, ...]:
        """To whoever goes on from this step; what came after it is computed again, and belongs to nobody any more."""
        self._has_asked_for_all = False
        self._points = deque(self.up_to(step))
        self._values = sum(len(point.metrics) for point in self._points)
        return tuple(self._points)


def write_waiting(store: Store, points: Sequence[Point]) -> None:
    """Before the commit whose state they belong to. Raises StoreError."""
    store.replace(WAITING_NAME, json.dumps([astuple(point) for point in points]).encode())


def read_waiting(store: Store) -> list[Point]:
    """Raises StoreError, also for what nobody of ours has written."""
    try:
        points = [Point(*each) for each in json.loads(store.read(WAITING_NAME))]
        for point in points:
            check_metrics(point.metrics)
            if not min(point.step, point.unix_ms) >= 0:
                raise ValueError(f"{point} has a negative number")
        return points
    except KeyMissing:
        return []
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{store.uri(WAITING_NAME)} should hold a list of points, and cannot be read ({error}). The next commit "
            "replaces it"
        ) from error
