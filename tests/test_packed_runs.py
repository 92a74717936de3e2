"""Whole runs over rows of several documents: what a driver tells, ranks that are killed, runs that go on later."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_agent import Played
from test_preparation import Attempt
from tiny import job_text
from waiting import wait_for

from raynium.config.load import parse_config
from raynium.data.build.store_build import build_store
from raynium.errors import DataError
from raynium.run.record import read_record
from raynium.tracking.client import mlflow_client

JOB = job_text(
    {
        "data.packing": "documents",
        "optimizer.learning_rate": 3e-3,
        "optimizer.schedule": "constant",
        "train.steps": 12,
        "checkpoint.every_steps": 4,
        "checkpoint.keep_last": 2,
        "evaluate.every_steps": 6,
    }
)


def build_short_documents(folder: Path) -> Path:
    """Several fit a row of 32, and some are longer."""
    (folder / "source").mkdir()
    for number in range(300):
        lines = [f"x{number} = {number} * {line}" for line in range(number % 5 + 1)]
        (folder / f"source/{number:03}.py").write_text("\n".join(lines))
    build_store(folder / "data", source=str(folder / "source"), vocab_size=512, heldout_fraction=0.2)
    return folder / "data"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_short_documents(tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, documents: Path
) -> tuple[Played, int]:
    config = parse_config(JOB, {"cluster.ranks_per_node": request.param})
    run = Played(config, tmp_path_factory.mktemp("reference") / "run", documents)
    run.thread.start()
    assert run.finish().ended == "finished"
    return run, request.param


@pytest.fixture
def play(tmp_path: Path, documents: Path) -> Iterator[Callable[..., Played]]:
    played: list[Played] = []

    def start(**changes: Any) -> Played:
        played.append(Played(parse_config(JOB, changes), tmp_path / "run", documents))
        return played[-1]

    yield start
    for run in played:
        if run.thread.is_alive():
            run.let_uploads_go()
        run.thread.join(60)


def test_a_killed_rank_and_a_run_that_goes_on_later_change_no_bit(
    play: Callable[..., Played], uninterrupted: tuple[Played, int]
) -> None:
    whole, ranks = uninterrupted
    reference = whole.losses()
    assert sorted(reference) == list(range(1, 13)) and reference[12] < reference[1]

    first = play(**{"cluster.ranks_per_node": ranks, "train.steps": 8})
    first.hold_uploads()
    first.thread.start()
    wait_for(lambda: any(len(held.ranks) == ranks for held in first.agent._saving.images.held()))
    os.kill(first.agent.rank_pids()[ranks - 1], signal.SIGKILL)
    wait_for(lambda: first.status().generation == 2)
    first.let_uploads_go()
    status = first.finish()
    assert (status.ended, status.generation) == ("finished", 2)

    later = play(**{"cluster.ranks_per_node": ranks})
    later.thread.start()
    assert later.finish().ended == "finished"
    assert sorted(first.losses()) == list(range(1, 9)) and sorted(later.losses()) == list(range(9, 13))
    for step, losses in (first.losses() | later.losses()).items():
        assert set(losses) == set(reference[step]), f"step {step}"
    for name in ("eval/loss", "eval/bits_per_byte"):
        assert later.tracker.values(name)[-1] == whole.tracker.values(name)[-1]


def test_tokens_per_second_leave_out_what_fills_rows_up(uninterrupted: tuple[Played, int]) -> None:
    tracker = uninterrupted[0].tracker
    rates, seconds = (dict(tracker.values(name)) for name in ("throughput/tokens_per_second", "time/step_seconds"))
    counted = [rates[step] * seconds[step] for step in rates]
    assert all(0.7 * 4 * 32 < labels <= 4 * 32 + 1e-6 for labels in counted)
    assert any(labels < 4 * 32 - 0.5 for labels in counted), "no row had been filled up"
    assert dict(tracker.values("train/tokens"))[12] == 12 * 4 * 32


def test_the_driver_says_how_full_rows_are_and_records_it(documents: Path, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "packed")
    changes = {"data.path": str(documents), "data.packing": "documents", "data.too_long": "leave_out"}
    prepared = attempt(**changes)
    (line,) = [line for line in attempt.told if "packed into" in line]
    assert line.startswith("data: ") and "% of their positions filled, " in line and "longer ones left out" in line
    record = read_record(prepared.store)
    assert record is not None and record.packing is not None
    assert f"{record.packing['documents']} documents packed into {record.packing['rows']} rows of 32" in line
    assert 0.8 < record.packing["efficiency"] < 1 and record.packing["left_out"] > 50
    with mlflow_client(prepared.mlflow.uri, timeout_seconds=10) as client:
        (data,) = client.get_run(prepared.mlflow.run_id).inputs.dataset_inputs
    profile = json.loads(data.dataset.profile)
    assert {name: profile[f"packed_{name}"] for name in record.packing} == record.packing


def test_rows_that_no_document_fits_are_refused_before_a_node_is_asked_for(documents: Path, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "packed")
    changes = {"data.path": str(documents), "data.packing": "documents", "data.too_long": "leave_out"}
    attempt.refused(DataError, "data.seq_len = 2: no document of .* fits a row", **changes, **{"data.seq_len": 2})
