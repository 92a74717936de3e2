"""Delivery to a real `mlflow server` and to a bare SQLite store: every point arrives, once, whatever dies or hangs."""

import math
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow_server import Server, wait_until

from raynium.errors import TrackingError
from raynium.tracking import sender
from raynium.tracking.client import mlflow_client
from raynium.tracking.metrics import METRICS, STEADY
from raynium.tracking.runs import check_reachable, log_artifact_text, metric_names, open_run, read_metric
from raynium.tracking.sender import MlflowTracker
from raynium.tracking.spool import MetricSpool
from raynium.tracking.tracker import MemoryTracker, TrackerStatus

CLOSE_SECONDS = 60.0


def new_run(uri: str, name: str) -> str:
    return open_run(uri, experiment="tests", run_name=name, run_id=None, params={}, tags={}).run_id


def append(tracker: MlflowTracker, step: int, *, unix_ms: int | None = None) -> None:
    values = {"train/loss": step / 7, "train/tokens": step * 1000}
    tracker.append(values, step=step, unix_ms=step + 1 if unix_ms is None else unix_ms)


def assert_each_step_once(uri: str, run_id: str, steps: range) -> None:
    """By MLflow's own history, in which a repeat would show."""
    for name, value_of in (("train/loss", lambda step: step / 7), ("train/tokens", lambda step: step * 1000)):
        points = [(point.step, point.value) for point in read_metric(uri, run_id, name)]
        assert points == [(step, value_of(step)) for step in steps]


def make_tracker(folder: Path, uri: str, run_id: str, *, seconds: float = 60) -> MlflowTracker:
    return MlflowTracker(folder, uri=uri, run_id=run_id, flush_seconds=0.05, request_timeout_seconds=seconds)


@pytest.fixture(scope="module")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('a root')}/mlflow.db"


@pytest.fixture(params=["server", "sqlite"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "server":
        return request.getfixturevalue("mlflow_server").uri
    return request.getfixturevalue("sqlite_uri")


def test_a_level_line_is_no_chart_and_every_change_is_a_point(store: str, tmp_path: Path):
    run_id = new_run(store, "steady")
    generations, repeats, flops, loss = [1, 1, 2, 2, 3], [0.0, 0.0, 4.5, 4.5, 0.0], [9e9] * 5, [1.0, 1.0, 1.0, 2.0, 2.0]
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    for step in range(5):
        tracker.append({"run/generation": generations[step]}, step=step, unix_ms=step)
        values = {"goodput/repeat_seconds": repeats[step], "goodput/ratio": 0.5, "train/loss": loss[step]}
        tracker.append(values | {"throughput/peak_flops_per_rank": flops[step]}, step=step, unix_ms=step)
    with pytest.raises(ValueError, match="is not a number"):
        tracker.append({"run/generation": True}, step=5, unix_ms=5)
    status = tracker.close(timeout_seconds=CLOSE_SECONDS)
    assert (status.points_appended, status.points_pending, status.points_lost) == (2 + 2 + 5 + 5 + 1, 0, 0)

    def points(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in read_metric(store, run_id, name)]

    assert points("run/generation") == [(2, 2), (4, 3)]
    assert points("goodput/repeat_seconds") == [(2, 4.5), (4, 0)]
    assert points("throughput/peak_flops_per_rank") == [(0, 9e9)]
    assert [value for _, value in points("train/loss")] == loss, "what is learned has a point for every step"
    assert [value for _, value in points("goodput/ratio")] == [0.5] * 5
    learned = {name for name in STEADY if name.startswith(("train/", "eval/"))}
    assert STEADY.keys() < METRICS.keys() and learned == {"train/left_out_steps"}


def test_what_is_learned_and_its_speed_are_what_mlflow_charts_first(store: str, tmp_path: Path):
    run_id = new_run(store, "order")
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    tracker.append(dict.fromkeys(METRICS, 7.5), step=3, unix_ms=5)
    tracker.close(timeout_seconds=CLOSE_SECONDS)
    with mlflow_client(store, timeout_seconds=10) as client:
        names = client.get_run(run_id).data.metrics
    first = {name for name in names if not name.startswith("vitals/")}
    assert {name.partition("/")[0] for name in first} == {"eval", "rewards", "throughput", "train"}
    assert max(first) < min(names.keys() - first), "its charts are sorted"
    assert "vitals/goodput/ratio" in names and {name.removeprefix("vitals/") for name in names} == METRICS.keys()
    assert metric_names(store, run_id) == sorted(METRICS), "nobody else knows these longer names"
    assert [point.value for point in read_metric(store, run_id, "goodput/ratio")] == [7.5]


def test_values_times_and_non_finite_numbers_arrive_as_they_were(store: str, tmp_path: Path):
    run_id = new_run(store, "values")
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    values = [0.1 + 0.2, math.nan, math.inf, -math.inf, 5e-324, 2**53 + 2.0]
    for step, value in enumerate(values):
        tracker.append({"train/loss": value}, step=step, unix_ms=1_700_000_000_123 + step)
    tracker.artifact("samples/end.txt", "def main(:  é")
    status = tracker.close(timeout_seconds=CLOSE_SECONDS)
    points = read_metric(store, run_id, "train/loss")
    assert [repr(point.value) for point in points] == [repr(value) for value in values]
    assert [point.unix_ms for point in points] == [1_700_000_000_123 + step for step in range(len(values))]
    assert status == TrackerStatus(points_appended=6, points_sent=6)
    with mlflow_client(store, timeout_seconds=10) as client:
        artifact = client.download_artifacts(run_id, "samples/end.txt", str(tmp_path))
    assert Path(artifact).read_text() == "def main(:  é"


def test_steps_computed_again_after_a_resume_are_not_logged_twice(store: str, tmp_path: Path):
    """Within one process, over a new process on the same node, and on a node whose disk knows nothing."""
    run_id = new_run(store, "resume")
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    for step in range(15):
        append(tracker, step)
    for step in range(10, 20):  # repeats, mostly within one batch: the first one counts
        append(tracker, step, unix_ms=step + 1 if step >= 15 else 10_000 + step)
    wait_until(lambda: tracker.status().points_pending == 0, "the first points never arrived")
    for step in range(10, 30):  # and in a later one
        append(tracker, step, unix_ms=time.time_ns() // 1000)
    assert tracker.close(timeout_seconds=CLOSE_SECONDS).points_repeated == 2 * (5 + 10)
    first_times = [point.unix_ms for point in read_metric(store, run_id, "train/loss")][:20]
    assert first_times == [step + 1 for step in range(20)]
    for folder, first, last in (("spool", 25, 40), ("other-node", 35, 50)):
        tracker = make_tracker(tmp_path / folder, store, run_id)
        for step in range(first, last):
            append(tracker, step, unix_ms=time.time_ns() // 1000)
        status = tracker.close(timeout_seconds=CLOSE_SECONDS)
        assert (status.points_repeated, status.points_sent, status.points_pending) == (2 * 5, 2 * (last - first - 5), 0)
    assert_each_step_once(store, run_id, range(50))


def test_what_is_remembered_of_repeated_steps_is_bounded(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sender, "MOST_STEPS_KEPT", 5)
    run_id = new_run(store, "bounded")
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    for first in (0, 5, 30):  # each time some steps are repeated
        for step in range(first, first + 40):
            append(tracker, step, unix_ms=time.time_ns() // 1000)
        wait_until(lambda: tracker.status().points_pending == 0, "the points never arrived")
    tracker.close(timeout_seconds=CLOSE_SECONDS)
    logged = tracker._sender._logged
    assert logged is not None and max((len(steps) for steps in logged._steps.values()), default=0) <= 5
    assert_each_step_once(store, run_id, range(70))


def test_late_points_of_an_earlier_node_still_arrive(store: str, tmp_path: Path):
    """Node A dies with steps 0–9 unsent, node B logs 5–19, then A comes back: 0–4 are new, 5–9 are repeats."""
    run_id = new_run(store, "late")
    before = set(threading.enumerate())
    late = MlflowTracker(tmp_path / "a", uri="http://127.0.0.1:9", run_id=run_id, flush_seconds=0.05)
    for step in range(10):
        append(late, step)
    (thread,) = set(threading.enumerate()) - before
    assert late.close(timeout_seconds=0.2).points_pending == 20
    wait_until(lambda: not thread.is_alive(), "a closed sender goes on trying")
    tracker = make_tracker(tmp_path / "b", store, run_id)
    for step in range(5, 20):
        append(tracker, step, unix_ms=1000 + step)
    tracker.close(timeout_seconds=CLOSE_SECONDS)
    status = make_tracker(tmp_path / "a", store, run_id).close(timeout_seconds=CLOSE_SECONDS)
    assert (status.points_sent, status.points_repeated) == (10, 10)
    assert_each_step_once(store, run_id, range(20))


def test_many_points_go_in_full_batches(store: str, tmp_path: Path):
    """2,500 points must not need one request for each step."""
    run_id = new_run(store, "many")
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    for step in range(1250):
        append(tracker, step)
    assert tracker.close(timeout_seconds=CLOSE_SECONDS).points_sent == 2500
    assert_each_step_once(store, run_id, range(1250))


def test_hanging_server_stalls_nobody_and_loses_nothing(mlflow_server: Server, tmp_path: Path):
    run_id = new_run(mlflow_server.uri, "hanging")
    tracker = make_tracker(tmp_path / "spool", mlflow_server.uri, run_id)
    append(tracker, 0)
    assert tracker.close(timeout_seconds=CLOSE_SECONDS).points_sent == 2
    tracker = make_tracker(tmp_path / "spool", mlflow_server.uri, run_id, seconds=1)
    mlflow_server.signal(signal.SIGSTOP)
    try:
        for step in range(1, 501):  # returns although the server is stopped until after the loop
            append(tracker, step)
        assert tracker.status().points_pending == 1000
        wait_until(lambda: tracker.status().last_error is not None, "a hung request never ended")
        status = tracker.status()
        assert "no answer within 1 s" in str(status)
        assert "1,000 point(s) on disk for it" in str(status)
        assert tracker.close(timeout_seconds=0.1).points_pending == 1000
        tracker = make_tracker(tmp_path / "spool", mlflow_server.uri, run_id)  # the folder is free at once
    finally:
        mlflow_server.signal(signal.SIGCONT)
    # The stopped server had accepted requests that their sender gave up; it now answers those as well.
    status = tracker.close(timeout_seconds=CLOSE_SECONDS)
    assert (status.points_pending, status.last_error) == (0, None)
    assert_each_step_once(mlflow_server.uri, run_id, range(501))


@pytest.mark.slow
def test_server_killed_and_started_again(mlflow_server: Server, tmp_path: Path):
    run_id = new_run(mlflow_server.uri, "killed")
    tracker = make_tracker(tmp_path / "spool", mlflow_server.uri, run_id)
    for step in range(400):
        append(tracker, step)
        if step == 200:
            mlflow_server.kill()
            wait_until(lambda: "Connection refused" in str(tracker.status()), "the loss of the server went unseen")
    mlflow_server.start()
    # The sender forgets its last error a moment after the last point is acknowledged.
    wait_until(lambda: tracker.status().points_pending == 0, "the points were not sent after the restart")
    wait_until(lambda: tracker.status().last_error is None, "the error outlived what it was about")
    tracker.close(timeout_seconds=CLOSE_SECONDS)
    assert_each_step_once(mlflow_server.uri, run_id, range(400))


LIVES = """
import os, sys, time
from raynium.tracking import client
from raynium.tracking.sender import MlflowTracker
client._load_mlflow()  # once: each life is a fork
folder, uri, run_id = sys.argv[1:]
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
for request in sys.stdin:
    first, last = map(int, request.split())
    child = os.fork()
    if child == 0:
        tracker = MlflowTracker(folder, uri=uri, run_id=run_id, flush_seconds=0.01)
        for step in range(first, last):
            values = {"train/loss": step / 7, "train/tokens": step * 1000}
            tracker.append(values, step=step, unix_ms=time.time_ns() // 1000)
            say("step", step)
            time.sleep(0.002)
        os._exit(tracker.close(timeout_seconds=60).points_pending)
    say("pid", child)
    say("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def oldest_waiting(spool: Path) -> int | None:
    """The number of the oldest step that is not acknowledged, as any process may see it."""
    try:
        with closing(sqlite3.connect(f"file:{spool}/queue.db?mode=ro", uri=True)) as queue:
            return queue.execute("SELECT min(number) FROM steps").fetchone()[0]
    except sqlite3.OperationalError:  # no file, or no table yet
        return None


@pytest.mark.slow
def test_sender_process_killed_again_and_again(store: str, tmp_path: Path):
    """Each life is killed while it sends, and the next begins 30 steps back, as from a checkpoint."""
    run_id = new_run(store, "kill -9")
    dice = random.Random(0)
    reached = 0
    lives = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(tmp_path / "spool"), store, run_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert lives.stdin is not None and lives.stdout is not None
    with lives:
        for sends_to_live in [1, 3, 2, 5, 1, 4, 2, 3, None]:
            last = 10**9 if sends_to_live else reached + 30
            lives.stdin.write(f"{max(0, reached - 30)} {last}\n")
            pid, seen = 0, set()
            for line in lives.stdout:
                word, _, number = line.partition(" ")
                if word == "exit":
                    assert int(number) == (-signal.SIGKILL if sends_to_live else 0)
                    break
                if word == "pid":
                    pid = int(number)
                else:
                    reached = max(reached, int(number) + 1)
                seen.add(oldest_waiting(tmp_path / "spool"))
                if sends_to_live and pid and len(seen) > sends_to_live:
                    time.sleep(dice.uniform(0, 0.02))  # anywhere in the next request, or between two
                    os.kill(pid, signal.SIGKILL)
                    pid = 0
        lives.stdin.close()
    assert reached > 100
    assert_each_step_once(store, run_id, range(reached))


def test_points_committed_but_never_acknowledged_are_not_repeated(store: str, tmp_path: Path):
    """The moment between MLflow's commit and ours: the spool, put back as it was, is sent a second time."""
    run_id = new_run(store, "unacknowledged")
    spool = MetricSpool(tmp_path / "spool")
    for step in range(50):
        spool.append({"train/loss": step / 7, "train/tokens": step * 1000}, step=step, unix_ms=step)
    spool.close()
    shutil.copytree(tmp_path / "spool", tmp_path / "as it was")
    assert make_tracker(tmp_path / "spool", store, run_id).close(timeout_seconds=CLOSE_SECONDS).points_sent == 100
    status = make_tracker(tmp_path / "as it was", store, run_id).close(timeout_seconds=CLOSE_SECONDS)
    assert (status.points_sent, status.points_repeated) == (0, 100)
    assert_each_step_once(store, run_id, range(50))


def test_store_keeps_one_row_for_a_batch_sent_twice(store: str):
    """What the sender rests on when the outcome of a request is unknown: the SQL store's primary key."""
    from mlflow.entities import Metric

    run_id = new_run(store, "primary key")
    points = [Metric("train/loss", value, 1000 + step, step) for step, value in enumerate([0.1, math.nan, math.inf])]
    with mlflow_client(store, timeout_seconds=10) as client:
        client.log_batch(run_id, metrics=points[:2])
        client.log_batch(run_id, metrics=points)
    assert [point.step for point in read_metric(store, run_id, "train/loss")] == [0, 1, 2]


def test_a_surprise_in_the_thread_is_shown_and_the_points_wait(store: str, tmp_path: Path, monkeypatch):
    run_id = new_run(store, "surprise")
    from raynium.tracking import sender

    with monkeypatch.context() as broken:
        broken.setattr(sender, "_LoggedSteps", lambda *_: 1 / 0)
        tracker = make_tracker(tmp_path / "spool", store, run_id)
        append(tracker, 0)
        wait_until(lambda: tracker.status().last_error is not None, "the failure went unseen")
        assert "ZeroDivisionError" in str(tracker.status())
    assert tracker.close(timeout_seconds=CLOSE_SECONDS).points_pending == 0
    assert_each_step_once(store, run_id, range(1))


def test_an_mlflow_that_stays_away_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.tracking.sender.AWAY_SECONDS", 0.2)
    monkeypatch.setattr("raynium.tracking.sender.LAST_RETRY_SECONDS", 0.1)
    monkeypatch.setattr("raynium.tracking.sender.FIRST_RETRY_SECONDS", 0.1)
    told, tried = list[str](), list[None]()

    def never(*_: object) -> None:
        tried.append(None)
        raise OSError("Connection refused")

    monkeypatch.setattr(sender, "_LoggedSteps", never)
    tracker = MlflowTracker(tmp_path / "a", uri="http://127.0.0.1:9", run_id="id", flush_seconds=0.05, away=told.append)
    append(tracker, 0)
    wait_until(lambda: bool(told), "nobody was told")
    number = len(tried)
    wait_until(lambda: len(tried) >= number + 3, "it is no longer tried")
    tracker.close(timeout_seconds=CLOSE_SECONDS / 100)
    (line,) = told
    assert line.startswith("MLflow has taken nothing for") and "Connection refused" in line


def test_deleted_run_is_named(store: str, tmp_path: Path):
    run_id = new_run(store, "deleted")
    with mlflow_client(store, timeout_seconds=10) as client:
        client.delete_run(run_id)
    tracker = make_tracker(tmp_path / "spool", store, run_id)
    append(tracker, 0)
    wait_until(lambda: tracker.status().last_error is not None, "the failure went unseen")
    assert "deleted" in str(tracker.status())
    assert tracker.close(timeout_seconds=0.1).points_pending == 2


def test_unreachable_server_is_named_within_seconds():
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9: Connection refused.*tracking\.uri"):
        check_reachable("http://127.0.0.1:9", timeout_seconds=2)
    with pytest.raises(TrackingError, match="127\\.0\\.0\\.1:9/db: Connection refused"):
        check_reachable("postgresql://user:secret@127.0.0.1:9/db", timeout_seconds=2)


def test_listening_but_silent_server_is_named_within_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingError, match="no answer within 1 s"):
            check_reachable(address, timeout_seconds=1)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # one request, not mlflow's eight
            silent.accept()


def test_request_limits_are_put_back(mlflow_server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    check_reachable(mlflow_server.uri)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_artifact_through_the_server(mlflow_server: Server, tmp_path: Path):
    run_id = new_run(mlflow_server.uri, "artifact")
    log_artifact_text(mlflow_server.uri, run_id, "config.yaml", "first")
    log_artifact_text(mlflow_server.uri, run_id, "config.yaml", "second")
    with mlflow_client(mlflow_server.uri, timeout_seconds=10) as client:
        assert Path(client.download_artifacts(run_id, "config.yaml", str(tmp_path))).read_text() == "second"


def test_memory_tracker_is_a_tracker_without_mlflow():
    tracker = MemoryTracker()
    tracker.append({"train/loss": 2.0}, step=1, unix_ms=5)
    tracker.append({"train/loss": 1.5, "eval/loss": 3.0}, step=2, unix_ms=6)
    tracker.artifact("a.txt", "x")
    assert tracker.values("train/loss") == [(1, 2.0), (2, 1.5)]
    assert tracker.artifacts == {"a.txt": "x"}
    assert tracker.close(timeout_seconds=0).points_sent == 3
    assert tracker.closed
    with pytest.raises(ValueError, match="did you mean"):
        MemoryTracker().append({"train/los": 1.0}, step=1, unix_ms=1)
    assert "train/loss" in METRICS


def test_what_is_left_is_said_in_points_and_files() -> None:
    assert str(TrackerStatus(artifacts_pending=1)) == "not yet in MLflow, on disk until it takes them: 1 file(s)"
    unreachable = str(TrackerStatus(points_pending=3, last_error="no answer", failing_seconds=9.6))
    assert unreachable == "MLflow unreachable for 10 s: 3 point(s) on disk for it (no answer)"
