"""Two nodes of a rank each, of which one hangs or computes wrong numbers: who is named, what is kept, and what the run
becomes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import job_text

from raynium.rank.armed import CHAOS_VARIABLE, FLIPS_NAME

# Whole processes, which import torch, on shared cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 240
JOB = job_text(
    {
        "cluster.nodes": 2,
        "cluster.ranks_per_node": 1,
        "train.steps": 9,
        "checkpoint.every_steps": 3,
        "evaluate.every_steps": 100,
        "evaluate.max_documents": 1,
        "fault.hang_seconds": 2,
    }
)


def run(folder: Path, document_folder: Path, hang: str = "", **changes: Any) -> dict[str, Any]:
    """One run's status, once it has ended; beside it losses.jsonl and its artifacts.

    In step 6 rank 0 flips a bit of its gradient, if that step is audited.
    """
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    arguments = {"run_url": str(folder / "run"), "data_folder": str(document_folder), "changes": changes}
    arguments |= {"last_save_seconds": 60, "preload": ["_hanging_parts"] if hang else []}
    (folder / "arguments.json").write_text(json.dumps(arguments))
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    (folder / FLIPS_NAME).write_text("6\n")
    environment[CHAOS_VARIABLE] = str(folder)
    if hang:
        environment["RAYNIUM_TEST_HANG"] = f"{hang} {folder / 'hung'}"
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "_agent_process.py"), str(folder)],
        env=environment,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    return json.loads((folder / "status.json").read_text())


def losses(folder: Path) -> dict[int, set[float]]:
    found: dict[int, set[float]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        step, loss = json.loads(line)
        found.setdefault(step, set()).add(loss)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, document_folder: Path) -> dict[int, set[float]]:
    folder = tmp_path_factory.mktemp("reference") / "life"
    assert run(folder, document_folder)["ended"] == "finished"
    return losses(folder)


@pytest.mark.parametrize(
    "where, place, missed, remedy",
    [
        ("data", "is waiting for the data of step 6", "", "its loader gets no data"),
        ("collective", "is in step 6", ", and has not come to collective ", "its stacks say what it does"),
        ("native", "is in step 6", ", and has not come to collective ", "its stacks say what it does"),
    ],
)
def test_the_rank_that_hangs_is_named_with_its_node_and_the_run_goes_on_from_memory(
    tmp_path: Path,
    document_folder: Path,
    reference: dict[int, set[float]],
    where: str,
    place: str,
    missed: str,
    remedy: str,
) -> None:
    folder = tmp_path / "life"
    status = run(folder, document_folder, hang=f"{where} 1 6")
    told = "\n".join(status["events"])
    assert status["ended"] == "finished", told
    assert f"generation 1 failed: hang: rank 1 on node 1 (127.0.0.1) {place}{missed}" in told
    assert "limit 2 s, fault.hang_seconds); 1 other rank(s) wait; " + remedy in told
    assert "generation 2: 2 ranks on 2 node(s), from the snapshot of step 3 in memory" in told
    stacks = (folder / "artifacts/hangs/generation-00001/stacks.txt").read_text()
    waiting, hanging = stacks.split("==== rank 1, node 1: ")
    assert "hang_at_its_step" in hanging and "hang_at_its_step" not in waiting and "in train" in waiting, stacks
    assert losses(folder) == reference


def test_a_node_that_flips_a_bit_of_its_gradient_in_an_audited_step_is_named_and_the_step_is_taken_again(
    tmp_path: Path, document_folder: Path, reference: dict[int, set[float]]
) -> None:
    folder = tmp_path / "life"
    status = run(folder, document_folder, **{"fault.audit_every_steps": 6})
    told = "\n".join(status["events"])
    assert status["ended"] == "finished", told
    assert "generation 1 failed: rank 0: it computes wrong gradients and reports no error, an audit found" in told
    assert "SilentCorruption: step 6: rank 0 on node 0: others of 2 data ranks found another gradient" in told
    assert "node 0 (127.0.0.1): it computes wrong gradients and reports no error" in told
    assert "replace this instance" in told and "node 1 (127.0.0.1)" not in told
    assert "generation 2: 2 ranks on 2 node(s), from the snapshot of step 3 in memory" in told
    assert losses(folder) == reference


def test_a_rank_that_all_others_wait_for_is_named_with_its_node_and_left_if_the_config_says_so(
    tmp_path: Path, document_folder: Path, reference: dict[int, set[float]]
) -> None:
    folder = tmp_path / "life"
    changes = {"fault.hang_seconds": 60, "fault.stragglers": "leave"}
    status = run(folder, document_folder, "slow 1 1", **changes)
    told = "\n".join(status["events"])
    assert status["ended"] == "finished", told
    assert "straggler: rank 1 on node 1 (127.0.0.1): it needs " in told and "straggler: rank 0" not in told
    assert "node 1 (127.0.0.1): it needs " in told and "replace this instance" in told
    ranks = json.loads((folder / "artifacts/step_times.json").read_text())["ranks"]
    assert {rank: each["node"] for rank, each in ranks.items()} == {"0": 0, "1": 1}
    assert ranks["1"]["median_seconds"] > 0.5 and ranks["1"]["p90_seconds"] <= ranks["1"]["most_seconds"]
    assert losses(folder) == reference
