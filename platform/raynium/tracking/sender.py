"""Sends what the spool holds to MLflow, from a thread of its own, each point once.

How a point arrives exactly once, whatever dies between MLflow's commit and our acknowledgement:

- A batch of unknown outcome is sent again with the same names, steps, values *and times*; MLflow's SQL stores keep one
  row for each such quintuple (the primary key of their `metrics` table).
- A resumed run computes some steps a second time, at another time. On connecting, and after a silence, the sender asks
  MLflow for the last step of each name; a point beyond it is new. For a point at or below it, MLflow's history of that
  name says whether that very step is there: points of an earlier agent may still be on their way, so "at or below"
  alone proves nothing.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raynium.errors import RayniumError, RunInUse
from raynium.tracking.client import ArtifactsAway, log_text, mlflow_client
from raynium.tracking.metrics import STEADY, check_metrics, name_in_mlflow
from raynium.tracking.spool import MetricSpool, SpooledStep
from raynium.tracking.tracker import Point, TrackerStatus

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# MLflow's limit on metrics in one log_batch.
MAX_POINTS_PER_REQUEST = 1000
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 30.0
# MLflow is away for so long before somebody is told: a restart of its server takes less.
AWAY_SECONDS = 300.0
# What MLflow holds is asked again after so long without a word of it, and after a failure: the node may have been cut
# off or frozen, and another have sent the same steps meanwhile.
STALE_SECONDS = 5.0
# Of one metric, in memory; of more, MLflow is asked again when steps are repeated again.
MOST_STEPS_KEPT = 10_000


class _LoggedSteps:
    """Which steps of each metric MLflow holds."""

    def __init__(self, client: "MlflowClient", run_id: str):
        run = client.get_run(run_id)
        self._last_step: dict[str, int] = {point.key: point.step for point in run.to_proto().data.metrics}
        # Name → from which step on `_steps` is complete.
        self._floor: dict[str, int] = {}
        self._steps: dict[str, set[int]] = {}

    def holds(self, client: "MlflowClient", run_id: str, *, name: str, step: int) -> bool:
        """Asks MLflow for the metric's history the first time it meets a step that is not beyond the last."""
        if name not in self._last_step or step > self._last_step[name]:
            return False
        if name not in self._floor or step < self._floor[name]:
            history = client.get_metric_history(run_id, name)
            self._steps[name] = {point.step for point in history if point.step >= step}
            self._floor[name] = step
        return step in self._steps[name]

    def add(self, *, name: str, step: int) -> None:
        is_last = step >= self._last_step.get(name, step)
        self._last_step[name] = max(step, self._last_step.get(name, step))
        if name in self._steps:
            self._steps[name].add(step)
            if is_last and len(self._steps[name]) > MOST_STEPS_KEPT:
                del self._steps[name], self._floor[name]


class MetricSender:
    """Owns the thread that empties `spool` into one MLflow run. It retries for ever; nothing is dropped on an error.

    flush_seconds: how long a point waits at most while MLflow is well.
    request_timeout_seconds: how long one request may take; a hung server costs this thread that long, nobody else.
    may_send: called right before each request that writes. RunInUse from it ends the sending for good: the run, or this
    place in it, is another process's, which has sent, or will compute, what waits here; the spool keeps it. Any other
    error is one more to try again after.
    away: is told in words when nothing was taken for AWAY_SECONDS, once until something is.
    """

    def __init__(
        self,
        spool: MetricSpool,
        *,
        uri: str,
        run_id: str,
        flush_seconds: float = 2.0,
        request_timeout_seconds: float = 10.0,
        may_send: Callable[[], None] | None = None,
        away: Callable[[str], object] = logger.warning,
    ):
        self._spool = spool
        self._may_send = may_send
        self._away, self._told_away = away, False
        self._uri = uri
        self._run_id = run_id
        self._flush_seconds = flush_seconds
        self._request_timeout_seconds = request_timeout_seconds
        self._logged: _LoggedSteps | None = None
        # When the last batch began that MLflow took.
        self._heard = 0.0
        self._closing = threading.Event()
        self._drop_after: int | None = None
        # Guards acknowledging against `close`, and the counters.
        self._mutex = threading.Lock()
        self._abandoned = False
        self._points_sent = 0
        self._points_repeated = 0
        self._last_error: str | None = None
        self._failing_since: float | None = None
        # Metrics do not wait for a store of artifacts that does not take them.
        self._artifacts_not_before = -math.inf
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    def status(self) -> TrackerStatus:
        with self._mutex:
            failing_seconds = 0.0 if self._failing_since is None else time.monotonic() - self._failing_since
            return TrackerStatus(
                points_appended=self._spool.points_appended,
                points_sent=self._points_sent,
                points_repeated=self._points_repeated,
                points_pending=self._spool.points_pending,
                points_lost=self._spool.points_lost,
                artifacts_pending=self._spool.artifacts_pending,
                last_error=self._last_error,
                failing_seconds=failing_seconds,
            )

    def close(self, *, timeout_seconds: float, drop_after: int | None = None) -> TrackerStatus:
        """Send what is left, for `timeout_seconds` at most. The spool keeps the rest for the next process."""
        self._drop_after = drop_after
        self._closing.set()
        self._thread.join(timeout_seconds)
        with self._mutex:
            # A request may still hang; its thread must not touch the spool any more.
            self._abandoned = True
        return self.status()

    def _run(self) -> None:
        retry_seconds = FIRST_RETRY_SECONDS
        pause_seconds = self._flush_seconds
        while not self._abandoned:
            is_last_round = self._closing.wait(pause_seconds)
            try:
                self._send_all()
            except RunInUse as error:
                self._note_failure(error)
                return
            # A thread that dies of a surprise would leave points waiting unseen.
            except Exception as error:
                self._note_failure(error)
                self._logged = None
                pause_seconds = retry_seconds
                retry_seconds = min(2 * retry_seconds, LAST_RETRY_SECONDS)
                if is_last_round:
                    # `closing` is set, so that its wait no longer pauses.
                    time.sleep(min(pause_seconds, 1.0))
            else:
                self._note_success()
                retry_seconds, pause_seconds = FIRST_RETRY_SECONDS, self._flush_seconds
                if is_last_round:
                    return

    def _send_all(self) -> None:
        while not self._abandoned:
            steps = self._spool.read_steps(max_points=MAX_POINTS_PER_REQUEST)
            wait = steps or time.monotonic() < self._artifacts_not_before
            artifacts = [] if wait else self._spool.read_artifacts()
            if not steps and not artifacts:
                return
            with mlflow_client(self._uri, timeout_seconds=self._request_timeout_seconds) as client:
                if steps:
                    self._send(client, steps)
                for artifact in artifacts:
                    self._check()
                    try:
                        log_text(client, self._run_id, path=artifact.path, text=artifact.text)
                    except ArtifactsAway as error:
                        self._note_artifacts_away(error)
                        return
                    with self._mutex:
                        if self._abandoned:
                            return
                        self._spool.acknowledge_artifact(artifact)

    def _send(self, client: "MlflowClient", steps: list[SpooledStep]) -> None:
        from mlflow.entities import Metric

        began = time.monotonic()
        if self._logged is None or began - self._heard >= STALE_SECONDS:
            self._logged = _LoggedSteps(client, self._run_id)
        points: dict[tuple[str, int], Metric] = {}
        num_points = 0
        for spooled in steps:
            num_points += len(spooled.metrics)
            for own_name, value in spooled.metrics.items():
                name = name_in_mlflow(own_name)
                identity = (name, spooled.step)
                if identity in points or self._logged.holds(client, self._run_id, name=name, step=spooled.step):
                    continue
                points[identity] = Metric(name, value, spooled.unix_ms, spooled.step)
        # After what MLflow holds was asked: this process may have been frozen since.
        self._check()
        if (last := self._drop_after) is not None:
            points = {identity: point for identity, point in points.items() if point.step <= last}
        if points and not self._abandoned:
            # Dying here, or a lost answer, leaves the outcome unknown: the same points are sent again.
            # Said also where MLFLOW_ENABLE_ASYNC_LOGGING says otherwise: what is acknowledged must have arrived.
            client.log_batch(self._run_id, metrics=list(points.values()), synchronous=True)
        self._heard = began
        with self._mutex:
            if self._abandoned:
                return
            self._spool.acknowledge_steps(steps)
            self._points_sent += len(points)
            self._points_repeated += num_points - len(points)
        for name, step in points:
            self._logged.add(name=name, step=step)

    def _check(self) -> None:
        if self._may_send is not None:
            self._may_send()

    def _note_failure(self, error: Exception) -> None:
        message = str(error) if isinstance(error, RayniumError) else f"{type(error).__name__}: {error}"
        with self._mutex:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                expected = isinstance(error, RayniumError | OSError)
                logger.warning("%s; metrics wait on disk and are sent later", message, exc_info=not expected)
            self._last_error = message
            tells = not self._told_away and time.monotonic() - self._failing_since >= AWAY_SECONDS
            self._told_away |= tells
        if tells:
            self._away(f"MLflow has taken nothing for {AWAY_SECONDS:.0f} s; metrics wait on disk: {message}")

    def _note_artifacts_away(self, error: ArtifactsAway) -> None:
        if self._artifacts_not_before == -math.inf:
            logger.warning("the MLflow page lacks files, which wait on disk: %s", error)
        self._artifacts_not_before = time.monotonic() + LAST_RETRY_SECONDS

    def _note_success(self) -> None:
        with self._mutex:
            if self._failing_since is not None:
                logger.info("MLflow answers again after %.0f s", time.monotonic() - self._failing_since)
            self._failing_since = self._last_error = None
            self._told_away = False


class MlflowTracker:
    """A `Tracker` that delivers to one MLflow run through a spool. Built by the agent of rank 0's node only.

    spool_folder: on a local disk; the same path in every attempt on this node, so that leftovers are sent. For a
    process that still uses it `wait_seconds` are waited, then TrackingError is raised. MLflow itself may be down.
    may_send, away: as of `MetricSender`.
    """

    def __init__(
        self,
        spool_folder: str | Path,
        *,
        uri: str,
        run_id: str,
        flush_seconds: float = 2.0,
        request_timeout_seconds: float = 10.0,
        may_send: Callable[[], None] | None = None,
        away: Callable[[str], object] = logger.warning,
        wait_seconds: float = 0.0,
    ):
        self._spool = MetricSpool(spool_folder, wait_seconds=wait_seconds)
        self._steady = dict(STEADY)
        self._sender = MetricSender(
            self._spool,
            uri=uri,
            run_id=run_id,
            flush_seconds=flush_seconds,
            request_timeout_seconds=request_timeout_seconds,
            may_send=may_send,
            away=away,
        )

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int, again: bool = False) -> dict[str, float]:
        check_metrics(metrics)
        # Here, not where they are sent: what the spool has accepted must arrive.
        news = {name: value for name, value in metrics.items() if again or self._steady.get(name) != value}
        self._steady |= {name: value for name, value in news.items() if name in STEADY}
        if news:
            self._spool.append(news, step=step, unix_ms=unix_ms)
        return news

    def waiting(self, *, most_values: int) -> list[Point]:
        found = self._spool.newest(max_points=most_values)
        return [Point(each.step, each.unix_ms, each.metrics) for each in found]

    def artifact(self, path: str, text: str) -> None:
        self._spool.put_artifact(path, text)

    def status(self) -> TrackerStatus:
        return self._sender.status()

    def close(self, *, timeout_seconds: float, drop_after: int | None = None) -> TrackerStatus:
        status = self._sender.close(timeout_seconds=timeout_seconds, drop_after=drop_after)
        if drop_after is not None:
            self._spool.drop_after(drop_after)
        self._spool.close()
        return status
