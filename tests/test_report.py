"""The words at the end of a run, and those of `raynium status` and `raynium runs`."""

import os
import shlex
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from raynium.health.faults import Fault
from raynium.run.protocol import NodeFault
from raynium.run.record import Owner, RunRecord, this_process
from raynium.terminal.report import exit_code, goodput_line, record_json, report_lines, table_row, ui_lines
from raynium.tracking.ledger import Ledger

pytestmark = pytest.mark.quick

CONFIG = {"train": {"steps": 2000}, "run": {"root": "/data/my runs"}}
RESULT = {
    "held_out": {"eval/bits_per_byte": 2.0},
    "bits_per_byte": 2.0,
    "unigram_bits_per_byte": 4.25,
    "zlib_bits_per_byte": 2.5,
    "checkpoint": "file:///data/my runs/first/checkpoints/step-000002000",
    "samples": ["def main():\n    pass\n\n", "import os"],
}
PAGE = "http://127.0.0.1:5000/#/experiments/1/runs/m1?workflowType=machine_learning"
NOBODY = Owner("elsewhere", "boot", 1, "1")


def record(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "name": "first", "config": CONFIG, "state": "finished", "owner": NOBODY, "created_unix": 0.0,
        "heartbeat_unix": 0.0, "step": 2000,
    }  # fmt: skip
    return RunRecord(**fields | changes)


@pytest.fixture(autouse=True)
def free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.terminal.report.is_free", lambda host, port: True)


TRACKED = {"mlflow_uri": "sqlite:////data/my runs/mlflow.db", "mlflow_run_id": "m1", "mlflow_experiment_id": "1"}


def test_a_run_says_its_task_what_it_begins_with_and_its_adapter() -> None:
    tuned = CONFIG | {"task": "sft", "model": {"init": "/models/qwen"}, "adapter": {"rank": 8}}
    assert report_lines(record(config=tuned, state="stopped"))[1] == (
        "task: sft, begins with /models/qwen, adapter of rank 8"
    )
    said = record_json(record(config=tuned), 0.0)
    assert (said["task"], said["base"], said["adapter_rank"]) == ("sft", "/models/qwen", 8)
    plain = CONFIG | {"task": "pretraining", "model": {"init": None}, "adapter": {"rank": None}}
    assert report_lines(record(config=plain, state="stopped")) == report_lines(record(state="stopped"))


def test_a_finished_run_ends_with_its_words_its_numbers_and_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert report_lines(record(result=RESULT, **TRACKED)) == [
        "run first: finished at step 2,000 of 2,000",
        "",
        "-------------------- sampled from the model --------------------",
        "def main():\n    pass",
        "",
        "-------------------- sampled from the model --------------------",
        "import os",
        "-" * 64,
        "",
        "held-out documents: 2.000 bits per byte (its tokens' unigram model 4.250, zlib 2.500)",
        "checkpoint: file:///data/my runs/first/checkpoints/step-000002000",
        f"MLflow page: {PAGE}",
        "       served by: raynium ui first --root '/data/my runs'",
    ]


def test_the_time_of_a_run_is_told_longest_first_without_what_took_no_second() -> None:
    ledger = Ledger(train=3600, start=60, down=125.4, save=0.4, step=7)
    lines = report_lines(record(state="stopped", step=7, ledger=ledger))
    assert lines[1] == "goodput: 95 % of 1:03:06: train 1:00:00, down 2:05, start 1:00"
    assert goodput_line(Ledger(start=0.2)) == "goodput: 0 % of 0:00: not a second yet"


def test_a_node_that_a_verdict_named_is_named_with_what_to_do() -> None:
    fault = Fault(
        "dma-abort", "a DMA engine stopped for good", "replace", "node", "[MLA 2][NC 1] DMA TX engine 14", 2, 1
    )
    named = NodeFault(3, 1, "10.0.0.3", "abc", fault)
    lines = report_lines(record(state="stopped", node_faults=[named.to_json()]))
    assert lines[1] == (
        "generation 3: node 1 (10.0.0.3): Neuron device 2, core 1, a DMA engine stopped for good: "
        "replace this instance (terminate it, or stop and start it): it will fail again"
    )


def test_the_command_that_serves_the_page_works_where_no_environment_is_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    served = report_lines(record(result=RESULT, **TRACKED))[-1]
    program = served.removeprefix("       served by: ").partition(" ui ")[0]
    assert Path(program).is_absolute() and os.access(program, os.X_OK)


def test_without_prompts_there_is_no_frame_around_nothing() -> None:
    lines = report_lines(record(result=RESULT | {"samples": []}))
    assert lines[1].startswith("held-out documents") and len(lines) == 3


def test_questions_that_were_answered_are_told_at_the_end() -> None:
    held_out = {"eval/loss": 0.79, "eval/arc/acc": 0.425, "eval/arc/acc_norm": 0.45, "eval/books/loss": 1.0}
    result = {"samples": [], "held_out": held_out, "checkpoint": "file:///c"}
    lines = report_lines(record(result=result))
    assert lines[1:3] == ["held-out documents: loss 0.79", "questions of arc: 42.5 % right"]


AGAIN = "start it again to go on from its newest checkpoint"


def test_a_stopped_run_says_how_to_go_on() -> None:
    assert report_lines(record(state="stopped", step=120)) == ["run first: stopped at step 120 of 2,000", AGAIN]


@pytest.mark.parametrize(
    ("state", "stopped_by", "code"),
    [
        ("finished", None, 0), ("stopped", "SIGINT", 130), ("stopped", "SIGTERM", 143), ("stopped", "SIGHUP", 129),
        ("stopped", "raynium stop", 3), ("stopped", None, 3),
    ],
)  # fmt: skip
def test_only_a_finished_run_exits_with_0(state: str, stopped_by: str | None, code: int) -> None:
    assert exit_code(record(state=state, stopped_by=stopped_by)) == code


def test_a_failed_run_says_why() -> None:
    lines = report_lines(record(state="failed", step=120, cause="RunFailed: rank 1: killed by SIGKILL"))
    assert lines == ["run first: failed at step 120 of 2,000", "cause: RunFailed: rank 1: killed by SIGKILL", AGAIN]


@pytest.mark.parametrize("state", ["preparing", "running"])
def test_a_run_whose_driver_is_gone_was_interrupted(state: str) -> None:
    gone = record(state=state, step=7)
    first, cause, last = report_lines(gone)
    assert (first, cause, last) == (
        "run first: interrupted at step 7 of 2,000",
        f"cause: {gone.shown_cause(1e9)}",
        AGAIN,
    )
    assert "process 1 on elsewhere" in cause
    now = time.time()
    alive = record(state=state, step=7, owner=this_process(), heartbeat_unix=now)
    assert report_lines(alive) == [f"run first: {state} at step 7 of 2,000"]


def test_the_page_of_a_server_needs_no_command() -> None:
    tracked = record(**TRACKED | {"mlflow_uri": "https://mlflow.example.com/"})
    assert ui_lines(tracked) == [
        "MLflow page: https://mlflow.example.com/#/experiments/1/runs/m1?workflowType=machine_learning"
    ]


def test_the_command_of_a_local_page_is_one_a_shell_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    page, served = ui_lines(record(**TRACKED), port=5001)
    assert page == f"MLflow page: {PAGE.replace('5000', '5001')}"
    assert shlex.split(served.partition(": ")[2]) == [
        *("raynium", "ui", "first", "--root", "/data/my runs", "--port", "5001"),
    ]


def test_a_page_is_not_said_to_be_where_another_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.terminal.report.is_free", lambda host, port: port > 5001)
    page, served = ui_lines(record(**TRACKED))
    assert page == f"MLflow page: {PAGE.replace('5000', '5002')}"
    assert shlex.split(served)[-2:] == ["--port", "5002"]


def test_before_tracking_has_begun_there_is_no_page() -> None:
    assert ui_lines(record()) == []


def test_a_line_of_the_list() -> None:
    now = time.time()
    running = record(
        state="running", step=1500, owner=this_process(), created_unix=now, heartbeat_unix=now,
        metrics={"eval/bits_per_byte": 2.34567},
    )  # fmt: skip
    started = datetime.fromtimestamp(now).strftime("%Y-%m-%d %H:%M")
    assert table_row(running, now) == ("first", "running", "1,500/2,000", "2.346 bits/byte", started, "")
    tuned = replace(running, metrics={"eval/loss": 0.5123})
    assert table_row(tuned, now)[3] == "loss 0.512"
    gone = replace(running, owner=NOBODY, metrics=None)
    assert table_row(gone, now + 3600)[1:4] == ("interrupted", "1,500/2,000", "")
    assert table_row(gone, now + 3600)[5] == gone.shown_cause(now + 3600)
