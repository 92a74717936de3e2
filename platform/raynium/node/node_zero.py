"""What the node that has rank 0 does beside: it sends the run's points to MLflow, and writes commits down there.

Rank 0 may move to another node, and this one may be lost with its disk: so what it has accepted is known outside of it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from raynium.errors import RunInUse, TrackingError
from raynium.run.points import MOST_VALUES, PointsKept, TakesRank0, Tenure
from raynium.run.protocol import Commit, Coordinator, MaySend, News, Order, Said
from raynium.tracking.ledger import Ledger
from raynium.tracking.tracker import Point, Tracker, TrackerStatus

logger = logging.getLogger(__name__)

# The coordinator is told so often, and before a snapshot may leave the node.
TELL_SECONDS = 1.0
# Then the rest stays in the spool, and the next attempt on this node sends it.
TRACKER_CLOSE_SECONDS = 30.0
COMMIT_LOG_CLOSE_SECONDS = 10.0


class NodeZero:
    """Of one node, over the life of its agent, whose thread calls it."""

    def __init__(self, coordinator: Coordinator, open_tracker: Callable[[], Tracker], attempt: str):
        """open_tracker is called each time that this node takes rank 0. attempt: as in AgentInfo."""
        self._coordinator, self._open_tracker, self._attempt = coordinator, open_tracker, attempt
        # While this node has rank 0.
        self.tracker: WitnessedTracker | None = None
        self._commits: CommitLog | None = None

    def begins(self, order: Order, *, has_rank0: bool, follows: bool) -> None:
        """Before the ranks of an order. follows: this node knows of each generation before; else another may have had
        rank 0 in between.
        """
        if self.tracker is not None and not (has_rank0 and follows):
            # The ranks wait for it.
            self.gives_up(order.resume_step, seconds=0.0)
        if has_rank0 and self.tracker is None:
            tenure = self._attempt, order.generation
            self.tracker = WitnessedTracker(
                self._open_tracker(), self._coordinator, tenure=tenure, resume_step=order.resume_step
            )
            self._commits = CommitLog(self._coordinator, self.tracker)

    def gives_up(self, resume_step: int | None, *, seconds: float = TRACKER_CLOSE_SECONDS) -> None:
        """Another node has rank 0 now, if this one had it, and goes on from this step. seconds: to send what is left:
        that one sends the same points.
        """
        if self.tracker is None or self._commits is None:
            return
        self._commits.abandon()
        self.tracker.tell()
        self.tracker.close(timeout_seconds=seconds, drop_after=resume_step or 0)
        self.tracker = self._commits = None

    def tell(self) -> None:
        """See `WitnessedTracker.tell`."""
        if self.tracker is not None:
            self.tracker.tell()

    def ends(self, ledger: Ledger) -> None:
        """No order comes any more. ledger: of the whole run."""
        if self.tracker is not None:
            self.tracker.append(ledger.metrics(), step=ledger.step, unix_ms=int(time.time() * 1000))

    def close(self) -> None:
        """All is saved."""
        if self.tracker is None or self._commits is None:
            return
        self._commits.close()
        self.tracker.tell()
        left = self.tracker.close(timeout_seconds=TRACKER_CLOSE_SECONDS)
        if left.points_pending or left.artifacts_pending:
            self._coordinator.tell(Said(str(left))).result()


def refuse_displaced(coordinator: Coordinator, agent: MaySend) -> None:
    """Raises RunInUse where another has taken its place, which has, or computes, what the coordinator knew of."""
    if coordinator.tell(agent).result().displaced:
        raise RunInUse(
            f"the node agent of seat {agent.seat} was cut off, and another took its place: that one sends the run's "
            "points to MLflow, and what only this node has waits here for the next agent on it"
        )


class WitnessedTracker:
    """A tracker whose pending points the coordinator knows. See `Tracker`. Threads may share it."""

    def __init__(self, tracker: Tracker, coordinator: Coordinator, *, tenure: Tenure, resume_step: int | None):
        """tracker: new on this node. resume_step: that its ranks go on from, if any."""
        self._tracker, self._coordinator, self._tenure = tracker, coordinator, tenure
        self._lock = threading.Lock()
        self._untold: list[Point] = []
        self._told, self._number = 0.0, 0
        # An agent before this one may have left some here.
        self._tells_all = True
        self._handed = coordinator.tell(TakesRank0(tenure, resume_step or 0)).result().points
        self.tell()

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int, again: bool = False) -> dict[str, float]:
        # Told in the order and with the values that the tracker has: the coordinator counts what is pending by them.
        with self._lock:
            accepted = self._tracker.append(metrics, step=step, unix_ms=unix_ms, again=again)
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
            points, are_all = self._untold, False
            if self._tells_all:
                self._tells_all = False
                self._take_handed()
                if (waiting := self._read()) is not None:
                    points, are_all = waiting, True
            elif not points:
                return
            self._number += 1
            # Asked after what waits was read: what was sent meanwhile is known to be.
            pending = self._tracker.status().points_pending
            answer = self._coordinator.tell(PointsKept(self._tenure, self._number, tuple(points), pending, are_all))
            self._untold = []
        answer.add_done_callback(self._hear)

    def _take_handed(self) -> None:
        """Into the tracker, but for what an agent before this one took here itself: each would be told twice.

        A tracker sends nothing twice, and MLflow may have got it meanwhile.
        """
        handed, self._handed = self._handed, ()
        held = {_identity(point) for point in self._read() or ()} if handed else set()
        for point in handed:
            if _identity(point) not in held:
                self._tracker.append(point.metrics, step=point.step, unix_ms=point.unix_ms, again=True)

    def _read(self) -> list[Point] | None:
        try:
            return self._tracker.waiting(most_values=MOST_VALUES)
        except TrackingError as error:
            logger.warning("what waits for MLflow here would be lost with this node: %s", error)
            return None

    def _hear(self, answer: "Future[News]") -> None:
        # In a thread that others' answers wait for.
        if answer.cancelled() or answer.exception() is not None:
            return
        news = answer.result()
        self._handed += news.points
        self._tells_all |= news.wants_all_points or bool(news.points)

    def waiting(self, *, most_values: int) -> list[Point]:
        return self._tracker.waiting(most_values=most_values)

    def artifact(self, path: str, text: str) -> None:
        self._tracker.artifact(path, text)

    def status(self) -> TrackerStatus:
        return self._tracker.status()

    def close(self, *, timeout_seconds: float, drop_after: int | None = None) -> TrackerStatus:
        return self._tracker.close(timeout_seconds=timeout_seconds, drop_after=drop_after)


def _identity(point: Point) -> tuple[int, int, frozenset[str]]:
    return point.step, point.unix_ms, frozenset(point.metrics)


class CommitLog:
    """Writes each commit into MLflow: its numbers at its step, and the list of the run's checkpoints as an artifact."""

    def __init__(self, coordinator: Coordinator, tracker: WitnessedTracker):
        self._coordinator = coordinator
        self._tracker = tracker
        self._abandoned = False
        self._thread = threading.Thread(target=self._follow, name="commit-log", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Another node's writes them down from now on: what this one may still be answered is told to that one too."""
        self._abandoned = True

    def close(self) -> None:
        """Once the run has ended: returns when the last commit is written down, or the coordinator is out of reach."""
        self._thread.join(COMMIT_LOG_CLOSE_SECONDS)

    def _follow(self) -> None:
        sent: Commit | None = None
        while not self._abandoned:
            try:
                commits = self._coordinator.commits(sent).result()
            except Exception as error:
                # Ray's own errors, which this file must not import: the coordinator is gone.
                logger.warning("checkpoints are no longer written into MLflow: %s", error)
                return
            if commits is None or self._abandoned:
                return
            for commit in commits:
                sent = commit
                self._tracker.append(commit.metrics, step=commit.step, unix_ms=int(time.time() * 1000))
                try:
                    self._tracker.artifact("checkpoints.json", commit.checkpoints)
                except TrackingError as error:
                    # The disk is full: the next commit's list holds this one too.
                    logger.warning("the list of checkpoints does not reach MLflow: %s", error)
            # The coordinator does not tell of them again.
            self._tracker.tell()
