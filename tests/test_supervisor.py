"""Which runs are started again, when, and how often. The whole path, with heads that die, is in test_head_deaths.py."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import job_text

from raynium.config.load import parse_config
from raynium.errors import LaunchError, StoreError
from raynium.launch import supervisor as supervisor_module
from raynium.launch.job_metadata import SUPERVISED
from raynium.launch.supervisor import Supervisor
from raynium.run.record import RunRecord, claim, read_record, request_stop
from raynium.run.supervision import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_STARTS,
    Decision,
    Seen,
    Supervision,
)
from raynium.storage.process import Owner
from raynium.storage.store import Store

pytestmark = pytest.mark.quick


# ------------------------------------------------------------------------------------------------- the decisions


ORPHAN = Seen("file:///runs/a", orphaned=True, has_job=False, committed_step=None)


def decide(supervision: Supervision, seen: Seen, *, now: float) -> Decision:
    """A cluster takes each job."""
    decision = supervision.decide(seen, now=now)
    if decision == "start":
        supervision.started(seen.url, now=now)
    return decision


def test_an_orphan_is_started_with_growing_pauses_until_it_is_given_up() -> None:
    supervision, now, starts = Supervision(), 1000.0, []
    for _ in range(24 * 3600):
        if decide(supervision, ORPHAN, now=now) == "start":
            starts.append(now)
        now += 1.0
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert len(starts) == MOST_STARTS and pauses[:3] == [FIRST_PAUSE_SECONDS * 2**n for n in range(3)]
    assert max(pauses) == LONGEST_PAUSE_SECONDS
    assert decide(supervision, ORPHAN, now=now) == "give up"
    # A newer checkpoint: it gets somewhere, and another death is a first one.
    newer = replace(ORPHAN, committed_step=10)
    assert [decide(supervision, newer, now=now), decide(supervision, newer, now=now)] == ["start", "wait"]


def test_a_run_that_somebody_runs_or_is_about_to_is_left_alone() -> None:
    supervision = Supervision()
    assert decide(supervision, replace(ORPHAN, orphaned=False), now=0.0) == "leave"
    assert decide(supervision, replace(ORPHAN, has_job=True), now=0.0) == "wait"
    assert decide(supervision, ORPHAN, now=0.0) == "start"
    # Its driver has taken it, and died: the first pause goes on.
    assert decide(supervision, replace(ORPHAN, orphaned=False), now=10.0) == "leave"
    assert decide(supervision, ORPHAN, now=20.0) == "wait"
    assert decide(supervision, ORPHAN, now=FIRST_PAUSE_SECONDS) == "start"
    # Each run has pauses of its own.
    assert decide(supervision, replace(ORPHAN, url="file:///runs/b"), now=FIRST_PAUSE_SECONDS) == "start"


# ------------------------------------------------------------------------------------------------- the supervisor


class Jobs:
    """A cluster's jobs, as Ray's client has them."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.configs: list[str] = []
        self.refusal: Exception | None = None
        self.state = "PENDING"
        # Submission id and metadata of jobs that somebody else has submitted.
        self.others: list[tuple[str, Any]] = []

    def submit_job(self, **options: Any) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.configs.append((Path(options["runtime_env"]["working_dir"]) / "config.yaml").read_text())
        self.submitted.append(options)
        return options["submission_id"]

    def list_jobs(self) -> list[Any]:
        # A driver that nobody submitted is in Ray's list too.
        ids = [(each["submission_id"], each["metadata"]) for each in self.submitted]
        return [
            SimpleNamespace(submission_id=job_id, metadata=metadata, status=self._state())
            for job_id, metadata in ((None, None), *self.others, *ids)
        ]

    def _state(self) -> Any:
        return SimpleNamespace(value=self.state)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    fake = Jobs()
    monkeypatch.setattr(supervisor_module, "connect_jobs", lambda address: fake)
    yield fake


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, jobs: Jobs, told: list[str]) -> Supervisor:
    return Supervisor([str(tmp_path / "runs")], address="http://head:8265", tell=told.append)


def make(root: Path, name: str, **changes: Any) -> RunRecord:
    """A run whose driver has died on this host, unless `changes` say otherwise."""
    config = parse_config(job_text({"run.name": name, "run.root": f"file://{root}"})).model_dump(mode="json")
    store = Store(root).child(name)
    keeper = claim(store, name, config, job_id="job-1")
    fields = {"state": "running", "owner": replace(keeper.record.owner, pid_started="1")}
    record = replace(keeper.record, **fields | changes)
    store.replace("run.json", record.to_json())
    return record


def test_orphans_of_a_cluster_are_submitted_and_nothing_else_is(
    tmp_path: Path, supervisor: Supervisor, jobs: Jobs, told: list[str]
) -> None:
    root = tmp_path / "runs"
    record = make(root, "orphan")
    make(root, "head-lost", state="failed", cluster_lost=True, cause="ClusterLost: the head …")
    make(root, "failed", state="failed", cause="RunFailed: …")
    make(root, "finished", state="finished")
    make(root, "stopped", state="stopped", stopped_by="raynium stop")
    make(root, "lives", owner=claim(Store(tmp_path / "other"), "other", record.config).record.owner)
    make(root, "on-a-laptop", job_id=None)
    make(root, "copied", config=record.config | {"run": record.config["run"] | {"root": "/elsewhere"}})
    supervisor.look()
    names = [each["metadata"]["run"] for each in jobs.submitted]
    assert sorted(names) == ["head-lost", "orphan"]
    assert parse_config(jobs.configs[names.index("orphan")]).model_dump(mode="json") == record.config
    assert any("run orphan is started again, as job raynium-orphan-" in line for line in told)
    assert any("process" in line and "ended without a word" in line for line in told)
    # They have not been taken yet.
    supervisor.look()
    assert len(jobs.submitted) == len(told) == 2


def test_a_job_that_died_before_it_took_its_run_is_waited_for_only_while_it_lives(
    tmp_path: Path, supervisor: Supervisor, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "runs", "orphan")
    now = [0.0]
    monkeypatch.setattr(supervisor_module.time, "monotonic", lambda: now[0])
    supervisor.look()
    now[0] += FIRST_PAUSE_SECONDS
    supervisor.look()
    assert len(jobs.submitted) == 1
    jobs.state = "FAILED"
    supervisor.look()
    assert len(jobs.submitted) == 2


def test_a_run_whose_own_job_lives_is_none_to_start_however_it_was_submitted(
    tmp_path: Path, supervisor: Supervisor, jobs: Jobs
) -> None:
    """By `ray job submit`, whose driver is in another container: nothing here can look at its process."""
    make(tmp_path / "runs", "elsewhere", owner=Owner("elsewhere", "boot pid:[1]", 1, "1"), heartbeat_unix=0.0)
    jobs.state, jobs.others = "RUNNING", [("job-1", {})]
    supervisor.look()
    assert not jobs.submitted
    jobs.others = [("job-2", {})]
    supervisor.look()
    assert len(jobs.submitted) == 1


def test_a_job_that_a_new_head_lists_as_running_for_a_dead_one_is_not_waited_for_for_ever(
    tmp_path: Path, supervisor: Supervisor, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "runs", "listed", owner=Owner("elsewhere", "boot pid:[1]", 1, "1"), heartbeat_unix=0.0)
    jobs.state, jobs.others = "RUNNING", [("job-1", {"run_url": Store(tmp_path / "runs/listed").url})]
    supervisor.look()
    assert not jobs.submitted
    monkeypatch.setattr(supervisor_module, "SILENT_JOB_SECONDS", 0.0)
    supervisor.look()
    assert len(jobs.submitted) == 1
    # Another job of the run is waited for, whatever its own is.
    jobs.others.append(("job-3", {"run_url": Store(tmp_path / "runs/listed").url}))
    supervisor.look()
    assert len(jobs.submitted) == 1


def test_a_run_that_somebody_has_stopped_is_not_started_though_nobody_lived_to_stop_it(
    tmp_path: Path, supervisor: Supervisor, jobs: Jobs, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, store = make(tmp_path / "runs", "orphan"), Store(tmp_path / "runs/orphan")
    request_stop(store)
    supervisor.look()
    supervisor.look()
    assert not jobs.submitted
    assert told == ["run orphan is not started again: somebody has stopped it. Submit it, and it goes on"]
    # Asked after a supervisor had submitted it: its driver stops at once.
    assert claim(store, "orphan", record.config, supervised=True).stop_requested()
    store.replace("run.json", record.to_json())

    def unreadable(*_: object) -> None:
        raise StoreError("s3://bucket/runs: expired")

    with monkeypatch.context() as patch:
        patch.setattr(supervisor_module, "stop_is_asked", unreadable)
        supervisor.look()
    assert told[-1] == "run orphan cannot be started: s3://bucket/runs: expired" and not jobs.submitted
    # A person starts it.
    assert not claim(store, "orphan", record.config).stop_requested()
    store.replace("run.json", record.to_json())
    supervisor.look()
    (job,) = jobs.submitted
    assert SUPERVISED in job["metadata"]


def test_what_hinders_a_start_is_told_once_and_tried_again(
    tmp_path: Path, supervisor: Supervisor, jobs: Jobs, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "runs/orphan")
    record = make(tmp_path / "runs", "orphan")
    now = [0.0]
    monkeypatch.setattr(supervisor_module.time, "monotonic", lambda: now[0])

    def refuse(*_: object) -> None:
        raise LaunchError("cannot reach a Ray cluster at http://head:8265")

    with monkeypatch.context() as patch:
        patch.setattr(supervisor_module, "connect_jobs", refuse)
        supervisor.look()
        supervisor.look()
    assert told == ["no run can be started: cannot reach a Ray cluster at http://head:8265"]

    def unreadable(*_: object) -> None:
        raise StoreError("s3://bucket/runs: expired")

    with monkeypatch.context() as patch:
        patch.setattr(supervisor_module, "read_records", unreadable)
        supervisor.look()
    assert "cannot be read: s3://bucket/runs: expired" in told[-1]

    jobs.refusal = RuntimeError("Request failed with status code 500")
    supervisor.look()
    assert told[-1] == "run orphan cannot be started: Request failed with status code 500"
    jobs.refusal = None
    old = json.loads(record.to_json())
    old["config"]["train"]["stepz"] = 3
    store.replace("run.json", json.dumps(old).encode())
    supervisor.look()
    assert "run orphan cannot be started" in told[-1] and "the config in the record of file://" in told[-1]
    store.replace("run.json", b"no record")
    supervisor.look()
    supervisor.look()
    assert [line for line in told if "is not a run record" in line] == told[-1:]
    store.replace("run.json", record.to_json())
    for _ in range(MOST_STARTS + 1):
        now[0] += LONGEST_PAUSE_SECONDS
        jobs.state = "FAILED"
        supervisor.look()
    assert len(jobs.submitted) == MOST_STARTS
    assert "is not started again: 12 starts brought no newer checkpoint" in told[-1]


def test_a_record_says_whether_its_run_is_orphaned(tmp_path: Path) -> None:
    record = RunRecord("a", {}, "running", Owner("elsewhere", "boot", 1, "1"), created_unix=0.0, heartbeat_unix=0.0)
    assert record.is_orphaned(1000.0) and not record.is_orphaned(1.0)
    assert not replace(record, state="stopped", stopped_by="SIGTERM").is_orphaned(1000.0)
    # Whoever takes it over says that it runs again.
    lost = make(tmp_path, "b", state="failed", cluster_lost=True)
    assert lost.is_orphaned(0.0)
    claim(Store(tmp_path / "b"), "b", lost.config, job_id="job-2")
    taken = read_record(Store(tmp_path / "b"))
    assert taken is not None and (taken.cluster_lost, taken.job_id) == (False, "job-2")
