"""The driver's own part of a run: what it does when the coordinator under it is another one, and where that lives."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from tiny import job_text
from waiting import wait_for

from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.errors import RunFailed, RunInUse, StoreError, TrackingError
from raynium.health.faults import classify
from raynium.health.metadata_service import Instance
from raynium.launch import bad_nodes as bad_nodes_module
from raynium.launch import driver as driver_module
from raynium.launch import page as page_module
from raynium.launch import stop_signals
from raynium.launch.driver import Driver
from raynium.launch.notify import notifier_of
from raynium.launch.preparation import Prepared
from raynium.launch.ray_environment import RAY_DEFAULTS
from raynium.run.coordinator import RunCoordinator
from raynium.run.fence import claim_key
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.run.protocol import (
    AgentInfo,
    CannotGoOn,
    NodeEnded,
    Order,
    Outcome,
    Progressed,
    RankExit,
    RankTimes,
    Said,
    StandBy,
    Status,
    TimesSeen,
    Uploaded,
)
from raynium.run.record import claim
from raynium.storage.process import Owner
from raynium.storage.store import Store
from raynium.terminal.display import Display
from raynium.tracking.ledger import Ledger
from raynium.tracking.runs import TrackedRun

DMA_ERROR = "NEURON_HW_ERR=DMA_ERROR instance-id=i-0a1 nd-id=2 nc-id=1 serial-num=7 action=TERMINATE_INSTANCE"
CONFIG = parse_config(job_text({"cluster.ranks_per_node": 1}))
MLFLOW = TrackedRun("id", "0", "sqlite:////nowhere")
PREPARED = cast(
    Any,
    SimpleNamespace(
        config=CONFIG,
        store=Store("/nowhere/run"),
        keeper=SimpleNamespace(record=SimpleNamespace(node_faults=None, incidents=None)),
        mlflow=MLFLOW,
        open_mlflow=None,
    ),
)


class Actor:
    """A coordinator as Ray shows an actor, whose process can die: Ray then starts another, without memory."""

    def __init__(self, run_url: str, config: Config = CONFIG):
        self._run_url, self._config = run_url, config
        self.start_again()

    def start_again(self) -> None:
        self.on_loop = CoordinatorOnLoop(RunCoordinator(self._config.model_dump(mode="json"), self._run_url, 0, 1))

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(
            remote=lambda *arguments: self.on_loop.run(lambda each: getattr(each, method)(*arguments))
        )


class Watched:
    """A driver that watches a coordinator of ours, in a thread."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, config: Config = CONFIG):
        self.drained: dict[str, float | None] = {}
        monkeypatch.setattr(driver_module, "draining_nodes", lambda: self.drained)
        monkeypatch.setattr(driver_module, "STATUS_SECONDS", 0.01)
        monkeypatch.setattr(driver_module.ray, "get", lambda future: future.result())
        store = Store(folder / "run")
        self.keeper = claim(store, "test", config.model_dump(mode="json"))
        self.log = folder / "driver.log"
        prepared = Prepared(config, store, self.keeper, MLFLOW, lambda: MLFLOW, cast(Any, None), str(folder), self.log)
        self.actor = Actor(store.url, config)
        self.display = Display(4, Console(quiet=True), self.log)
        self.driver = Driver(prepared, self.display, notifier_of(config.fault, self.keeper, self.display.line))
        self.ended: Future[Status] = Future()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.actor.on_loop.tell(CannotGoOn("the test is over"))
        self._thread.join(30)

    def _run(self) -> None:
        fitting = cast(Any, SimpleNamespace(is_alive=lambda: True))
        with self.display:
            try:
                self.ended.set_result(self.driver._watch(self.actor, fitting, self.keeper))
            except BaseException as error:
                self.ended.set_exception(error)

    def told(self, text: str) -> bool:
        return text in self.log.read_text()


AGENT = AgentInfo("a", 0, 1, "127.0.0.1", 29500, pid=1)


def test_a_coordinator_that_was_started_again_is_told_of_the_stop_and_its_events_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watched(tmp_path, monkeypatch) as watched:
        order = watched.actor.on_loop.join(AGENT).result(60)
        assert isinstance(order, Order) and order.generation == 1
        watched.actor.on_loop.tell(Progressed(order.generation_id, 3, {"train/loss": 2.5}, Ledger())).result()
        wait_for(lambda: watched.keeper.record.step == 3)
        watched.driver.request_stop("SIGTERM")
        assert watched.actor.on_loop.watch(AGENT, order, stop_known=False).result(60).kind == "stop"

        monkeypatch.setattr(driver_module, "AGENTS_SPEAK_SECONDS", 0.1)
        watched.actor.start_again()  # before any rank could save
        watched.actor.on_loop.tell(Said("first words of another life")).result()
        status = watched.ended.result(60)
        assert (status.ended, status.step, status.generation) == ("stopped", 3, 1)
        assert status.metrics == {"train/loss": 2.5}
        assert watched.told("first words of another life")


def test_a_stop_reaches_ranks_whose_coordinator_was_started_again_after_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watched(tmp_path, monkeypatch) as watched:
        order = watched.actor.on_loop.join(AGENT).result(60)
        wait_for(lambda: watched.keeper.record.generation == 1)
        watched.actor.start_again()
        watched.driver.request_stop("SIGTERM")
        time.sleep(0.2)
        assert not watched.ended.done(), "it would end without a save"
        verdict = watched.actor.on_loop.watch(AGENT, order, stop_known=False).result(60)
        assert verdict.kind == "stop"


def test_agents_that_are_to_leave_once_saved_do_so_though_the_coordinator_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = replace(AGENT, attempt="000000-000001")
    with Watched(tmp_path, monkeypatch) as watched:
        order = watched.actor.on_loop.join(agent).result(60)
        wait_for(lambda: watched.keeper.record.generation == 1)
        watched.driver._move(watched.actor, "there are nodes for more ranks")
        assert watched.actor.on_loop.watch(agent, order, stop_known=False).result(60).kind == "stop"
        watched.actor.start_again()
        wait_for(lambda: watched.driver._life_began > 0)
        assert watched.actor.on_loop.watch(agent, order, stop_known=False).result(60).kind == "stop"


def test_a_coordinator_that_was_started_again_hears_which_nodes_verdicts_have_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = classify([], [DMA_ERROR])
    assert fault is not None
    bad, good = replace(AGENT, node_id="n0"), replace(AGENT, seat=1, node_id="n1")
    died = RankExit(0, -9, "was killed", retry=True, fault=fault)
    monkeypatch.setattr(bad_nodes_module, "free_nodes", lambda *_, **__: [])
    with Watched(tmp_path, monkeypatch) as watched:
        order = watched.actor.on_loop.join(bad).result(60)
        watched.actor.on_loop.exited(bad, order, NodeEnded((died,))).result(60)
        wait_for(lambda: watched.keeper.record.node_faults is not None)
        watched.actor.start_again()
        wait_for(lambda: watched.driver._life_began > 0)
        first = watched.actor.on_loop.join(replace(bad, last_generation=1)).result(60)
        assert isinstance(first, Order) and first.seats == (0,), "there is no other"
        watching = watched.actor.on_loop.watch(bad, first, stop_known=False)
        assert watched.actor.on_loop.join(good).result(60) == StandBy(2)
        assert watching.result(60).kind == "stop"


def test_a_run_saves_and_stops_before_its_capacity_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=890)
    changes = {"cluster.ranks_per_node": 1, "cluster.ends_at": f"{ends:%Y-%m-%dT%H:%MZ}", "fault.stop_seconds": 900.0}
    with Watched(tmp_path, monkeypatch, parse_config(job_text(changes))) as watched:
        assert watched.ended.result(60).ended == "stopped"
        assert watched.driver.stopped_by == "cluster.ends_at"
        assert watched.told(f"the nodes will be taken away at {ends:%Y-%m-%dT%H:%MZ}")


def test_a_node_that_is_drained_is_left_for_a_spare_after_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "STOP_POLL_SECONDS", 0.01)
    drained, spare = replace(AGENT, node_id="n0"), replace(AGENT, seat=1, node_id="n1")
    with Watched(tmp_path, monkeypatch) as watched:
        run = watched.actor.on_loop
        order = run.join(drained).result(60)
        assert run.join(spare).result(60) == StandBy(1)
        takes_over = run.join(replace(spare, last_generation=1))
        watching = run.watch(drained, order, stop_known=False)
        watched.drained["n0"] = 1_764_500_000.0
        assert watching.result(60).kind == "stop"
        saved = RankExit(0, 0, None, retry=False, outcome=Outcome(0, "stopped"))
        monkeypatch.setattr("raynium.run.saves.Saves.problem", lambda saves, step: None)
        run.exited(drained, order, NodeEnded((saved,))).result(60)
        stands_by = run.join(replace(drained, last_generation=1))
        second = takes_over.result(60)
        assert isinstance(second, Order) and second.seats == (1,)
        assert stands_by.result(60) == StandBy(2)
        wait_for(lambda: watched.told("node 0 (127.0.0.1) will leave: Ray drains it until 2025-11-30 10:53:20 UTC"))
        wait_for(lambda: watched.told("generation 1 saves and ends: 127.0.0.1 will leave"))


def test_a_store_and_a_page_that_are_away_are_told_once_and_have_it_all_when_they_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "STOP_POLL_SECONDS", 0.01)
    monkeypatch.setattr(page_module, "PAGE_RETRY_SECONDS", 0.01)
    away = threading.Event()
    away.set()
    tried: list[str] = []
    page: dict[str, str] = {}

    def exists(self: Store, key: str) -> bool:
        tried.append("store")
        if away.is_set():
            raise StoreError("no answer of S3")
        return False

    def set_tags(uri: str, run_id: str, tags: dict[str, str]) -> None:
        tried.append("page")
        if away.is_set():
            raise TrackingError("no answer of MLflow")
        page.update(tags)

    monkeypatch.setattr(Store, "exists", exists)
    monkeypatch.setattr(page_module, "set_tags", set_tags)
    fault = classify([], [DMA_ERROR])
    assert fault is not None
    with Watched(tmp_path, monkeypatch) as watched:
        order = watched.actor.on_loop.join(AGENT).result(60)
        assert isinstance(order, Order)
        watched.driver._excluded.append("")  # this node: there is no other to go to
        watched.actor.on_loop.exited(AGENT, order, NodeEnded(fault=fault)).result(60)
        wait_for(lambda: min(tried.count("store"), tried.count("page")) > 5)
        away.clear()
        wait_for(lambda: "node_fault.1" in page)
        log = watched.log.read_text()
        assert (log.count("no answer of S3"), log.count("no answer of MLflow")) == (1, 1)
        assert page["raynium.state"] in ("running", "preparing") and "restarts" in page["mlflow.note.content"]


def test_a_driver_whose_run_was_taken_over_ends_and_writes_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, str]] = []
    monkeypatch.setattr(page_module, "set_tags", lambda uri, run_id, tags: written.append(tags))
    watched = Watched(tmp_path, monkeypatch)
    other = json.dumps(asdict(Owner("elsewhere", "boot", 7, "7"))).encode()
    Store(tmp_path / "run").write_new(claim_key(2), other)
    # It was frozen since its last look.
    monkeypatch.setattr("raynium.run.record.HEARTBEAT_SECONDS", 0.0)
    with watched, pytest.raises(RunInUse, match="taken over by process 7 on elsewhere"):
        watched.ended.result(60)
    assert written == []


def test_the_heart_beats_while_agents_still_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else others take the run for dead, which it is not."""
    monkeypatch.setattr("raynium.run.record.HEARTBEAT_SECONDS", 0.01)
    watched = Watched(tmp_path, monkeypatch)
    beats: set[float] = set()
    ending = threading.Event()
    monkeypatch.setattr(watched.keeper, "finishing", ending.set)
    deadline = time.monotonic() + 120

    def upload() -> None:
        watched.actor.on_loop.join(AGENT).result()
        watched.actor.on_loop.tell(CannotGoOn("rank 0: loss nan")).result()
        wait_for(lambda: ending.is_set())
        while len(beats) < 4:
            assert time.monotonic() < deadline, "no heartbeat"
            beats.add(json.loads((tmp_path / "run/run.json").read_text())["heartbeat_unix"])

    run_without_ray(watched, monkeypatch, upload, fails_with="loss nan")
    assert len(beats) == 4


def test_what_was_sent_while_the_run_goes_on_is_in_its_record_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(job_text({"cluster.ranks_per_node": 1, "fault.notify_command": ["true"]}))
    with Watched(tmp_path, monkeypatch, config) as watched:
        watched.actor.on_loop.tell(Said("the uploader died", "uploader", "127.0.0.1")).result()
        kept = wait_for(lambda: watched.keeper.record.notified)
    incidents = watched.keeper.record.incidents or []
    assert kept == [each["key"] for each in incidents] and len(kept) == 1
    assert not watched.told("fault.notify_command")


def run_without_ray(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, fit: Callable[[], None], fails_with: str
) -> None:
    """All of a driver's run. fit: what Ray Train and the agents do."""
    monkeypatch.setattr(driver_module, "start_coordinator", lambda *arguments: watched.actor)
    monkeypatch.setattr(driver_module, "name_job", lambda name: None)
    monkeypatch.setattr(driver_module, "ClusterWatch", lambda **addresses: contextlib.nullcontext())
    monkeypatch.setattr(driver_module, "raylet_address", lambda: "127.0.0.1:2")
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(driver_module.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(watched.driver, "_trainer", lambda coordinator: SimpleNamespace(fit=fit))
    with watched.display, pytest.raises(RunFailed, match=fails_with):
        watched.driver.run()


def test_what_became_of_a_bad_instance_is_in_the_record_also_where_its_fault_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = classify([], [DMA_ERROR])
    watched = Watched(tmp_path, monkeypatch, parse_config(job_text({"fault.bad_instance": "reboot"})))

    def break_and_end() -> None:
        order = watched.actor.on_loop.join(AGENT).result()
        # Both before the driver looks again.
        watched.actor.on_loop.tell(CannotGoOn("its hardware broke"))
        watched.actor.on_loop.exited(AGENT, order, NodeEnded(fault=fault)).result()

    run_without_ray(watched, monkeypatch, break_and_end, fails_with="its hardware broke")
    (incident,) = [each for each in watched.keeper.record.incidents or () if each["what"] == "node"]
    assert incident["where"] == "127.0.0.1" and "it is no EC2 instance" in incident["cause"]


class Crew:
    """Two nodes that train, a spare if there is one, and a driver that asks EC2 to end a bad one. Seat 1 is bad."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, spare: bool):
        self.asked: list[str] = []
        monkeypatch.setattr(
            bad_nodes_module, "ask_ec2", lambda call, *, instance_id, region: self.asked.append(instance_id)
        )
        for name, answer in {"own_nodes": set(), "users_of": [], "free_nodes": []}.items():
            monkeypatch.setattr(bad_nodes_module, name, lambda *_, answer=answer, **__: answer)
        monkeypatch.setattr("raynium.run.saves.Saves.problem", lambda saves, step: None)
        changes = {"cluster.nodes": 2, "cluster.ranks_per_node": 1, "cluster.spares": int(spare)}
        changes |= {"fault.stragglers": "leave", "fault.bad_instance": "terminate"}
        self.watched = Watched(tmp_path, monkeypatch, parse_config(job_text(changes)))
        self.run = self.watched.actor.on_loop
        self.agents = [
            AgentInfo(
                "a", seat, 2, f"127.0.0.{seat + 2}", 29500, pid=1, node_id=f"n{seat}",
                instance=Instance(f"i-{seat}", "us-west-2"),
            )
            for seat in range(2 + spare)
        ]  # fmt: skip

    def starts(self) -> Order:
        joins = [self.run.join(each) for each in self.agents[:2]]
        order, _ = (join.result(60) for join in joins)
        assert isinstance(order, Order) and order.seats == (0, 1)
        self.agents = [replace(each, last_generation=1) for each in self.agents]
        if self.agents[2:]:
            self.run.join(self.agents[2])
        return order

    def waits(self) -> None:
        """The driver has looked a few times, and has not asked EC2."""
        time.sleep(0.2)
        assert not self.asked

    def goes_on(self, *seats: int) -> None:
        """The next generation is on these."""
        joins = [self.run.join(each) for each in self.agents[:2]]
        wait_for(lambda: all(join.done() for join in joins))
        orders = [join.result() for join in joins]
        assert {order.seats for order in orders if isinstance(order, Order)} == {seats}
        if 1 not in seats:
            assert orders[1] == StandBy(2)


def test_the_ranks_of_a_straggler_save_and_go_on_on_the_spare_before_its_instance_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(tmp_path, monkeypatch, spare=True)
    with crew.watched:
        order = crew.starts()
        watching = [crew.run.watch(agent, order, stop_known=False) for agent in crew.agents[:2]]
        for step in (20, 40, 60, 80):
            for node_rank in (0, 1):
                own = 0.1 + 0.5 * node_rank
                crew.run.tell(TimesSeen(1, node_rank, {node_rank: RankTimes(step, own, own, own, 0.6)})).result(60)
        assert [each.result(60).kind for each in watching] == ["stop", "stop"]
        wait_for(lambda: crew.watched.told("the run goes on without 127.0.0.3: a spare takes over"))
        crew.waits()
        saved = [RankExit(rank, 0, None, retry=False, outcome=Outcome(81, "stopped")) for rank in (0, 1)]
        exits = [
            crew.run.exited(agent, order, NodeEnded((exit,)))
            for agent, exit in zip(crew.agents[:2], saved, strict=True)
        ]
        for each in exits:
            each.result(60)
        crew.waits()
        crew.goes_on(0, 2)
        wait_for(lambda: crew.asked == ["i-1"])
        assert crew.watched.told("generation 1 saves and ends: a spare takes the place of 127.0.0.3")


@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("overtakes", [True, False])
def test_a_broken_node_is_ended_once_it_has_uploaded_what_it_had_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: bool, overtakes: bool
) -> None:
    """Without a spare the run stays on it, and ends with it. overtakes: that the upload has ended is heard first."""
    crew, fault = Crew(tmp_path, monkeypatch, spare=spare), classify([], [DMA_ERROR])
    with crew.watched:
        order = crew.starts()
        uploaded = Uploaded(crew.agents[1].agent_id, (order.generation_id,))
        if overtakes:
            crew.run.tell(uploaded).result(60)
        broken = RankExit(1, 1, "its hardware broke", retry=True, fault=fault)
        uploads = replace(crew.agents[1], uploading=(order.generation_id,))
        crew.run.exited(uploads, order, NodeEnded((broken,))).result(60)
        crew.agents[1] = uploads
        wait_for(lambda: crew.watched.told("the run goes on without" if spare else "the run stays on"))
        if not overtakes or spare:
            crew.waits()
        crew.run.exited(crew.agents[0], order, NodeEnded()).result(60)
        crew.goes_on(0, 2) if spare else crew.goes_on(0, 1)
        if not overtakes:
            crew.waits()
            crew.run.tell(uploaded).result(60)
        wait_for(lambda: crew.asked == ["i-1"])


def test_controllers_that_die_again_and_again_end_the_run_unless_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "pause_before_next_try", lambda tries, waited: 0.0)
    released: list[None] = []
    monkeypatch.setattr(driver_module, "release_nodes", lambda: released.append(None))
    watched = Watched(tmp_path, monkeypatch)
    driver = watched.driver
    died: Exception = driver_module.ray.exceptions.RayActorError()
    gave_up = driver_module.ray.train.ControllerError
    most = CONFIG.fault.max_node_failures_without_progress

    def goes_on(step: int | None) -> bool:
        return driver._outlives_controller(watched.actor, died, cast(Any, SimpleNamespace(committed_step=step)))

    with driver.display:
        for other in (RuntimeError("no"), gave_up(RuntimeError("no"))):
            assert not driver._outlives_controller(
                watched.actor, other, cast(Any, SimpleNamespace(committed_step=None))
            )
        assert [goes_on(None) for _ in range(most - 1)] == [True] * (most - 1)
        # A worker that is lost between two of its polls is no failure of the group to it (Ray 2.60).
        died = gave_up(driver_module.ray.exceptions.ActorUnavailableError("Socket closed", None))
        assert goes_on(None)
        assert goes_on(10) and [goes_on(10) for _ in range(most - 1)] == [True] * (most - 1)
        assert not goes_on(10)
    assert len(released) == 2 * most


def test_nodes_are_waited_for_for_days() -> None:
    """Ray Train counts each placement that did not come in time, and never forgets one."""
    seconds = float(RAY_DEFAULTS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])
    assert seconds * driver_module.CONTROLLER_FAILURE_LIMIT >= 3 * 24 * 3600


def test_the_second_sigterm_ends_at_once_unless_it_belongs_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "SECOND_SIGNAL_SECONDS", 0.2)
    driver = Driver(PREPARED, cast(Any, SimpleNamespace(line=str)), cast(Any, None))
    with stop_signals.stop_on_signals(driver.request_stop):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert driver._stop.is_set(), "and this process goes on"
        assert driver.stopped_by == "SIGTERM"
        time.sleep(0.25)
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert ended.value.code == 143


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_closed_terminal_saves_and_ends_unless_it_is_to_be_outlived(under_nohup: bool) -> None:
    driver = Driver(PREPARED, cast(Any, SimpleNamespace(line=str)), cast(Any, None))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    try:
        with stop_signals.stop_on_signals(driver.request_stop):
            os.kill(os.getpid(), signal.SIGHUP)
        assert driver._stop.is_set() is not under_nohup
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.ray
@pytest.mark.slow
def test_the_coordinator_lives_and_dies_with_the_drivers_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray._private.state import actors
    from ray.cluster_utils import Cluster

    def node(number: int) -> dict[str, Any]:
        return {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": f"127.0.0.{number}"}

    cluster = Cluster(initialize_head=True, head_node_args=node(2) | {"include_dashboard": False})
    try:
        for number in (3, 4):
            cluster.add_node(**node(number))
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        coordinators = [driver_module.start_coordinator(CONFIG, os.devnull, 0, 1) for _ in range(4)]
        ray.get([each.status.remote(0) for each in coordinators])
        here = ray.get_runtime_context().get_node_id()
        assert {actor["Address"]["NodeID"] for actor in actors().values()} == {here}
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize("knows", [True, False])
def test_an_agent_that_ray_train_never_placed_is_not_waited_for_long_at_the_end(
    monkeypatch: pytest.MonkeyPatch, knows: bool
) -> None:
    """Its coordinator was started again, and may not have been told of the one that is lost."""
    monkeypatch.setattr(driver_module, "AGENTS_HOME_SECONDS", 0.02)
    monkeypatch.setattr(driver_module, "AGENTS_END_SECONDS", 60.0)
    looks = [SimpleNamespace(waits_for_seats=False, all_are_home=home) for home in (False, True, False)]
    home = SimpleNamespace(waits_for_seats=knows, all_are_home=True)
    joined = list[float]()
    fitting = SimpleNamespace(is_alive=lambda: True, join=joined.append)
    driver = SimpleNamespace(_status=lambda _: looks.pop(0) if looks else home)
    began = time.monotonic()
    Driver._wait_for_agents(cast(Driver, driver), None, cast(Any, fitting))
    assert not looks and (len(joined) == 4 if knows else time.monotonic() - began >= 0.02)
