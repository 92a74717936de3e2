"""A tracker whose pending points are known outside of its node, which may be lost with its disk."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future

from raynium.errors import RunInUse
from raynium.run.points import MOST_VALUES, PointsKept, TakesRank0
from raynium.run.protocol import Coordinator, MaySend, News
from raynium.tracking.tracker import Point, Tracker, TrackerStatus

# The coordinator is told so often, and before a snapshot may leave the node.
TELL_SECONDS = 1.0


def refuse_displaced(coordinator: Coordinator, agent: MaySend) -> None:
    """Raises RunInUse where another has taken its place, which has, or computes, what the coordinator knew of."""
    if coordinator.tell(agent).result().displaced:
        raise RunInUse(
            f"the node agent of seat {agent.seat} was cut off, and another took its place: that one sends the run's "
            "points to MLflow, and what only this node has waits here for the next agent on it"
        )


class WitnessedTracker:
    """See `Tracker`. Threads may share it."""

    def __init__(self, tracker: Tracker, coordinator: Coordinator, resume_step: int | None):
        """tracker: new on this node. resume_step: that its ranks go on from, if any."""
        self._tracker, self._coordinator = tracker, coordinator
        self._lock = threading.Lock()
        self._untold: list[Point] = []
        self._told = 0.0
        for point in coordinator.tell(TakesRank0(resume_step or 0)).result().points:
            # A tracker sends nothing twice: MLflow may have got it meanwhile, and the disk here may hold it too.
            self.append(point.metrics, step=point.step, unix_ms=point.unix_ms)

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int) -> dict[str, float]:
        # Told in the order and with the values that the tracker has: the coordinator counts what is pending by them.
        with self._lock:
            accepted = self._tracker.append(metrics, step=step, unix_ms=unix_ms)
            if accepted:
                self._untold.append(Point(step, unix_ms, accepted))
        if time.monotonic() - self._told >= TELL_SECONDS:
            self.tell()
        return accepted

    def tell(self) -> None:
        """All that was appended, in order. Before a snapshot may leave the node, too: who goes on from it elsewhere
        computes no step before it.
        """
        with self._lock:
            self._told = time.monotonic()
            if not self._untold:
                return
            kept = PointsKept(tuple(self._untold), self._tracker.status().points_pending)
            self._untold.clear()
            answer = self._coordinator.tell(kept)
        answer.add_done_callback(self._hear)

    def _hear(self, answer: "Future[News]") -> None:
        if answer.cancelled() or answer.exception() is not None or not answer.result().wants_all_points:
            return
        with self._lock:
            waiting = self._tracker.waiting(most_values=MOST_VALUES)
            self._untold.clear()
            # Asked after, so that what was sent meanwhile is known to be.
            self._coordinator.tell(PointsKept(tuple(waiting), self._tracker.status().points_pending, are_all=True))

    def waiting(self, *, most_values: int) -> list[Point]:
        return self._tracker.waiting(most_values=most_values)

    def artifact(self, path: str, text: str) -> None:
        self._tracker.artifact(path, text)

    def status(self) -> TrackerStatus:
        return self._tracker.status()

    def close(self, *, timeout_seconds: float) -> TrackerStatus:
        return self._tracker.close(timeout_seconds=timeout_seconds)
