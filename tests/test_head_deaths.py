"""A cluster whose head dies under a run: the run's record says so, and why, before anybody takes it for running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sessions import kill_sessions
from tiny import build_documents, job_text
from waiting import wait_for

from raynium import find_run
from raynium.errors import StoreError
from raynium.run.record import OWNER_LOST_SECONDS

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
