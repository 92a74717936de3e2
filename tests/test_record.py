"""Who owns a run: exactly one live driver, whatever died before it."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from descriptors import no_free_descriptor

from raynium.errors import RunInUse, StoreError
from raynium.run.record import (
    OWNER_LOST_SECONDS,
    STOP_KEY,
    Owner,
    RecordKeeper,
    RunRecord,
    claim,
    read_record,
    request_stop,
    this_process,
)
from raynium.storage.process import pid_started
from raynium.storage.store import Store
from raynium.tracking.ledger import Ledger, LifeLedger

pytestmark = pytest.mark.quick

CONFIG = {"run": {"root": "runs"}, "train": {"steps": 4}}


def test_a_record_survives_the_store(tmp_path: Path) -> None:
    keeper = claim(Store(tmp_path), "first", CONFIG)
    keeper.update(state="running", step=3, metrics={"train/loss": 1.5})
    assert read_record(Store(tmp_path)) == keeper.record
    assert read_record(Store(tmp_path / "other")) is None


def test_a_live_owner_keeps_its_run(tmp_path: Path) -> None:
    claim(Store(tmp_path), "first", CONFIG)
    with pytest.raises(RunInUse, match=r"in use by process \d+ .*raynium stop first"):
        claim(Store(tmp_path), "first", CONFIG)


def test_a_dead_owner_loses_its_run_at_once_and_the_mlflow_run_stays(tmp_path: Path) -> None:
    script = (
        "import sys; from raynium.storage.store import Store; from raynium.run.record import claim;"
        f"claim(Store(sys.argv[1]), 'first', {CONFIG}).update(state='running', mlflow_run_id='m1', generation=2);"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    dead = read_record(Store(tmp_path))
    assert dead is not None and not dead.owner_is_alive(time.time())
    record = claim(Store(tmp_path), "first", CONFIG).record
    assert (record.mlflow_run_id, record.generation, record.owner) == ("m1", 2, this_process())


def test_an_owner_that_nobody_has_asked_how_it_ended_is_dead(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    while (Path("/proc") / str(ended.pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert pid_started(ended.pid) == ""
    ended.wait()


def test_a_process_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    name_it = r"open('/proc/self/comm', 'wb').write(b'\xff) (x'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", name_it], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdout is not None and named.stdout.readline()
        assert pid_started(named.pid).isdecimal()
        named.kill()


def test_the_ledger_of_a_run_goes_on_with_each_driver_and_names_the_time_without_one(tmp_path: Path) -> None:
    first = claim(Store(tmp_path), "first", CONFIG)
    before = first.hear_ledger(LifeLedger("a", Ledger(train=1e-9, step=7)))
    assert before.settled.start > 0 and before.settled.train == 0
    first.finishing()
    first.update(state="failed")
    assert first.record.ledger.finish > 0
    # Nobody started it again for an hour.
    earlier = replace(
        first.record,
        created_unix=first.record.created_unix - 3600,
        heartbeat_unix=first.record.heartbeat_unix - 3600,
    )
    Store(tmp_path).replace("run.json", earlier.to_json())

    second = claim(Store(tmp_path), "first", CONFIG)
    ledger = second.record.ledger
    assert ledger.down >= 3600 and ledger.train > 0 and ledger.step == 7
    assert second.hear_ledger(LifeLedger("a")).settled.down == ledger.down
    second.update(state="running")
    stored = read_record(Store(tmp_path))
    assert stored is not None and stored.ledger == second.record.ledger
    assert stored.ledger.total == pytest.approx(stored.heartbeat_unix - stored.created_unix, abs=1)


HOUR = 3600.0


@pytest.mark.parametrize(
    ("ended", "config", "down"),
    [
        ({"state": "finished"}, CONFIG, False),
        ({"state": "finished"}, CONFIG | {"train": {"steps": 8}}, False),
        ({"state": "stopped"}, CONFIG, False),
        ({"state": "failed"}, CONFIG | {"train": {"steps": 8}}, False),
        ({"state": "failed"}, CONFIG, True),
        ({"state": "failed"}, CONFIG | {"data": {"identity": "found meanwhile"}}, True),
        ({"state": "running", "owner": Owner("elsewhere", "boot", 1, "1")}, CONFIG | {"train": {"steps": 8}}, True),
    ],
)
def test_time_in_which_nobody_wanted_the_run_is_not_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: dict[str, Any], config: dict[str, Any], down: bool
) -> None:
    monkeypatch.setattr("raynium.run.record.OWNER_LOST_SECONDS", 0.05)
    keeper = claim(Store(tmp_path), "first", CONFIG)
    keeper.update(state="running")
    earlier = keeper.record
    times = {"created_unix": earlier.created_unix - HOUR, "heartbeat_unix": earlier.heartbeat_unix - HOUR}
    Store(tmp_path).replace("run.json", replace(earlier, **times, **ended).to_json())

    second = claim(Store(tmp_path), "first", config)
    second.update(state="stopped")
    record = second.record
    assert (record.ledger.down >= HOUR, record.idle_seconds >= HOUR) == (down, not down)
    assert record.ledger.total + record.idle_seconds == pytest.approx(
        record.heartbeat_unix - record.created_unix, abs=1
    )
    # What was idle once is not counted again.
    assert claim(Store(tmp_path), "first", config).record.ledger.down == record.ledger.down


def test_a_record_says_why_its_run_does_not_go_on() -> None:
    owner = Owner("elsewhere", "boot", 7, "1")
    record = RunRecord("first", CONFIG, "running", owner, created_unix=0, heartbeat_unix=1000)
    assert record.shown_cause(1030) is None
    cause = record.shown_cause(1000 + OWNER_LOST_SECONDS)
    assert cause is not None and cause.startswith("its driver, process 7 on elsewhere, ended without a word (it was ki")
    assert f"{datetime.fromtimestamp(1000):%H:%M:%S}" in cause
    assert replace(record, state="stopped", stopped_by="SIGTERM").shown_cause(0) == "stopped by SIGTERM"
    assert replace(record, state="failed", cause="LaunchError: no").shown_cause(0) == "LaunchError: no"
    assert replace(record, state="finished").shown_cause(0) is None


def test_a_driver_whose_clock_is_behind_the_last_ones_makes_no_negative_time(tmp_path: Path) -> None:
    keeper = claim(Store(tmp_path), "first", CONFIG)
    keeper.update(state="failed")
    ahead = replace(keeper.record, created_unix=time.time() + 3600)
    Store(tmp_path).replace("run.json", ahead.to_json())
    assert claim(Store(tmp_path), "first", CONFIG).record.ledger.down == 0


def test_an_owner_on_another_host_is_alive_while_its_heart_beats(tmp_path: Path) -> None:
    now = time.time()
    owner = Owner("elsewhere", "boot", 1, "1")
    record = RunRecord("first", CONFIG, "running", owner, created_unix=now, heartbeat_unix=now)
    assert record.owner_is_alive(now + OWNER_LOST_SECONDS - 1)
    assert not record.owner_is_alive(now + OWNER_LOST_SECONDS + 1)
    assert not replace(record, state="finished").owner_is_alive(now)


def test_an_owner_on_another_host_is_watched_by_our_own_clock_before_it_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raynium.run.record.OWNER_LOST_SECONDS", 0.4)
    monkeypatch.setattr("raynium.run.record.SILENCE_LOOK_SECONDS", 0.01)
    store, told = Store(tmp_path), list[str]()
    # Its clock is an hour behind.
    behind = time.time() - 3600
    foreign = RunRecord("first", CONFIG, "running", Owner("elsewhere", "boot", 7, "1"), behind, behind)
    store.replace("run.json", foreign.to_json())
    beats = threading.Timer(
        0.1, lambda: store.replace("run.json", replace(foreign, heartbeat_unix=behind + 1).to_json())
    )
    beats.start()
    with pytest.raises(RunInUse, match="in use by process 7 on elsewhere, whose clock is far from this machine's"):
        claim(store, "first", CONFIG, tell=told.append)
    began = time.monotonic()
    assert claim(store, "first", CONFIG, tell=told.append).claim_number == 1
    assert time.monotonic() - began >= 0.4
    assert told[0] == "the driver on elsewhere is not heard of: it is taken for dead if it stays silent for 0.4 s"


def test_an_owner_who_cannot_be_looked_at_is_alive_while_its_heart_beats() -> None:
    now = time.time()
    record = RunRecord("first", CONFIG, "running", this_process(), created_unix=now, heartbeat_unix=now)
    with no_free_descriptor():
        assert record.owner_is_alive(now)
        assert not record.owner_is_alive(now + OWNER_LOST_SECONDS + 1)


def test_a_pid_that_was_given_away_is_not_the_owner() -> None:
    owner = replace(this_process(), pid_started="1")
    record = RunRecord("first", CONFIG, "running", owner, created_unix=0, heartbeat_unix=time.time())
    assert owner.host == socket.gethostname() and not record.owner_is_alive(time.time())


def test_of_two_drivers_that_start_at_once_one_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keeper = claim(store, "first", CONFIG)
    keeper.update(state="failed")
    store.write_new("claims/000002.json", b"{}")  # the other was faster, but has written no record yet

    class Late(Store):
        def list(self, prefix: str = "", *, recursive: bool = True):  # what a slower driver saw a moment before
            listing = super().list(prefix, recursive=recursive)
            return replace(listing, sizes={key: size for key, size in listing.sizes.items() if "000002" not in key})

    with pytest.raises(RunInUse, match="taken by another driver"):
        claim(Late(tmp_path), "first", CONFIG)


@pytest.mark.parametrize("moment", ["list", "read", "write_new"])
def test_a_driver_that_comes_in_between_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Interrupted(Store):
        """Before this call of the slower driver's, the faster one has claimed the run."""

        def __getattribute__(self, name: str) -> Any:
            if name == moment and not faster:
                faster.append(claim(Store(tmp_path), "first", CONFIG))
            return super().__getattribute__(name)

    faster: list[RecordKeeper] = []
    claim(Store(tmp_path), "first", CONFIG).update(state="stopped")
    with pytest.raises(RunInUse):
        claim(Interrupted(tmp_path), "first", CONFIG)
    assert read_record(Store(tmp_path)) == faster[0].record


def test_what_lives_in_another_container_of_this_machine_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The containers of a pod share a host's name and boot, and no pids."""
    record = claim(Store(tmp_path), "first", CONFIG).record
    assert record.owner.lives_here() is True and this_process() == record.owner
    monkeypatch.setattr("raynium.storage.process.pid_namespace", lambda: "pid:[1]")
    assert record.owner.lives_here() is None
    assert record.owner_is_alive(record.heartbeat_unix + 1) and not record.is_orphaned(record.heartbeat_unix + 1)


def test_a_stop_asked_of_an_earlier_owner_does_not_stop_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    claim(store, "first", CONFIG).update(state="failed")
    request_stop(store)
    keeper = claim(store, "first", CONFIG)
    assert not store.exists(STOP_KEY) and not keeper.stop_requested()
    request_stop(store)
    assert keeper.stop_requested()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (None, "the text: Input should be an object"),
        ({"step": "x"}, "step: Input should be a valid integer"),
        ({"metrics": {"train/loss": "low"}}, "metrics.train/loss: Input should be a valid number"),
        ({"owner": {"host": "here"}}, "owner.pid_table: Field required"),
        ({"state": "asleep"}, "state: Input should be 'preparing'"),
        ({"config": {}}, "its config has run.root = None and train.steps = None"),
        ({"config": {"run": "here", "train": {"steps": 4}}}, "'str' object has no attribute 'get'"),
        ({"config": {"run": {"root": "runs"}, "train": {"steps": "4"}}}, "train.steps = '4'"),
    ],
)
def test_a_foreign_file_in_the_records_place_is_named(tmp_path: Path, changes: Any, problem: str) -> None:
    store = Store(tmp_path)
    record = json.loads(claim(store, "first", CONFIG).record.to_json())
    store.replace("run.json", json.dumps([] if changes is None else record | changes).encode())
    with pytest.raises(StoreError, match=r"run\.json is not a run record") as caught:
        read_record(store)
    assert problem in str(caught.value)


def test_a_record_reads_back_whatever_its_numbers(tmp_path: Path) -> None:
    keeper = claim(Store(tmp_path), "first", CONFIG)
    keeper.update(state="running", metrics={"train/loss": math.nan, "train/tokens": 3, "eval/loss": math.inf})
    read = read_record(Store(tmp_path))
    # By their words, since NaN is not NaN.
    assert repr(read) == repr(keeper.record).replace("'train/tokens': 3,", "'train/tokens': 3.0,")


def test_a_driver_that_was_taken_for_dead_notices_and_does_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    keeper = claim(store, "first", CONFIG)
    keeper.update(state="running")
    other = replace(keeper.record, owner=Owner("elsewhere", "boot", 7, "7"))
    store.write_new("claims/000002.json", json.dumps(asdict(other.owner)).encode())
    store.replace("run.json", other.to_json())
    keeper.check()  # too soon after the last look
    keeper.beat(step=5)  # too soon after the last one to say anything
    monkeypatch.setattr("raynium.run.record.HEARTBEAT_SECONDS", 0.0)
    with pytest.raises(RunInUse, match="taken over by process 7 on elsewhere"):
        keeper.check()
    with pytest.raises(RunInUse, match="taken over by process 7 on elsewhere"):
        keeper.beat(step=5)
    with pytest.raises(RunInUse, match="taken over by process 7 on elsewhere"):
        keeper.update(state="running", generation=2)
    assert read_record(store) == other
    monkeypatch.setattr("raynium.run.record.HEARTBEAT_SECONDS", 0.01)
    with keeper.beating():
        time.sleep(0.1)
    assert read_record(store) == other


def test_the_heart_goes_on_beating_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = claim(Store(tmp_path), "first", CONFIG)
    hour_ago = time.time() - 3600
    with monkeypatch.context() as patch:
        patch.setattr("raynium.run.record.time.time", lambda: hour_ago)
        keeper.beat(step=5)
    record = read_record(Store(tmp_path))
    assert record is not None and record.step == 5
