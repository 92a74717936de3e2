"""The words at the end of a run, and of `raynium status`. No ray, torch or mlflow."""

import math
import shlex
import shutil
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from raynium.rank.ports import is_free
from raynium.run.record import RunRecord
from raynium.terminal.display import clock, held_out
from raynium.tracking.incidents import SHOWN, row
from raynium.tracking.ledger import Ledger
from raynium.tracking.runs import page_url

# Of the MLflow UI, as MLflow has it.
UI_PORT = 5000
# Exit code of a driver whose run `raynium stop` has ended.
STOPPED_ON_REQUEST = 3


def report_lines(record: RunRecord) -> list[str]:
    """What a person wants to know about a run, a line each."""
    now = time.time()
    state = record.shown_state(now)
    lines = [f"run {record.name}: {state} at step {record.step:,} of {_total(record)}"]
    if tuned := _tuned(record.config):
        lines.append(tuned)
    if cause := record.shown_cause(now):
        lines.append(f"cause: {cause}")
    lines += [f"generation {each['generation']}: {each['text']}" for each in record.node_faults or ()]
    lines += _incident_lines(record.incidents or [])
    if record.result is not None:
        lines += _result_lines(record.result)
    if record.ledger.total:
        lines.append(goodput_line(record.ledger))
    lines += ui_lines(record)
    if state in ("stopped", "interrupted", "failed"):
        lines.append("start it again to go on from its newest checkpoint")
    return lines


def _incident_lines(incidents: list[dict[str, Any]]) -> list[str]:
    """The newest ones, the last one last."""
    rows = [(datetime.fromtimestamp(each["unix"]), row(each)) for each in incidents[-SHOWN:]]
    lines = [f"  {when:%m-%d %H:%M:%S} step {step}: {what}: {why}: {lost}" for when, (what, why, step, lost) in rows]
    return [f"incidents: {len(incidents)}", *lines] if lines else []


def _tuned(config: dict[str, Any]) -> str:
    """What a run learns that is no plain pretraining: `task: sft, begins with /models/qwen, adapter of rank 8`."""
    said = _what_it_learns(config)
    parts = [f"task: {said['task']}"] if said["task"] != "pretraining" else []
    parts += [f"begins with {said['base']}"] if said["base"] is not None else []
    parts += [f"adapter of rank {said['adapter_rank']}"] if said["adapter_rank"] is not None else []
    return ", ".join(parts)


def _what_it_learns(config: dict[str, Any]) -> dict[str, Any]:
    """task, base (model.init) and adapter_rank, as a run's config has them; a run of an older release lacks some."""
    return {
        "task": config.get("task", "pretraining"),
        "base": config.get("model", {}).get("init"),
        "adapter_rank": (config.get("adapter") or {}).get("rank"),
    }


def _total(record: RunRecord) -> str:
    """Steps of the whole run; epochs are no steps before the data is there."""
    train = record.config["train"]
    return f"{train['steps']:,}" if train["steps"] is not None else f"{train['epochs']:g} epochs"


def exit_code(record: RunRecord) -> int:
    """Of the process that drove the run: 0 only for a finished one, so that `train && export` exports no half of it."""
    if record.state == "finished":
        return 0
    by = record.stopped_by or ""
    return 128 + signal.Signals[by] if by in signal.Signals.__members__ else STOPPED_ON_REQUEST


def _result_lines(result: dict) -> list[str]:
    lines = []
    for sample in result["samples"]:
        lines += ["", "-" * 20 + " sampled from the model " + "-" * 20, sample.rstrip()]
    if result["samples"]:
        lines += ["-" * 64, ""]
    if "bits_per_byte" in result:
        bits, unigram, zlib = (result[f"{prefix}bits_per_byte"] for prefix in ("", "unigram_", "zlib_"))
        found = f"{bits:.3f} bits per byte (its tokens' unigram model {unigram:.3f}, zlib {zlib:.3f})"
    else:
        whole = {
            name.removeprefix("eval/"): value for name, value in result["held_out"].items() if name.count("/") == 1
        }
        found = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in whole.items())
    lines.append(f"held-out documents: {found}")
    for name, value in result["held_out"].items():
        if name.endswith("/acc"):
            lines.append(f"questions of {name.split('/')[1]}: {100 * value:.1f} % right")
    return [*lines, f"checkpoint: {result['checkpoint']}"]


def goodput_line(ledger: Ledger) -> str:
    """Where the run's wall time went: `goodput: 83 % of 2:00: train 1:40, start 0:15, compile 0:05`."""
    longest_first = sorted(ledger.seconds().items(), key=lambda item: -item[1])
    parts = [f"{cause} {clock(seconds)}" for cause, seconds in longest_first if round(seconds)]
    return f"goodput: {100 * ledger.goodput:.0f} % of {clock(ledger.total)}: {', '.join(parts) or 'not a second yet'}"


def ui_port() -> int:
    """Where a page can be served on this machine: the first free port from UI_PORT on."""
    return next((port for port in range(UI_PORT, UI_PORT + 100) if is_free("127.0.0.1", port)), UI_PORT)


def page_of(record: RunRecord, port: int | None = None) -> str | None:
    """The address of the run's MLflow page, at its server or where `raynium ui` serves the local store.

    port: of the latter; None: one that is free now.
    """
    if record.mlflow_uri is None:
        return None
    assert record.mlflow_experiment_id is not None and record.mlflow_run_id is not None
    base = record.mlflow_uri if record.mlflow_uri.startswith("http") else f"http://127.0.0.1:{port or ui_port()}"
    return page_url(base, record.mlflow_experiment_id, record.mlflow_run_id)


def ui_lines(record: RunRecord, port: int | None = None) -> list[str]:
    """How to see the run's page: a server's address, or the command that serves the local store. port: as `page_of`."""
    port = port or ui_port()
    page = page_of(record, port)
    if page is None or record.mlflow_uri is None:
        return []
    if record.mlflow_uri.startswith("http"):
        return [f"MLflow page: {page}"]
    # `make quickstart` runs in a virtual environment that the person who reads this has not activated.
    program = "raynium" if shutil.which("raynium") else str(Path(sys.executable).parent / "raynium")
    own_port = [] if port == UI_PORT else ["--port", str(port)]
    command = shlex.join([program, "ui", record.name, "--root", record.config["run"]["root"], *own_port])
    return [f"MLflow page: {page}", f"       served by: {command}"]


def table_row(record: RunRecord, now_unix: float) -> tuple[str, str, str, str, str, str]:
    """name, state, step, how it does on held-out documents, started, why it does not go on."""
    started = datetime.fromtimestamp(record.created_unix).strftime("%Y-%m-%d %H:%M")
    step = f"{record.step:,}/{_total(record)}"
    cause = " ".join((record.shown_cause(now_unix) or "").split())
    return record.name, record.shown_state(now_unix), step, held_out(record.metrics or {}), started, cause


def record_json(record: RunRecord, now_unix: float) -> dict[str, Any]:
    """What `--json` says of a run. Numbers that JSON lacks (nan, inf) are null; times are seconds since 1970."""
    return {
        "name": record.name,
        "state": record.shown_state(now_unix),
        "cause": record.shown_cause(now_unix),
        **_what_it_learns(record.config),
        "step": record.step,
        "steps": record.config["train"]["steps"],
        "generation": record.generation,
        "created_unix": record.created_unix,
        "heartbeat_unix": record.heartbeat_unix,
        "metrics": {name: as_json(value) for name, value in (record.metrics or {}).items()},
        "goodput": record.ledger.goodput if record.ledger.total else None,
        "ledger_seconds": record.ledger.seconds(),
        "node_faults": record.node_faults or [],
        "incidents": record.incidents or [],
        "page": page_of(record),
        "job_id": record.job_id,
        "log_path": record.log_path,
    }


def as_json(value: float) -> float | None:
    return value if math.isfinite(value) else None
