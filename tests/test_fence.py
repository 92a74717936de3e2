"""A driver that comes back from the dead writes nothing more: no record, no checkpoint, no point."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from s3_server import S3Server
from waiting import wait_for

from raynium.checkpoint.catalog import list_checkpoints
from raynium.errors import RunInUse, StoreError
from raynium.run.fence import Fence, FenceWatch, claim_key
from raynium.run.record import read_record
from raynium.storage.process import Owner
from raynium.storage.store import Store
from raynium.tracking.runs import open_run, read_metric

OTHER = json.dumps(asdict(Owner("elsewhere", "boot", 7, "7"))).encode()
LOST_SECONDS = 2.0


class Driver:
    """A process of `_frozen_driver.py`."""

    def __init__(self, host: str, *arguments: str, environment: dict[str, str]):
        script = str(Path(__file__).parent / "_frozen_driver.py")
        command = [sys.executable, script, *arguments, host, str(LOST_SECONDS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.first = self._heard()

    def ask(self, word: str, step: int = 0) -> str:
        assert self.process.stdin is not None
        print(word, step, file=self.process.stdin, flush=True)
        return self._heard()

    def _heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for each in started:
        each.process.kill()
        each.process.communicate()


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(300)
def test_a_driver_that_comes_back_from_the_dead_writes_nothing(
    tmp_path: Path, s3_server: S3Server, drivers: list[Driver]
) -> None:
    url = f"{s3_server.create_bucket('fenced')}/test"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = open_run(uri, experiment="tests", run_name="test", run_id=None, params={}, tags={}).run_id
    common = (url, str(tmp_path / "spool"), uri, run_id)

    def start(host: str) -> Driver:
        drivers.append(Driver(host, *common, environment=s3_server.env))
        return drivers[-1]

    first = start("first-host")
    assert (first.first, first.ask("beat", 1), first.ask("commit", 1)) == ("claimed", '"done"', "true")
    first.ask("append", 1)
    wait_for(lambda: [point.step for point in read_metric(uri, run_id, "train/loss")] == [1])

    # While its heart beats nobody takes the run.
    store = Store(url, options=s3_server.options)
    assert start("second-host").first.startswith("refused: run 'test' at s3://fenced/test is in use by process ")

    # It is frozen, and taken for dead by another host, which has watched for as long by its own clock.
    first.process.send_signal(signal.SIGSTOP)
    time.sleep(LOST_SECONDS)
    began = time.monotonic()
    common = (url, str(tmp_path / "spool-of-second"), uri, run_id)
    second = start("second-host")
    assert second.first == "claimed" and time.monotonic() - began >= LOST_SECONDS
    assert second.ask("beat", 2) == '"done"'

    # It comes back, and does not know.
    first.process.send_signal(signal.SIGCONT)
    assert first.ask("append", 2) == '"done"'
    assert "was taken over by process" in first.ask("commit", 2)
    assert first.ask("beat", 2).startswith("RunInUse: the run at s3://fenced/test was taken over by process ")
    assert first.ask("sent") == "1", "its point stays in the spool"
    assert [each.step for each in list_checkpoints(store)] == [1]
    after = read_record(store)
    assert after is not None and after.owner.host == "second-host"
    first.process.kill()
    first.process.wait()

    # The owner computes the same step. Whoever opens the spool of the first host later sends what is missing, once.
    assert (second.ask("append", 2), second.ask("commit", 2), second.ask("sent")) == ('"done"', "true", "0")
    second.process.kill()
    second.process.wait()
    common = (url, str(tmp_path / "spool"), uri, run_id)
    third = start("second-host")
    assert third.ask("append", 3) == '"done"' and third.ask("sent") == "0"
    assert [point.step for point in read_metric(uri, run_id, "train/loss")] == [1, 2, 3]
    assert [each.generation for each in list_checkpoints(store)] == ["first-host", "second-host"]


def test_a_fence_falls_with_the_next_claim_and_is_up_while_the_store_is_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fence = Fence(store, 3)
    for earlier in (1, 2, 3):
        store.write_new(claim_key(earlier), OTHER)
    fence.check()
    store.write_new(claim_key(4), OTHER)
    with pytest.raises(RunInUse, match=r"taken over by process 7 on elsewhere .* follow the run there"):
        fence.check()


def test_a_watch_tells_of_a_takeover_once_and_bears_a_store_that_is_away(tmp_path: Path) -> None:
    class Away(Store):
        away = 3

        def read(self, key: str, *, max_bytes: int = 2**20) -> bytes:
            if self.away:
                self.away -= 1
                raise StoreError(f"{key}: expired")
            return super().read(key, max_bytes=max_bytes)

    store, told = Away(tmp_path), list[str]()
    with FenceWatch(Fence(store, 1), told.append, look_seconds=0.01):
        wait_for(lambda: not store.away)
        time.sleep(0.05)
        assert told == []
        store.write_new(claim_key(2), OTHER)
        wait_for(lambda: told)
        time.sleep(0.05)
    assert len(told) == 1 and "taken over" in told[0]


def test_of_several_who_could_look_only_whose_turn_it_is_does(tmp_path: Path) -> None:
    """Rank 0 moves to another node: to a spare, or since its node was lost."""
    store, told, has_rank_0 = Store(tmp_path), list[str](), list[bool]()
    store.write_new(claim_key(2), OTHER)
    with FenceWatch(Fence(store, 1), told.append, look_seconds=0.01, is_its_turn=lambda: bool(has_rank_0)):
        time.sleep(0.1)
        assert told == []
        has_rank_0.append(True)
        wait_for(lambda: told)
