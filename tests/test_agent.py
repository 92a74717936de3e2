"""A node agent with real ranks, a real store and a real coordinator; only Ray and MLflow are left out."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from held_images import held_images
from tiny import job_text
from waiting import stop, wait_for

from raynium.accelerators.detect import detect
from raynium.checkpoint.catalog import latest, list_checkpoints
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import DataError, TrackingError
from raynium.node import orphans
from raynium.node.agent import Node, NodeAgent
from raynium.node.buddies import CopyError
from raynium.node.node_zero import CommitLog, WitnessedTracker
from raynium.node.ranks import RankGroup, start_template
from raynium.node.reports import Reports
from raynium.run.coordinator import RunCoordinator
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.run.points import PointsKept
from raynium.run.protocol import AgentEvent, CannotGoOn, Commit, Coordinator, News, Order, Said, ShardSaved, Status
from raynium.storage.store import Store
from raynium.tracking.ledger import CAUSES, Ledger
from raynium.tracking.tracker import MemoryTracker
from raynium.train.link import Stepped

JOB = job_text(
    {
        "optimizer.learning_rate": 3e-3,
        "train.steps": 12,
        "checkpoint.every_steps": 4,
        "checkpoint.keep_last": 2,
        "evaluate.every_steps": 6,
        "evaluate.max_documents": 2,
    }
)


class Played:
    """One run of an agent in a thread, and what came of it."""

    def __init__(
        self,
        config: Config,
        run_folder: Path,
        document_folder: Path,
        make_coordinator: Callable[[RunCoordinator], CoordinatorOnLoop] = CoordinatorOnLoop,
    ):
        self.run_folder = run_folder
        self.tracker = MemoryTracker()
        self.began = time.monotonic()
        self.coordinator = make_coordinator(RunCoordinator(config.model_dump(mode="json"), str(run_folder), 0, 1))
        self.agent = NodeAgent(
            config=config,
            run_url=str(run_folder),
            node=Node("a", 0, 1, "127.0.0.1"),
            accelerator=detect("cpu"),
            coordinator=self.coordinator,
            open_tracker=lambda: self.tracker,
            data_places=lambda: [str(document_folder)],
        )
        self.thread = threading.Thread(target=self.agent.run)
        self._uploading = self.agent._saving._uploader._lock

    def hold_uploads(self) -> None:
        """Before the start: the ranks then wait in their third save, however long whoever watches them is away."""
        self._uploading.acquire()

    def let_uploads_go(self) -> None:
        if self._uploading.locked():
            self._uploading.release()

    def status(self) -> Status:
        return self.coordinator.run(lambda each: each.status(0)).result()

    def finish(self) -> Status:
        self.thread.join(120)
        assert not self.thread.is_alive()
        status = self.status()
        self.coordinator.close()
        return status

    def losses(self) -> dict[int, list[float]]:
        """step → its loss, once for each generation that computed it."""
        losses: dict[int, list[float]] = {}
        for step, loss in self.tracker.values("train/loss"):
            losses.setdefault(step, []).append(loss)
        return losses

    def check_goodput(self) -> None:
        """The ledger that MLflow has at the end tells of rank 0 what its metrics tell, each step once as trained."""
        first: dict[int, float] = {}
        every = self.tracker.values("time/step_seconds")
        for step, seconds in every:
            first.setdefault(step, seconds)
        expected = {
            "train": sum(first.values()),
            "repeat": sum(seconds for _, seconds in every) - sum(first.values()),
            "evaluate": sum(seconds for _, seconds in self.tracker.values("time/eval_seconds")),
            "save": sum(seconds for _, seconds in self.tracker.values("checkpoint/stall_seconds")),
            "down": 0.0,
            "compile": 0.0,
        }
        last = {name: self.tracker.values(f"goodput/{name}_seconds")[-1] for name in (*CAUSES, "wall")}
        assert {name: last[name][1] for name in expected} == pytest.approx(expected)
        assert sum(last[cause][1] for cause in CAUSES) == pytest.approx(last["wall"][1])
        assert {step for step, _ in last.values()} == {max(first)}
        assert all(last[cause][1] > 0 for cause in ("start", "load", "train", "save", "finish", "other"))


@pytest.fixture
def play(tmp_path: Path, document_folder: Path) -> Iterator[Callable[..., Played]]:
    """Starts an agent of the one run in `tmp_path`; a second one goes on where the first ended."""
    played: list[Played] = []

    def start(
        data_folder: Path = document_folder,
        make_coordinator: Callable[[RunCoordinator], CoordinatorOnLoop] = CoordinatorOnLoop,
        hold_uploads: bool = False,
        **changes: Any,
    ) -> Played:
        run = Played(parse_config(JOB, changes), tmp_path / "run", data_folder, make_coordinator)
        played.append(run)
        if hold_uploads:
            run.hold_uploads()
        run.thread.start()
        return run

    yield start
    for run in played:
        if run.thread.is_alive():
            run.let_uploads_go()
        run.thread.join(60)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, document_folder: Path) -> Played:
    run = Played(parse_config(JOB), tmp_path_factory.mktemp("reference") / "run", document_folder)
    run.thread.start()
    assert run.finish().ended == "finished"
    return run


def test_a_run_ends_with_its_checkpoints_and_metrics(uninterrupted: Played) -> None:
    assert sorted(uninterrupted.losses()) == list(range(1, 13))
    assert [each.step for each in list_checkpoints(Store(uninterrupted.run_folder))] == [8, 12]
    assert [step for step, _ in uninterrupted.tracker.values("eval/bits_per_byte")] == [6, 12]
    assert uninterrupted.losses()[12] < uninterrupted.losses()[1]
    assert uninterrupted.tracker.closed
    for name in ("stall", "longest_stall", "upload", "commit"):
        times = uninterrupted.tracker.values(f"checkpoint/{name}_seconds")
        assert sorted(step for step, _ in times) == [4, 8, 12] and all(seconds > 0 for _, seconds in times), name
    listed = json.loads(uninterrupted.tracker.artifacts["checkpoints.json"])
    assert [(each["step"], each["world_size"]) for each in listed] == [(8, 2), (12, 2)]
    assert listed[1]["metrics"].keys() == {"eval/loss", "eval/bits_per_byte"}
    assert not held_images(os.getpid())
    uninterrupted.check_goodput()
    assert uninterrupted.tracker.values("goodput/restart_seconds")[-1][1] == 0


def test_the_ledger_goes_to_mlflow_now_and_then_and_its_last_step_is_left_for_the_end(
    tmp_path: Path, document_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raynium.node.reports.LEDGER_SECONDS", 3600)
    monkeypatch.setattr("raynium.node.reports.REPORT_SECONDS", 0)
    run = Played(parse_config(JOB), tmp_path / "run", document_folder)
    reports = Reports(
        run.agent.config,
        run.coordinator,
        peak_flops_per_rank=lambda: None,
        halted=lambda rank: False,
    )
    world = World.of(run.agent.config)
    reports.begin_generation(Order(world, (0,), (0,), 1, "g1", "127.0.0.1", 1), world.ranks_of(0), run.tracker)

    def step(number: int) -> None:
        reports.take(0, Stepped(number, {"time/step_seconds": 0.001}))
        run.status()  # once it has answered, it has answered what was asked before

    step(12)
    wait_for(lambda: reports._goodput_metrics)
    for number in (12, 3, 4, 5):
        step(number)
    assert [step for step, _ in run.tracker.values("goodput/ratio")] == [3]

    # The first save that is left out is an incident; of the others there is a line.
    for number in (1.0, 2.0):
        reports.take(0, Stepped(6, {"checkpoint/skipped_saves": number}))
    status = run.status()
    run.coordinator.close()
    (incident,) = (each for each in status.incidents if each.what == "checkpoint")
    assert incident.cause.startswith("step 6: no checkpoint, because earlier ones are still being uploaded")
    assert sum("no checkpoint, because" in each.text for each in status.events) == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_one_generation_and_changes_no_bit(
    play: Callable[..., Played],
    uninterrupted: Played,
    victim: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once with spares that take the place of the ranks, and once before there are any."""
    monkeypatch.setattr("raynium.node.agent.SPARES_AFTER_SECONDS", 0.0 if victim else 1e9)
    caplog.set_level(logging.INFO)
    run = play(hold_uploads=True)
    wait_for(lambda: any(len(held.ranks) == 2 for held in run.agent._saving.images.held()))
    spares = list[int]()
    if victim:
        wait_for(lambda: run.agent._spares is not None and run.agent._spares.are_ready())
        spares = run.agent._spares.pids() if run.agent._spares is not None else []
    os.kill(run.agent.rank_pids()[victim], signal.SIGKILL)
    wait_for(lambda: run.status().generation == 2)
    if victim:
        wait_for(lambda: run.agent.rank_pids() == spares)
    run.let_uploads_go()
    assert any("from the snapshot of step" in each.text for each in run.status().events)
    assert len(held_images(os.getpid())) == 8, "two images and two of replicas for each rank, in every generation"
    status = run.finish()
    assert (status.ended, status.generation) == ("finished", 2)
    told = "\n".join(each.text for each in status.events)
    assert f"generation 1 failed: rank {victim}: killed by SIGKILL" in told
    phases = ["settle", "drain", "agree", "fork", "start", "group", "build", "restore", "data", "fetch", "step"]
    (recovery,) = re.findall(r"the next step was done \S+ s after the failure was seen: (.*)", told)
    assert [part.split()[0] for part in recovery.split(", ")] == phases
    reference = uninterrupted.losses()
    for step, losses in run.losses().items():
        assert set(losses) == set(reference[step]), f"step {step}"
    assert run.tracker.values("eval/bits_per_byte")[-1] == uninterrupted.tracker.values("eval/bits_per_byte")[-1]
    run.check_goodput()
    booked = status.ledger.booked
    assert min(booked.notice, booked.restart, booked.restore) > 0 and booked.wait == 0
    assert 0 < status.ledger.booked.total < time.monotonic() - run.began


def test_a_run_goes_on_from_a_snapshot_that_is_no_checkpoint_and_changes_no_bit(
    play: Callable[..., Played], tmp_path: Path, document_folder: Path
) -> None:
    """With both checkpoints on their way to a store that does not answer, the third image still takes snapshots."""
    changes = {"train.steps": 40, "checkpoint.every_steps": 10, "fault.snapshot_every_steps": 1}
    reference = Played(parse_config(JOB, changes), tmp_path / "reference", document_folder)
    reference.thread.start()
    assert reference.finish().ended == "finished"
    run = play(hold_uploads=True, **changes)
    wait_for(lambda: any(held.step > 20 and len(held.ranks) == 2 for held in run.agent._saving.images.held()))
    os.kill(run.agent.rank_pids()[1], signal.SIGKILL)
    wait_for(lambda: run.status().generation == 2)
    run.let_uploads_go()
    status = run.finish()
    assert status.ended == "finished"
    told = "\n".join(each.text for each in status.events)
    (step,) = re.findall(r"from the snapshot of step (\d+) in memory", told)
    assert 20 < int(step) < 30
    for number, losses in run.losses().items():
        assert set(losses) == set(reference.losses()[number]), f"step {number}"
        assert len(losses) == 1 or number > int(step), "steps before the snapshot are not made again"
    assert [each.step for each in list_checkpoints(Store(run.run_folder))] == [30, 40]
    assert {number for number, _ in reference.tracker.values("snapshot/stall_seconds")} <= set(range(1, 40))
    assert len(reference.tracker.values("snapshot/stall_seconds")) > 10


def test_a_snapshot_that_another_node_cannot_give_costs_a_generation_and_no_more(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, forked = NodeAgent._fork, list[int]()

    def fetch_first(agent: NodeAgent, order: Order, *arguments: Any, **named: Any) -> RankGroup:
        forked.append(order.generation)
        if order.generation == 1:
            raise CopyError("the snapshot of step 4 could not be had from 127.0.0.3: it has no such copy")
        return fork(agent, order, *arguments, **named)

    monkeypatch.setattr(NodeAgent, "_fork", fetch_first)
    run = play(**{"train.steps": 2})
    status = run.finish()
    assert status.ended == "finished" and forked == [1, 2]
    told = [event.text for event in status.events]
    assert any("generation 1 failed: rank 0: the snapshot of step 4 could not be had from" in text for text in told)


def test_commits_go_on_being_written_down_after_a_disk_was_full() -> None:
    class FullOnce(MemoryTracker):
        def artifact(self, path: str, text: str) -> None:
            if text == "first":
                raise TrackingError("no space left on device")
            super().artifact(path, text)

    class Calls:
        def tell(self, event: AgentEvent) -> "Future[News]":
            told.append(event)
            answer: Future[News] = Future()
            answer.set_result(News(Ledger(), {}))
            return answer

        def commits(self, sent: Commit | None) -> "Future[Any]":
            answer: Future[Any] = Future()
            after = 0 if sent is None else sent.number
            text = ("first", "second", None)[after]
            answer.set_result([Commit("a", after + 1, 10 * after, {"checkpoint/bytes": 1.0}, text)] if text else None)
            return answer

    told: list[AgentEvent] = []
    tracker, calls = FullOnce(), cast(Coordinator, Calls())
    CommitLog(calls, WitnessedTracker(tracker, calls, tenure=("a", 1), resume_step=None)).close()
    assert [step for step, _ in tracker.values("checkpoint/bytes")] == [0, 10]
    assert tracker.artifacts == {"checkpoints.json": "second"}
    kept = [point.step for event in told if isinstance(event, PointsKept) for point in event.points]
    assert kept == [0, 10], "the coordinator tells of no commit again that was answered"


def test_a_stop_saves_at_the_next_step_and_the_next_driver_goes_on(
    play: Callable[..., Played], uninterrupted: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    broadcast, told = RankGroup.broadcast, threading.Event()

    def note(group: RankGroup, message: dict[str, Any]) -> None:
        broadcast(group, message)
        told.set()

    monkeypatch.setattr(RankGroup, "broadcast", note)
    first = play(hold_uploads=True, **{"checkpoint.every_steps": 1})
    wait_for(lambda: 3 in first.losses())  # and no further than its save
    first.coordinator.run(stop).result()
    assert told.wait(60)
    first.let_uploads_go()
    status = first.finish()
    assert status.ended == "stopped"
    stopped_at = status.step
    checkpoint = latest(Store(first.run_folder))
    assert checkpoint is not None and checkpoint.step == stopped_at < 12
    second = play()
    assert second.finish().ended == "finished"
    assert min(second.losses()) == stopped_at + 1
    assert second.losses()[12] == uninterrupted.losses()[12]


@pytest.fixture
def blocked_step(tmp_path: Path) -> Path:
    """A file where the folder of the last checkpoint should be."""
    path = tmp_path / "run/checkpoints/step-000000012"
    path.parent.mkdir(parents=True)
    path.write_text("in the way")
    return path


def wait_until_it_tries_again(run: Played) -> None:
    told = "node 0: 2 shard(s) of step 12 are still in memory only, and are uploaded again in 2 s"
    wait_for(lambda: any(told in each.text for each in run.status().events))


def test_a_last_checkpoint_that_failed_is_saved_from_memory_once_it_can_be(
    play: Callable[..., Played], uninterrupted: Played, blocked_step: Path
) -> None:
    run = play()
    wait_until_it_tries_again(run)
    assert run.status().committed_step == 8
    blocked_step.unlink()
    status = run.finish()
    assert (status.ended, status.committed_step) == ("finished", 12)
    assert "checkpoint of step 12 is saved after all" in [each.text for each in status.events]
    newest, same = latest(Store(run.run_folder)), latest(Store(uninterrupted.run_folder))
    assert newest is not None and same is not None and newest.step == 12
    assert [file.crc64nvme for file in newest.manifest.shards] == [file.crc64nvme for file in same.manifest.shards]


class DyingCoordinator(CoordinatorOnLoop):
    """Loses its memory when the first shard of the last save has come in. As Ray does, it makes waiting calls again."""

    def __init__(self, coordinator: RunCoordinator):
        super().__init__(coordinator)
        self.lives = 1
        self._lock = threading.Lock()
        self._waiting: dict[Future[Any], Callable[[RunCoordinator], Any]] = {}
        self._inside: list[Future[Any]] = []

    def tell(self, event: AgentEvent) -> "Future[News]":
        if not (isinstance(event, ShardSaved) and event.step == 12 and self.lives == 1):
            return super().tell(event)
        super().tell(event).result()
        with self._lock:
            self.lives = 2
            for call in self._inside:
                call.cancel()
            config = self.coordinator._config.model_dump(mode="json")
            self.coordinator = RunCoordinator(config, self.coordinator._saves._store.url, 0, 1)
            for answer in list(self._waiting):
                self._send(answer)
        return super().tell(Said("what it said before is forgotten"))

    def run(self, call: Callable[[RunCoordinator], Any]) -> "Future[Any]":
        answer: Future[Any] = Future()
        with self._lock:
            self._waiting[answer] = call
            self._send(answer)
        return answer

    def _send(self, answer: "Future[Any]") -> None:
        life = self.lives

        def done(found: "Future[Any]") -> None:
            if life == self.lives and self._waiting.pop(answer, None) is not None:
                answer.set_result(found.result())

        self._inside.append(super().run(self._waiting[answer]))
        self._inside[-1].add_done_callback(done)


def test_a_coordinator_that_dies_in_the_last_save_hears_of_its_shards_again(
    play: Callable[..., Played], uninterrupted: Played
) -> None:
    run = play(make_coordinator=DyingCoordinator)
    status = run.finish()
    assert isinstance(run.coordinator, DyingCoordinator) and run.coordinator.lives == 2
    assert status.ended == "finished", status.cause
    assert status.generation == 1, "it goes on"
    newest = latest(Store(run.run_folder))
    assert newest is not None and newest.step == 12
    assert {step: set(losses) for step, losses in run.losses().items()} == {
        step: set(losses) for step, losses in uninterrupted.losses().items()
    }


def test_an_upload_that_hangs_stops_neither_the_ranks_nor_the_end(
    play: Callable[..., Played], uninterrupted: Played
) -> None:
    """As on a file system that answers nobody: the process is stopped, and both of a rank's images wait for it."""
    run = play(**{"fault.upload_silence_seconds": 1, "checkpoint.every_steps": 1})
    os.kill(wait_for(run.agent.uploader_pid), signal.SIGSTOP)
    status = run.finish()
    assert (status.ended, status.committed_step) == ("finished", 12)
    assert any("moved for 1 s (fault.upload_silence_seconds)" in each.text for each in status.events)
    for step, losses in run.losses().items():
        assert losses == uninterrupted.losses()[step]


def test_a_rank_that_stands_still_is_named_on_the_terminal(
    play: Callable[..., Played], uninterrupted: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raynium.node.reports.POSITIONS_SECONDS", 0.2)
    monkeypatch.setattr("raynium.run.board.SILENCE_SECONDS", 0.5)
    run = play(hold_uploads=True)
    wait_for(lambda: run.status().step >= 1)
    victim = run.agent.rank_pids()[1]
    os.kill(victim, signal.SIGSTOP)
    try:
        lines = wait_for(lambda: [each.text for each in run.status().events if "stopped by a signal" in each.text])
    finally:
        os.kill(victim, signal.SIGCONT)
    run.let_uploads_go()
    assert re.match(r"no step for 0:0\d: rank 1 is .*, stopped by a signal", lines[0]), lines
    status = run.finish()
    assert (status.ended, status.generation) == ("finished", 1)
    assert run.losses() == uninterrupted.losses()


def test_a_stopped_rank_is_named_its_stacks_are_kept_and_the_run_goes_on_from_memory(
    play: Callable[..., Played], uninterrupted: Played
) -> None:
    run = play(hold_uploads=True, **{"fault.hang_seconds": 2})
    wait_for(lambda: run.status().step >= 4)
    victim = run.agent.rank_pids()[1]
    os.kill(victim, signal.SIGSTOP)
    # The others' third save waits for the uploads, which is no hang of theirs.
    run.let_uploads_go()
    status = run.finish()
    assert (status.ended, status.generation) == ("finished", 2)
    (incident,) = status.incidents
    assert incident.what == "ranks" and incident.where == "127.0.0.1" and incident.seconds is not None
    assert re.match(
        r"hang: rank 1 on node 0 \(127\.0\.0\.1\) is .*, stopped by a signal: nothing came from "
        r"there for 2\.\d s \(limit 2 s, fault\.hang_seconds\); 1 other rank\(s\) wait; its process was stopped",
        incident.cause,
    ), incident.cause
    stacks = run.tracker.artifacts["hangs/generation-00001/stacks.txt"]
    of_rank_0, of_rank_1 = stacks.split("==== rank 1, node 0: T (stopped)")
    assert of_rank_0.startswith("==== rank 0, node 0: S (sleeping)")
    assert all("rank/build.py" in each and "in train" in each for each in (of_rank_0, of_rank_1)), stacks
    assert "hangs/generation-00001/collectives.json" in run.tracker.artifacts
    for step, losses in run.losses().items():
        assert set(losses) == set(uninterrupted.losses()[step])


def test_rank_0_listens_at_its_nodes_address_only_and_nobody_goes_on_when_it_is_dead(
    play: Callable[..., Played],
) -> None:
    run = play(hold_uploads=True)
    wait_for(lambda: run.status().step >= 1)
    first = run.agent.rank_pids()[0]
    heard = {each.laddr for each in psutil.Process(first).net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert {address for address, _ in heard} == {"127.0.0.1"}, "of this node"
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: run.status().generation == 2)
    for address in heard:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
    run.let_uploads_go()
    assert run.finish().ended == "finished"


def test_ranks_of_a_run_that_was_taken_over_end_though_their_coordinator_is_frozen(play: Callable[..., Played]) -> None:
    run = play(hold_uploads=True)
    wait_for(lambda: run.agent.rank_pids())
    frozen = threading.Event()
    run.coordinator.tell(Said("the last word")).result()
    run.coordinator._loop.call_soon_threadsafe(frozen.wait)
    run.agent.taken_over("the run was taken over by process 7 on elsewhere")
    wait_for(lambda: not run.agent.rank_pids())
    frozen.set()
    run.let_uploads_go()
    status = run.finish()
    assert (status.ended, status.cause) == ("failed", "the run was taken over by process 7 on elsewhere")
    assert status.generation == 1


def test_nobody_tries_to_save_for_a_run_that_is_over(play: Callable[..., Played], blocked_step: Path) -> None:
    run = play()
    wait_until_it_tries_again(run)
    run.coordinator.tell(CannotGoOn("node 1 cannot go on")).result()
    status = run.finish()
    assert (status.ended, status.cause) == ("failed", "node 1 cannot go on") and blocked_step.is_file()
    assert not held_images(os.getpid())


def test_an_agent_joins_once_it_can_fork_ranks(play: Callable[..., Played]) -> None:
    """A spare that joined before would cost the run its imports when it takes a lost node's place."""
    start_template(run_url="/nowhere", compile_backend=None)
    template: int = forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
    os.kill(template, signal.SIGSTOP)
    try:
        run = play()
        wait_for(lambda: "wait_for_template" in functions_of(run.thread))
        assert not run.coordinator.coordinator._roster.ready()
    finally:
        os.kill(template, signal.SIGCONT)
    assert run.finish().ended == "finished"


def test_an_agent_that_cannot_fork_says_so_and_joins(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot() -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr("raynium.node.agent.wait_for_template", cannot)
    assert play(**{"train.steps": 2}).finish().ended == "finished"
    assert "ranks cannot be forked yet (Resource temporarily unavailable)" in caplog.text


def functions_of(thread: threading.Thread) -> list[str]:
    """That it is in now."""
    frame = sys._current_frames().get(thread.ident or 0)
    return [each.f_code.co_name for each, _ in traceback.walk_stack(frame)] if frame is not None else []


def test_a_rank_that_cannot_start_is_quoted_and_not_tried_again(play: Callable[..., Played], tmp_path: Path) -> None:
    run = play(data_folder=tmp_path / "empty")
    status = run.finish()
    assert (status.ended, status.generation) == ("failed", 1)
    assert "DataError" in (status.cause or "") and "is no document store" in (status.cause or "")
    quoted = [each.text for each in status.events if "rank 1 |" in each.text or "rank 0 |" in each.text]
    assert any("return run(RankPlan.from_json(plan_json), link)" in text for text in quoted)


def test_damaged_data_ends_the_run_with_the_cause_before_it_is_trained_on(
    play: Callable[..., Played], document_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(document_folder, tmp_path / "documents")
    with (tmp_path / "documents/train-00000.bin").open("r+b") as file:
        file.seek(5000)
        [byte] = file.read(1)
        file.seek(5000)
        file.write(bytes([byte ^ 4]))
    run = play(data_folder=tmp_path / "documents")
    status = run.finish()
    assert (status.ended, status.generation) == ("failed", 1) and not run.losses()
    assert "DataError" in (status.cause or "") and "train-00000.bin is damaged in unit 0, bytes 0 to" in (
        status.cause or ""
    )


def test_ranks_refuse_other_data_than_the_run_has(play: Callable[..., Played]) -> None:
    status = play(**{"data.identity": "0" * 64}).finish()
    assert (status.ended, status.generation) == ("failed", 1)
    assert "holds other data (identity" in (status.cause or "")


def test_too_little_memory_for_snapshots_is_told_before_the_first_step_and_not_tried_again(
    play: Callable[..., Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", memory], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        monkeypatch.setattr("raynium.node.agent.shared_memory_folder", lambda: memory)
        run = play()
        status = run.finish()
    finally:
        subprocess.run(["umount", memory], check=True)
    assert (status.ended, status.generation) == ("failed", 1) and not run.losses()
    assert "SnapshotMemoryShort: a snapshot needs" in (status.cause or "") and "enlarge shared memory" in (
        status.cause or ""
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(play: Callable[..., Played]) -> None:
    run = play(**{"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30, "checkpoint.every_steps": 1})
    status = run.finish()
    assert (status.ended, status.generation) == ("failed", 1)
    assert "not finite, so nothing was learned from it" in (status.cause or "")
    bad_step = max(run.losses(), default=0) + 1
    checkpoint = latest(Store(run.run_folder))
    assert checkpoint is None or checkpoint.step < bad_step


def test_data_that_no_node_can_read_ends_the_run_at_once_but_orphans_are_gone_by_then(
    tmp_path: Path, document_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Played(parse_config(JOB), tmp_path / "run", document_folder)

    def missing() -> str:
        raise DataError("s3://bucket/data is no document store")

    monkeypatch.setattr(run.agent, "_data_places", missing)
    monkeypatch.setattr(orphans, "AGENT_VARIABLE", "RAYNIUM_AGENT_OF_THIS_TEST")  # agents beside us look for theirs
    mark = {name: f"{value}0" for name, value in orphans.agent_mark().items()}  # our pid, but another start
    with subprocess.Popen(["sleep", "300"], env=os.environ | mark) as orphan:
        run.thread.start()
        assert orphan.wait(60) == -signal.SIGKILL
    status = run.finish()
    told = f"node 0 (127.0.0.1): process {orphan.pid} (sleep 300) was left behind by a node agent that is dead"
    assert any(told in event.text for event in status.events)
    assert (status.ended, status.generation) == ("failed", 0)
    assert status.cause == "node 0 (127.0.0.1): s3://bucket/data is no document store"
