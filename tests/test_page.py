"""The run's page on a real MLflow server: the verdict first, kept current, and the end of a run that nobody drives."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chromium import CHROMIUM, look
from commands import Ended, run_command
from mlflow import MlflowClient
from mlflow_server import Server
from tiny import job_text

from raynium.config.load import parse_config
from raynium.launch import page as page_module
from raynium.launch.page import DESCRIPTION, STATE, Page, describe, end_abandoned_pages, end_page
from raynium.run.protocol import Status
from raynium.run.record import Owner, RecordKeeper, RunRecord, claim
from raynium.storage.store import Store
from raynium.tracking.incidents import Incident
from raynium.tracking.ledger import Ledger
from raynium.tracking.metrics import METRICS
from raynium.tracking.runs import TrackedRun, end_abandoned, open_run, page_url
from raynium.tracking.sender import MlflowTracker

NOBODY = Owner("elsewhere", "boot", 7, "1")
CAUSE = "rank 1: killed by <b>SIGKILL</b> `now`\nand **then** nothing"


@pytest.fixture
def mlflow(mlflow_server: Server, request: pytest.FixtureRequest) -> TrackedRun:
    return open_run(
        mlflow_server.uri, experiment="raynium", run_name=request.node.name[:60], run_id=None, params={}, tags={}
    )


@pytest.fixture
def keeper(tmp_path: Path, mlflow: TrackedRun) -> RecordKeeper:
    """A run under ./runs that this process drives."""
    config = parse_config(job_text({"run.name": "first", "train.steps": 6000}, root=tmp_path / "runs"))
    keeper = claim(Store(tmp_path / "runs/first"), "first", config.model_dump(mode="json"))
    tracked = {"mlflow_uri": mlflow.uri, "mlflow_run_id": mlflow.run_id, "mlflow_experiment_id": mlflow.experiment_id}
    keeper.update(state="running", step=4000, metrics={"eval/bits_per_byte": 2.125}, **tracked)
    return keeper


def die(keeper: RecordKeeper, unix: float = 1000.0) -> RunRecord:
    record = replace(keeper.record, owner=NOBODY, heartbeat_unix=unix)
    keeper._store.replace("run.json", record.to_json())
    return record


def shown(mlflow: TrackedRun) -> Any:
    return MlflowClient(mlflow.uri).get_run(mlflow.run_id)


def test_the_description_says_the_verdict_first_then_why_and_how_to_go_on(keeper: RecordKeeper) -> None:
    incidents = [
        Incident("a-1", 60.0, "agents", "10.0.0.3", "lost | found", 90, 12.25).to_json(),
        Incident("a-2", 86400.0, "ranks", "10.0.0.4", CAUSE, 3990, None).to_json(),
        Incident("a-3", 90000.0, "ranks", "", CAUSE, 3999, 0.5, steps=1400).to_json(),
    ]
    record = replace(
        keeper.record, generation=3, committed_step=3500, incidents=incidents, ledger=Ledger(train=90.0, start=10.0)
    )
    root = record.config["run"]["root"]
    live = describe(record, now_unix=0.0, eta_seconds=75.0).splitlines()
    assert live[0] == "**running** at step 4,000 of 6,000 · ETA 1:15 · held-out 2.125 bits/byte · goodput 90 %"
    words = "rank 1: killed by <b>SIGKILL</b> 'now' and **then** nothing"
    assert live[2:11] == [
        f"- to go on, should it break off: `raynium train {root}/first/config.yaml`",
        "- last checkpoint: step 3,500; restarts: 2",
        "- goodput: 90 % of 1:40: train 1:30, start 0:10",
        "",
        "| when (UTC) | what failed | why | at step | lost |",
        "|---|---|---|---|---|",
        f"| 01-02 01:00:00 | ranks | `{words}` | 3,999 | 0.5 s, 1,400 step(s) again |",
        f"| 01-02 00:00:00 | ranks on 10.0.0.4 | `{words}` | 3,990 | not over yet |",
        "| 01-01 00:01:00 | agents on 10.0.0.3 | `lost   found` | 90 | 12.2 s |",
    ]
    failed = describe(replace(record, state="failed", cause=CAUSE), now_unix=0.0).splitlines()
    assert failed[0].startswith("**failed** at step 4,000 of 6,000")
    assert failed[2:4] == [f"- cause: `{words}`", f"- to go on: `raynium train {root}/first/config.yaml`"]
    dead = describe(replace(record, owner=NOBODY, heartbeat_unix=0.0), now_unix=1000.0).splitlines()
    assert dead[0].startswith("**interrupted** at") and "process 7 on elsewhere, ended without a word" in dead[2]
    assert "to go on" not in describe(replace(record, state="finished"), now_unix=0.0)


def test_the_command_to_go_on_is_one_that_a_shell_reads_back_and_that_reaches_the_run(keeper: RecordKeeper) -> None:
    config = keeper.record.config
    spaced = replace(keeper.record, config=config | {"run": config["run"] | {"root": "file:///data/my runs"}})
    command = describe(spaced, now_unix=0.0).partition("break off: `")[2].partition("`")[0]
    assert shlex.split(command) == ["raynium", "train", "/data/my runs/first/config.yaml"]
    in_s3 = replace(keeper.record, config=config | {"run": config["run"] | {"root": "s3://b/runs"}}, job_id="job-1")
    assert "`raynium submit config.yaml`, with that file from this run's artifacts" in describe(in_s3, now_unix=0.0)


def test_a_running_page_is_written_three_times_a_minute_and_a_node_to_see_to_at_once(
    keeper: RecordKeeper, mlflow: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(page_module, "time", SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: now.seconds))
    writes: list[set[str]] = []
    set_tags = page_module.set_tags

    def counted(uri: str, run_id: str, tags: dict[str, str]) -> None:
        set_tags(uri, run_id, tags)
        writes.append({*tags})

    monkeypatch.setattr(page_module, "set_tags", counted)
    told: list[str] = []
    page = Page(mlflow, open_mlflow=lambda: mlflow, dtype="float32", tell=told.append)
    with page:
        for second in range(61):
            now.seconds = 1000.0 + second
            faults = [{"text": "node 1 is sick", "generation": 1}] if second >= 5 else None
            status = Status(1, True, None, second, {}, None, None, (), None, None)
            page.show(status, replace(keeper.record, step=second, node_faults=faults))
            if page._writing is not None:
                page._writing[1].result(60)
    description = {STATE, DESCRIPTION}
    assert writes == [description, {"node_fault.1"}, {DESCRIPTION}, {DESCRIPTION}, {DESCRIPTION}]
    tags = shown(mlflow).data.tags
    assert tags[DESCRIPTION].startswith("**running** at step 60 of 6,000 · ETA ") and tags[STATE] == "running"
    assert tags["node_fault.1"] == "node 1 is sick" and not told


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("stopped", "FINISHED"), ("failed", "FAILED")])
def test_a_run_that_was_stopped_did_as_it_was_asked(
    keeper: RecordKeeper, mlflow: TrackedRun, state: str, status: str
) -> None:
    keeper.update(state=state, cause="RunFailed: https://me:secret@host" if state == "failed" else None)
    end_page(mlflow, keeper.record)
    run = shown(mlflow)
    assert (run.info.status, run.data.tags[STATE]) == (status, state)
    assert run.data.tags[DESCRIPTION].startswith(f"**{state}** at step 4,000")
    assert "secret" not in run.data.tags[DESCRIPTION]
    (found,) = MlflowClient(mlflow.uri).search_runs(
        [mlflow.experiment_id], f"tags.`raynium.state` = '{state}' and attributes.run_id = '{mlflow.run_id}'"
    )
    assert found.info.run_id == mlflow.run_id


@pytest.mark.parametrize("command", [("runs",), ("runs", "--json"), ("status", "first"), ("ui", "first")])
def test_whoever_looks_at_a_run_whose_driver_has_died_ends_its_page(
    keeper: RecordKeeper,
    mlflow: TrackedRun,
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
    monkeypatch.delenv("RAYNIUM_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    look: Callable[..., Ended] = partial(run_command, monkeypatch=monkeypatch, capsys=capsys)
    assert look(*command).code == 0
    assert shown(mlflow).info.status == "RUNNING", "its driver lives"
    die(keeper)
    assert look(*command).code == 0
    run = shown(mlflow)
    assert (run.info.status, run.info.end_time, run.data.tags[STATE]) == ("FAILED", 1_000_000, "interrupted")
    assert "process 7 on elsewhere, ended without a word" in run.data.tags[DESCRIPTION]
    MlflowClient(mlflow.uri).set_tag(mlflow.run_id, DESCRIPTION, "what a person wrote")
    MlflowClient(mlflow.uri).update_run(mlflow.run_id, status="RUNNING")
    assert look(*command).code == 0
    run = shown(mlflow)
    assert (run.info.status, run.data.tags[DESCRIPTION]) == ("RUNNING", "what a person wrote"), "it is written once"


def test_a_run_that_another_driver_takes_meanwhile_stays_open(mlflow: TrackedRun) -> None:
    for answers in ([False], [True, False]):
        end_abandoned(mlflow.uri, mlflow.run_id, {}, unix=1000.0, still=partial(next, iter(answers)))
        assert shown(mlflow).info.status == "RUNNING"


def test_a_page_that_ended_by_itself_is_left_as_it_is(keeper: RecordKeeper, mlflow: TrackedRun) -> None:
    keeper.update(state="finished")
    end_page(mlflow, keeper.record)
    end_abandoned_pages([die(keeper), replace(keeper.record, state="running", owner=NOBODY, heartbeat_unix=0.0)])
    assert shown(mlflow).data.tags[STATE] == "finished"


def test_a_server_that_is_away_is_asked_once_and_the_next_look_writes(
    keeper: RecordKeeper, mlflow: TrackedRun, mlflow_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    record = die(keeper)
    local = replace(record, mlflow_uri="sqlite:////nowhere/mlflow.db")
    mlflow_server.kill()
    try:
        end_abandoned_pages([local, record, replace(record, name="second"), replace(record, mlflow_run_id=None)])
    finally:
        mlflow_server.start()
    assert len(caplog.messages) == 1
    assert "page of run first does not show that it was interrupted: MLflow at" in caplog.text
    end_abandoned_pages([record])
    assert shown(mlflow).data.tags[STATE] == "interrupted"


def test_a_run_is_ended_by_who_may_not_write_its_store_too(
    keeper: RecordKeeper, mlflow: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raynium.errors import StoreError

    record = die(keeper)

    def refuse(*arguments: Any) -> None:
        raise StoreError("only to be read")

    monkeypatch.setattr(Store, "replace", refuse)
    end_abandoned_pages([record])
    assert shown(mlflow).data.tags[STATE] == "interrupted"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_a_browser_shows_the_verdict_in_the_training_view_and_the_charts_of_learning_first(
    keeper: RecordKeeper, mlflow: TrackedRun, tmp_path: Path
) -> None:
    keeper.update(state="stopped", stopped_by="raynium stop")
    end_page(mlflow, keeper.record)
    tracker = MlflowTracker(tmp_path / "spool", uri=mlflow.uri, run_id=mlflow.run_id)
    for step in (1, 2):
        tracker.append(dict.fromkeys(METRICS, step / 7), step=step, unix_ms=step)
    tracker.close(timeout_seconds=60)
    page = page_url(mlflow.uri, mlflow.experiment_id, mlflow.run_id)
    assert "first" in (text := look(page, until="document.body.innerText.includes('Registered models')"))
    assert "Model registry" in text and "Evaluation runs" not in text, "the training view"
    assert "stopped at step 4,000 of 6,000" in text and "cause: stopped by raynium stop" in text
    assert "Finished" in text and "to go on: raynium train" in text
    words = "document.body.innerText.includes('vitals/time')"
    lines = look(page.replace("?", "/model-metrics?"), until=words).splitlines()
    areas = {name.rpartition("/")[0] for name in METRICS}
    shown_areas = [line.removeprefix("vitals/") for line in lines if line.removeprefix("vitals/") in areas]
    assert shown_areas[:4] == ["eval", "rewards", "throughput", "train"] and {*shown_areas} == areas
