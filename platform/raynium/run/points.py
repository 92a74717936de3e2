"""The points that a lost node would take with it: rank 0's node has accepted them, and MLflow has not got them yet.

The coordinator knows them, and the store does from each commit on: who goes on from that checkpoint, of whatever driver
and on whatever nodes, sends them.
"""

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raynium.errors import CheckpointDamaged, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store
from raynium.tracking.metrics import check_metrics
from raynium.tracking.tracker import Point

# In the run's store: those of the newest commit of each driver. One that comes back from the dead overwrites its own.
WAITING_FOLDER = "waiting-points"
# Values of metrics, some megabytes: of a run whose MLflow is away for long, the newest.
MOST_VALUES = 50_000

# Of a node that has rank 0, in some generations in a row: its agent's attempt and the first of them. It sorts by age.
Tenure = tuple[str, int]


@dataclass(frozen=True)
class PointsKept:
    """Of rank 0's node, in the order in which it took them.

    tenure: see `Tenure`. number: of this word in it, from 1 on; words may overtake each other, and be said again.
    pending: values that it has for MLflow, these too. are_all: before these nothing waits, but for what is older than
    MOST_VALUES; else what does was told, or is asked for.
    """

    tenure: Tenure
    number: int
    points: tuple[Point, ...]
    pending: int
    are_all: bool = False


@dataclass(frozen=True)
class TakesRank0:
    """A node that begins to send to MLflow asks for what was not sent. step: that its ranks go on from."""

    tenure: Tenure
    step: int


class PendingPoints:
    """What the coordinator knows of them."""

    def __init__(self) -> None:
        # Each with the number of the word that told it; 0: handed over to this tenure.
        self._points = deque[tuple[int, Point]]()
        self._values = 0
        # In the store, and handed over to nobody yet.
        self._found: tuple[Point, ...] = ()
        self._tenure: Tenure = "", 0
        # That it goes on from; None: a coordinator before this one was told.
        self._step: int | None = None
        self._newest = self._pending = 0
        self._knows_all = self._has_asked = False

    def all(self) -> tuple[Point, ...]:
        """Oldest first."""
        return (*self._found, *(point for _, point in self._points))

    def finds(self, points: Sequence[Point]) -> None:
        """In the store, where a coordinator before this one has left them."""
        self._found = tuple(points)

    def found(self, tenure: Tenure) -> tuple[Point, ...]:
        """For the node that has rank 0, once, if it is in this tenure: the store was silent when it began, or was asked
        anew since.
        """
        if tenure != self._tenure:
            return ()
        found, self._found = self._found, ()
        return tuple(point for point in found if self._step is None or point.step <= self._step)

    def keep(self, kept: PointsKept) -> bool:
        """What is older than all that is pending, MLflow has. True: there are some that were not told here, because
        this coordinator is younger than they, or an agent before that one took them: it is to tell all.
        """
        if kept.tenure < self._tenure:
            return False
        if kept.tenure > self._tenure:
            self._begins(kept.tenure)
        self._knows_all |= kept.are_all
        told = [(kept.number, point) for point in kept.points]
        if kept.number > self._newest and not kept.are_all:
            self._points.extend(told)
            self._values += _values(told)
        else:
            others = [each for each in self._points if each[0] != kept.number]
            later = [each for each in others if each[0] > kept.number]
            before = [] if kept.are_all else [each for each in others if each[0] < kept.number]
            self._become([*before, *told, *later])
        if kept.number > self._newest:
            self._newest, self._pending = kept.number, kept.pending
        most = min(self._pending, MOST_VALUES)
        while self._points and self._values - len(self._points[0][1].metrics) >= most:
            self._values -= len(self._points.popleft()[1].metrics)
        lacks = not self._knows_all or (self._values < most and not kept.are_all)
        asks, self._has_asked = lacks and not self._has_asked, self._has_asked or lacks
        return asks

    def handed_over(self, takes: TakesRank0) -> tuple[Point, ...]:
        """What came after the step that is gone on from is computed again, and belongs to nobody any more."""
        if takes.tenure < self._tenure:
            return ()
        found = [point for point in self.all() if point.step <= takes.step]
        self._begins(takes.tenure)
        self._step, self._found = takes.step, ()
        self._become((0, point) for point in found)
        return tuple(found)

    def _begins(self, tenure: Tenure) -> None:
        self._become([each for each in self._points if each[0] == 0])
        self._tenure, self._step, self._newest, self._pending = tenure, None, 0, 0
        self._knows_all = self._has_asked = False

    def _become(self, points: Iterable[tuple[int, Point]]) -> None:
        self._points = deque(points)
        self._values = _values(self._points)


def _values(points: Iterable[tuple[int, Point]]) -> int:
    return sum(len(point.metrics) for _, point in points)


def write_waiting(store: Store, claim_number: int, points: Sequence[Point]) -> None:
    """Before the commit whose state they belong to. claim_number: of the driver. Raises StoreError."""
    told = [(point.step, point.unix_ms, point.metrics) for point in points]
    store.replace(f"{WAITING_FOLDER}/{claim_number:09d}.json", json.dumps(told).encode())


def read_waiting(store: Store) -> list[Point]:
    """Of the newest driver that has left any; those of others are deleted. Raises StoreError, and CheckpointDamaged for
    what nobody of ours has written.
    """
    keys = sorted(store.list(WAITING_FOLDER).sizes)
    if not keys:
        return []
    newest = keys.pop()
    try:
        points = [Point(*each) for each in json.loads(store.read(newest))]
        for point in points:
            check_metrics(point.metrics)
            if not min(point.step, point.unix_ms) >= 0:
                raise ValueError(f"{point} has a negative number")
    except KeyMissing:
        return []
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(
            f"{store.uri(newest)} should hold a list of points, and cannot be read ({error}). The next commit "
            "replaces it"
        ) from error
    for key in keys:
        with contextlib.suppress(StoreError):
            store.delete(key)
    return points
