"""The driver: takes a prepared run to its end. One process per run; `raynium train` and a Ray job both call it.

It starts the coordinator and Ray Train, shows progress, keeps the run record, and carries a stop request to the ranks.
What comes before is in `preparation.py`, what comes after in `run.py`.
"""

import contextlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import ray
import ray.exceptions
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raynium.config.schema import Config
from raynium.errors import ClusterLost, LaunchError, RunFailed, StoreError, TrackingError
from raynium.launch.backend import NodeAgentConfig, ray_storage, trainer_name
from raynium.launch.bad_nodes import BadNodes
from raynium.launch.calls import Calls
from raynium.launch.head import ClusterWatch
from raynium.launch.nodes import (
    Waiting,
    draining_nodes,
    end_controllers,
    label_selector,
    name_job,
    node_resources,
    patient,
    raylet_address,
    release_nodes,
)
from raynium.launch.notify import Notifier
from raynium.launch.page import Page
from raynium.launch.preflight_cluster import check_nodes, preflight_level
from raynium.launch.preparation import Prepared
from raynium.launch.seats import Seats
from raynium.launch.worker import run_agent
from raynium.run.coordinator import RunCoordinator
from raynium.run.last_save import pause_before_next_try
from raynium.run.protocol import NodeFault, NodeLeaves, Status
from raynium.run.record import RecordKeeper
from raynium.terminal.display import Display
from raynium.tracking.incidents import Incidents, What, merged, settled
from raynium.tracking.ledger import Before
from raynium.tracking.runs import log_artifact_text

logger = logging.getLogger(__name__)

# How often the display is refreshed, and the run's store is asked for a stop request.
STATUS_SECONDS = 0.5
STOP_POLL_SECONDS = 2.0
# Agents call a coordinator that was started again at once; later than this, none is there to save anything.
AGENTS_SPEAK_SECONDS = 10.0
# A coordinator that died is back sooner.
CLUSTER_LOST_SECONDS = 30.0
# The first one is a process that Ray starts, which on a busy machine takes longer.
FIRST_ANSWER_SECONDS = 180.0
# After a failure, agents still upload the last checkpoint before it.
AGENTS_END_SECONDS = 600.0
# All that have spoken are through, and others would have spoken by then: Ray Train waits for one that it never placed.
AGENTS_HOME_SECONDS = 30.0
# Until who waits for a killed actor hears of it.
CONTROLLER_ENDS_SECONDS = 20.0


# Placements and starts of agents that fail, before Ray Train gives up; its default is never. It counts all of a
# driver's life: in a month a few nodes die while agents start.
CONTROLLER_FAILURE_LIMIT = 100


class Driver:
    """One run's life on one cluster. `ray` is initialised, `prepared` holds the claimed run."""

    def __init__(self, prepared: Prepared, display: Display, notifier: Notifier):
        self.config = prepared.config
        self.prepared = prepared
        self.display = display
        self._stop = threading.Event()
        # Who asked for it, as `RunRecord.stopped_by` has it.
        self.stopped_by: str | None = None
        # Of the coordinator that was heard last: its life, when that began unless it is the first, how many of its
        # events were seen, and whether it was told to stop.
        self._life = ""
        self._life_began = -math.inf
        self._events_seen = 0
        self._told_to_stop = False
        # Of the whole run, also of earlier drivers, as the record keeps them.
        self._node_faults: list[dict[str, Any]] = list(prepared.keeper.record.node_faults or [])
        # That the coordinator cannot see.
        self._incidents = Incidents(f"driver-{time.time():.0f}", unix=time.time, steady=time.monotonic)
        self._bad_nodes = BadNodes(self.config, prepared.store, display.line, self._incidents)
        self._notifier = notifier
        # Seen by this driver; a coordinator that starts again forgets its own.
        self._faults_seen: set[NodeFault] = set()
        # What the coordinator was told last of the time before its life, and how many words that makes.
        self._before: tuple[str, Before] | None = None
        self._words = 0
        self._page = Page(
            prepared.mlflow, open_mlflow=prepared.open_mlflow, dtype=self.config.engine.dtype, tell=display.line
        )
        self._seats = Seats(self.config, tell=display.line)
        # Ids of nodes that a preflight or a verdict named: one list for both.
        self._excluded = self._bad_nodes.excluded
        # Before the one that runs: the agents were sent home to start on other nodes, or Ray Train's controller died.
        self._trainers = 0
        # Controllers lost since a checkpoint, and the newest one then.
        self._controllers_lost: tuple[int, int | None] = 0, None
        # Tells a coordinator that the agents go home, and others start; None: they stay.
        self._leave: Callable[[], object] | None = None
        # When the run is to save and stop, since its nodes will be taken away.
        self._ends_unix = None
        if (ends_at := self.config.cluster.ends_at) is not None:
            self._ends_unix = datetime.fromisoformat(ends_at).timestamp() - self.config.fault.stop_seconds
        # Of the cluster, while the run is watched.
        self._cluster: ClusterWatch | None = None
        self._calls = Calls(tell=display.line)

    def request_stop(self, by: str) -> None:
        """Every rank saves at the next step and ends. Safe to call from a signal handler."""
        self.stopped_by = self.stopped_by or by
        self._stop.set()

    def run(self) -> Status:
        """Returns when the run has finished or was stopped; raises RunFailed with the cause otherwise.

        LaunchError, if the preflight finds too few nodes that are fit.
        """
        keeper = self.prepared.keeper
        self._wait_for_seats()
        self._excluded += [*self._preflight(), *self._bad_nodes.ids()]
        name_job(self.config.run.name)
        claimed = keeper.claim_number
        coordinator = start_coordinator(self.config, self.prepared.store.url, keeper.record.generation, claimed)
        # Told again, with the time until now, once it has answered.
        coordinator.ran_before.remote(0, Before(keeper.record.ledger))
        while True:
            fitting = _InThread(lambda: self._trainer(coordinator).fit())
            with (
                self._page,
                ClusterWatch(head=ray.get_runtime_context().gcs_address, raylet=raylet_address()) as self._cluster,
            ):
                status = self._watch(coordinator, fitting, keeper)
            if status.ended is not None or not (
                self._leave is not None or self._outlives_controller(coordinator, fitting.error, status)
            ):
                break
            self._leave = None
            self._trainers += 1
            self._wait_for_seats()
        keeper.finishing()
        with keeper.beating():
            # Without any, Ray Train waits for nodes.
            if status.agents:
                self._wait_for_agents(coordinator, fitting)
            self._bad_nodes.close(step=status.step)
        if status.ended == "failed" or status.ended is None:
            # EC2 may have answered since the last record.
            with contextlib.suppress(StoreError):
                keeper.update(incidents=self._incidents_with(status) or None)
            cause = status.cause or f"Ray Train ended the run: {fitting.error}"
            raise RunFailed(f"run {self.config.run.name!r} failed at step {status.step}: {cause}")
        if fitting.is_alive():
            # Ray ends a process, with an error, of which a thread still asks something once it is shut down.
            end_controllers()
            fitting.join(CONTROLLER_ENDS_SECONDS)
        return status

    def _wait_for_seats(self) -> None:
        with self.prepared.keeper.beating():
            self._seats.wait(besides=self._excluded, go_on=lambda: not self._asked_to_stop())

    def _preflight(self) -> list[str]:
        """Checks the nodes as preflight.before_run says; returns the ids of those that the run must do without."""
        if (level := preflight_level(self.config)) is None:
            return []
        with self.prepared.keeper.beating():
            report = check_nodes(
                self._seats.config,
                resources=node_resources(self.config),
                level=level,
                wait=patient(self.config, go_on=lambda: not self._asked_to_stop(), tell=self.display.line),
                tell=self.display.line,
            )
        # Somebody asked the run to stop: what follows sees it too.
        if report is None:
            return []
        self.display.line(report.summary())
        mlflow = self.prepared.mlflow
        try:
            log_artifact_text(mlflow.uri, mlflow.run_id, "preflight.json", json.dumps(report.to_json(), indent=2))
        except TrackingError as error:
            # The run is worth more than this page of it.
            self.display.line(f"the MLflow page does not show the preflight: {error}")
        if (refusal := report.refusal()) is not None:
            raise LaunchError(refusal)
        self._bad_nodes.passed(report)
        return [node.node_id for node in report.bad_nodes]

    def _asked_to_stop(self) -> bool:
        """By a signal, or by `raynium stop` through the run's store."""
        try:
            if self.prepared.keeper.stop_requested():
                self.request_stop("raynium stop")
        except StoreError as error:
            # Training does not need it: the next round tries again.
            self.display.line(f"a stop request could not be looked for: {error}")
        return self._stop.is_set()

    def _trainer(self, coordinator: Any) -> DataParallelTrainer:
        store, number = self.prepared.store, self._seats.number
        return DataParallelTrainer(
            run_agent,
            train_loop_config={
                "config": self.config.model_dump(mode="json"),
                "run_url": store.url,
                "nodes": self._seats.nodes,
                "claim_number": self.prepared.keeper.claim_number,
                "coordinator": coordinator,
                "mlflow_uri": self.prepared.mlflow.uri,
                "mlflow_run_id": self.prepared.mlflow.run_id,
                "scratch": self.prepared.scratch,
                "secret": secrets.token_bytes(32),
            },
            backend_config=NodeAgentConfig(coordinator, trainer_name(self._trainers)),
            scaling_config=ray.train.ScalingConfig(
                num_workers=number,
                resources_per_worker=node_resources(self.config),
                placement_strategy="STRICT_SPREAD" if number > 1 else "PACK",
                # Also when a lost node is replaced.
                label_selector=label_selector(self._excluded) or None,
            ),
            run_config=ray.train.RunConfig(
                # Ray would restore a run of an equal name.
                name=f"driver-{self.prepared.keeper.claim_number:06d}-{self._trainers}",
                failure_config=ray.train.FailureConfig(
                    # The coordinator counts them: see run/verdicts/patience.py.
                    max_failures=-1,
                    controller_failure_limit=CONTROLLER_FAILURE_LIMIT,
                ),
                **ray_storage(store),
            ),
        )

    def _watch(self, coordinator: Any, fitting: "_InThread", keeper: RecordKeeper) -> Status:
        """Shows progress, keeps the record, and carries a stop request, until the run or Ray Train has ended."""
        waiting = Waiting(self._seats.config, self.display.line, besides=self._excluded)
        next_stop_poll = time.monotonic()
        told_store = False
        while True:
            over = not fitting.is_alive()
            status = self._status(coordinator)
            self._keep_ledger(coordinator, keeper, status)
            for event in status.events:
                self.display.line(event.text)
                self._events_seen = event.number
            self.display.show(status)
            new_faults = [fault for fault in status.node_faults if fault not in self._faults_seen]
            self._faults_seen.update(new_faults)
            self._node_faults += [fault.to_json() for fault in new_faults]
            for fault in new_faults:
                self._bad_nodes.remember(fault)
            self._publish(keeper, status)
            if status.ended is not None or over:
                return status
            self._leave_bad_nodes(coordinator, status, new_faults)
            if self._leave is None:
                self._bad_nodes.act(status)

            now = time.monotonic()
            try:
                self._keep_record(keeper, status)
                if now >= next_stop_poll:
                    next_stop_poll = now + STOP_POLL_SECONDS
                    self._calls.make("nodes that somebody drains", self._tell_drained, coordinator)
                    self._calls.make("nodes that the run lacks", self._take_more_nodes, coordinator, status)
                    if self._ends_unix is not None and time.time() >= self._ends_unix and not self._stop.is_set():
                        self.display.line(f"the nodes will be taken away at {self.config.cluster.ends_at}")
                        self.request_stop("cluster.ends_at")
                    if keeper.stop_requested():
                        self.request_stop("raynium stop")
                    told_store = False
            except StoreError as error:
                # Training goes on without the record, which may be away for hours: told once, tried again next round.
                if not told_store:
                    self.display.line(f"the run record could not be written or read: {error}")
                told_store = True
            if self._stop.is_set() and not self._told_to_stop and self._agents_have_spoken(status):
                self._told_to_stop = True
                self.display.line("stopping: every rank saves at its next step, then the run ends")
                self._calls.make("the stop", coordinator.request_stop.remote, status.ledger.life)
            waiting.look(waits=not status.running)
            time.sleep(STATUS_SECONDS)

    def _publish(self, keeper: RecordKeeper, status: Status) -> None:
        """What people see on the page and are notified of, unless another driver may own the run by now."""
        try:
            keeper.check()
        except StoreError:
            # The page is as old as the record until the store answers.
            return
        record = replace(keeper.record, **self.facts(status))
        self._page.show(status, record)
        self._notifier.hear(record)

    def _wait_for_agents(self, coordinator: Any, fitting: "_InThread") -> None:
        """They still send metrics and give back memory. Ray Train may wait for a node for one that it is to replace."""
        deadline, home_since = time.monotonic() + AGENTS_END_SECONDS, math.inf
        while fitting.is_alive() and time.monotonic() < deadline:
            fitting.join(STATUS_SECONDS)
            try:
                status = self._status(coordinator)
            except ClusterLost as error:
                # The run has ended: nothing is lost with it.
                self.display.line(str(error))
                return
            home_since = min(home_since, time.monotonic()) if status.all_are_home else math.inf
            if status.all_are_home and status.waits_for_seats:
                return
            # A coordinator that was started again may not know for whom Ray Train waits.
            if time.monotonic() - home_since >= AGENTS_HOME_SECONDS:
                return

    def _tell_drained(self, coordinator: Any) -> None:
        """Of nodes that somebody has drained: again and again, since a coordinator that starts again forgets them."""
        for node_id, until in draining_nodes().items():
            when = f" until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S} UTC" if until else ""
            coordinator.tell.remote(NodeLeaves(node_id, f"Ray drains it{when}"))

    def _outlives_controller(self, coordinator: Any, error: BaseException | None, status: Status) -> bool:
        """Whether Ray Train's controller died, or gave up on an agent that was lost between two looks; another may try.

        It is a process of 200 MB on this node, which takes its agents along. Those that the next one places begin with
        the newest checkpoint.
        """
        gave_up = isinstance(error, ray.train.ControllerError)
        if not isinstance(error.controller_failure if gave_up else error, ray.exceptions.RayActorError):
            return False
        lost, newest = self._controllers_lost
        lost = 1 + (lost if status.committed_step == newest else 0)
        self._controllers_lost = lost, status.committed_step
        if lost > self.config.fault.max_node_failures_without_progress:
            return False
        self.display.line(
            f"Ray Train's controller {'gave up' if gave_up else 'died'}, and with it the node agents. Another is "
            "started, and the run goes on from its newest checkpoint. "
            + (str(error) if gave_up else "If memory ran out on this node, the kernel's log (`dmesg`) says so")
        )
        # The generation is over, and no agent of before is waited for.
        words = trainer_name(self._trainers + 1), "Ray Train's controller died, and its node agents", "controller"
        self._calls.make("the controller's death", coordinator.leave.remote, *words)
        release_nodes()
        with self.prepared.keeper.beating():
            self._stop.wait(pause_before_next_try(lost - 1, 0.0))
        return True

    def _agents_have_spoken(self, status: Status) -> bool:
        """To a coordinator that was started again, which would take a stop for that of a run without ranks."""
        return bool(status.agents) or time.monotonic() - self._life_began >= AGENTS_SPEAK_SECONDS

    def _leave_bad_nodes(self, coordinator: Any, status: Status, new_faults: list[NodeFault]) -> None:
        """Has the agents start anew on other nodes, once a verdict named one of theirs and as many others are free."""
        if self._leave is None and self._bad_nodes.are_left(new_faults, status):
            self._move(coordinator, "the run leaves a node that a verdict named", "agents")

    def _take_more_nodes(self, coordinator: Any, status: Status) -> None:
        """Has a run that started on fewer nodes than wanted save, and its agents start anew, once there are more."""
        if self._leave is not None or self._stop.is_set() or not status.running or status.waits_for_seats:
            return
        if self._seats.may_grow(besides=[*self._excluded, *(agent.node_id for agent in status.agents)]):
            self._move(coordinator, "there are nodes for more ranks")

    def _move(self, coordinator: Any, cause: str, what: What | None = None) -> None:
        """Has the agents of this trainer go home, and start anew on other nodes. what: as in `RunCoordinator.leave`."""
        before = trainer_name(self._trainers + 1)
        self._leave = lambda: coordinator.leave.remote(before, cause, what)
        self._calls.make("the agents' leave", self._leave)

    def _status(self, coordinator: Any) -> Status:
        """What the coordinator knows; what one that has ordered no generation yet cannot know is as in the record.

        Raises ClusterLost when the cluster is gone.
        """
        status = self._ask(coordinator)
        # Ray started it again: it numbers its events anew, and knows of no stop.
        if status.ledger.life != self._life:
            if self._life:
                self._life_began = time.monotonic()
                cause = "the run coordinator died, and was started again"
                self._incidents.notes("coordinator", where="", cause=cause, step=self.prepared.keeper.record.step)
                named = [fault.node_id for fault in self._faults_seen]
                self._calls.make("the bad nodes", coordinator.knows_bad_nodes.remote, named)
                if self._leave is not None:
                    self._calls.make("the agents' leave", self._leave)
            self._life, self._events_seen, self._told_to_stop = status.ledger.life, 0, False
            status = self._ask(coordinator)
        if status.agents:
            return status
        record = self.prepared.keeper.record
        return replace(status, generation=record.generation, step=record.step, metrics=record.metrics or {})

    def _ask(self, coordinator: Any) -> Status:
        """Raises ClusterLost.

        Asked in a thread: when the cluster's processes are killed even a call with a timeout does not come back.
        """
        asked = self._calls.ask(lambda: ray.get(coordinator.status.remote(self._events_seen)))
        began, limit = time.monotonic(), CLUSTER_LOST_SECONDS if self._life else FIRST_ANSWER_SECONDS
        while True:
            if self._cluster is not None:
                self._cluster.check()
            try:
                return cast(Status, asked.result(STATUS_SECONDS))
            except (ray.exceptions.RayError, TimeoutError) as error:
                if isinstance(error, TimeoutError) and time.monotonic() - began < limit:
                    continue
                raise ClusterLost(
                    "the Ray cluster no longer answers: its processes were killed, or this machine was cut off. "
                    "Start the run again: it goes on from its newest checkpoint"
                ) from error

    def _keep_ledger(self, coordinator: Any, keeper: RecordKeeper, status: Status) -> None:
        """Books what the coordinator did, and tells it of what it has not lived to see."""
        before = status.ledger.life, keeper.hear_ledger(status.ledger)
        if before != self._before:
            self._before, self._words = before, self._words + 1
            self._calls.make("the ledger", coordinator.ran_before.remote, self._words, before[1])

    def _keep_record(self, keeper: RecordKeeper, status: Status) -> None:
        """Writes what changed at once, and else a heartbeat now and then."""
        facts = self.facts(status)
        told_at_once = ("generation", "state", "node_faults", "incidents", "notified")
        changed = any(facts[name] != getattr(keeper.record, name) for name in told_at_once)
        (keeper.update if changed else keeper.beat)(**facts)

    def facts(self, status: Status) -> dict[str, Any]:
        """What the record says of a run that goes on. What this coordinator does not know is as an earlier one said."""
        record, incidents = self.prepared.keeper.record, self._incidents_with(status)
        return {
            "state": "running" if status.running else "preparing",
            "generation": status.generation,
            "agents": [{"host": agent.host, "pid": agent.pid} for agent in status.agents],
            "step": status.step,
            "metrics": status.metrics,
            "node_faults": list(self._node_faults) or None,
            "committed_step": record.committed_step if status.committed_step is None else status.committed_step,
            "incidents": incidents or None,
            "notified": self._notifier.notified(incidents) or None,
        }

    def _incidents_with(self, status: Status) -> list[dict[str, Any]]:
        """Of the whole run. Once a step was done, those of processes that died are over too."""
        known = self.prepared.keeper.record.incidents or []
        resume_step = status.resume_step or 0
        if status.running and status.step > resume_step:
            known = settled(known, unix=time.time(), resume_step=resume_step)
        return merged(known, [*status.incidents, *self._incidents.seen()])


def start_coordinator(config: Config, run_url: str, last_generation: int, claim_number: int) -> Any:
    """The run's coordinator as an actor of this process, on this process's node.

    Ray puts an actor that asks for nothing on any node: with that node's death the driver would take the cluster for
    lost before Ray has noticed. Without the driver's own node there is no run anyway.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class = ray.remote(RunCoordinator).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor_class.remote(config.model_dump(mode="json"), run_url, last_generation, claim_number)


class _InThread(threading.Thread):
    """A call in a thread, so that the main thread stays free for signals and the display."""

    def __init__(self, call: Callable[[], Any]):
        super().__init__(name="ray-train-fit", daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:
            # The driver shows it, with the coordinator's own cause where it has one.
            self.error = error
