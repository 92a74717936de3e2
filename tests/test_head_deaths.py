"""A cluster whose head dies under a run: the run's record says so, and why, before anybody takes it for running."""

import contextlib
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from heads import LOOPBACK, running_head
from tiny import build_documents, job_text
from waiting import wait_for

from raynium import Client, Run, find_run
from raynium.chaos.sessions import kill_sessions, kill_started
from raynium.checkpoint.catalog import latest
from raynium.checkpoint.compare import differences
from raynium.config.local_folders import scratch_folder
from raynium.errors import LaunchError, RunInUse, StoreError
from raynium.rank.ports import free_port
from raynium.run.points import read_waiting
from raynium.run.record import OWNER_LOST_SECONDS
from raynium.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("dies", ["gcs_server", "raylet"])
def test_a_run_whose_head_dies_is_told_with_its_cause_within_the_heartbeats_limit(tmp_path: Path, dies: str) -> None:
    build_documents(tmp_path)
    (tmp_path / "job.yaml").write_text(
        job_text({"run.name": "headless", "train.steps": 100_000, "checkpoint.every_steps": 10}, root=tmp_path)
    )
    command = [str(Path(sys.executable).parent / "raynium"), "train", str(tmp_path / "job.yaml")]
    with (tmp_path / "out").open("wb") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=tmp_path)
    run = find_run("headless", str(tmp_path))
    try:
        wait_for(lambda: run.checkpoints())
        children = subprocess.run(["pgrep", "-f", f"/{dies} "], capture_output=True, text=True).stdout.split()
        mine = [pid for pid in map(int, children) if os.getsid(pid) == driver.pid]
        assert len(mine) == 1
        killed = time.time()
        os.kill(mine[0], signal.SIGKILL)
        record = wait_for(lambda: (found := run.record()).shown_state(time.time()) != "running" and found)
        # The record's own time: a busy machine may look late.
        assert record.heartbeat_unix - killed < OWNER_LOST_SECONDS
        driver.wait(120)
        record = run.record()
        assert record.shown_state(time.time()) == "failed", (tmp_path / "out").read_text()
        assert record.cause is not None and record.cause.startswith("ClusterLost: the ")
        assert driver.returncode == 1 and "Start the run again" in (tmp_path / "out").read_text()
    except StoreError:
        raise AssertionError((tmp_path / "out").read_text()) from None
    finally:
        kill_sessions([driver.pid])
        driver.wait()


CHANGES = {"train.steps": 80, "train.global_batch_size": 8, "checkpoint.every_steps": 5, "sample.prompts": []}


@pytest.mark.timeout(1200)
def test_a_new_head_takes_over_the_runs_of_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole cluster is killed, head, driver and ranks, while MLflow is away, and its disk is lost; nobody types
    anything; no step, point or bit is another.
    """
    build_documents(tmp_path)
    job = tmp_path / "job.yaml"
    job.write_text(job_text(CHANGES, root=tmp_path))
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    dashboard = free_port(LOOPBACK)
    address = f"http://{LOOPBACK}:{dashboard}"
    command = [str(Path(sys.executable).parent / "raynium"), "supervisor", "--root", str(tmp_path)]
    with (tmp_path / "supervisor.log").open("wb") as output:
        # It is there before the first head, as a service is.
        supervisor = subprocess.Popen(
            [*command, "--address", address], stdout=output, stderr=output, start_new_session=True
        )
    try:
        with running_head(tmp_path / "ray.log", environment, dashboard=dashboard) as head:
            plain = wait_for(lambda: _submitted(address, job, "plain"), pause_seconds=0.5)
            plain.wait(400)
            run = wait_for(lambda: _submitted(address, job, "orphan"), pause_seconds=0.5)
            wait_for(lambda: any(each.step >= 10 for each in run.checkpoints()))
            record = run.record()
            with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, timeout=60)) as lock:
                lock.execute("BEGIN EXCLUSIVE")
                newest = max(each.step for each in run.checkpoints())
                wait_for(lambda: any(each.step >= newest + 10 for each in run.checkpoints()))
                assert min(point.step for point in read_waiting(Store(run.url))) <= newest + 10
                # Ray gives a driver a session of its own, and ends it a second later: on a lost machine it goes too.
                kill_sessions([head.process.pid, os.getsid(record.owner.pid)])
            assert record.owner.lives_here() is False
            (spool,) = scratch_folder().glob(f"spool/*/{record.mlflow_run_id}")
            shutil.rmtree(spool)
        with running_head(tmp_path / "ray.log", environment, dashboard=dashboard):
            finished = wait_for(lambda: (found := run.record()).state == "finished" and found, seconds=400)
    except Exception as error:
        error.add_note((tmp_path / "supervisor.log").read_text())
        raise
    finally:
        kill_started([supervisor])
    assert (finished.mlflow_run_id, finished.created_unix) == (record.mlflow_run_id, record.created_unix)
    assert finished.owner != record.owner and finished.job_id != record.job_id
    told = (tmp_path / "supervisor.log").read_text()
    assert told.count("run orphan is started again, as job raynium-orphan-") == 1 and "run plain" not in told
    assert _losses(run) == _losses(plain) and len(_losses(run)) == 80
    newest, theirs = latest(Store(run.url)), latest(Store(plain.url))
    assert newest is not None and theirs is not None and not list(differences(newest, theirs))


def _submitted(address: str, job: Path, name: str) -> Run | None:
    """None while the dashboard does not do it: a head that just came up, on a busy machine."""
    try:
        return Client(address).submit(job, name=name)
    except RunInUse:
        # It did, and its answer was lost.
        return find_run(name, job.parent)
    except LaunchError:
        return None


def _losses(run: Run) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in run.metrics("train/loss"))
