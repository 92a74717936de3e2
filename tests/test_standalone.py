"""Ranks that torchrun starts: the same training without Ray, for debugging."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from standalone_ranks import trained
from tiny import build_documents, job_text

from raynium import find_run, standalone
from raynium.checkpoint.catalog import latest, list_checkpoints
from raynium.config.load import parse_config
from raynium.data.build.store_build import build_store
from raynium.data.store import TOKENIZER_NAME, open_store
from raynium.generation.sampler import open_sampler
from raynium.rank.ports import free_port
from raynium.run.record import claim
from raynium.storage.store import Store

CHANGES = {
    "run.name": "alone",
    "engine.dtype": "float32",
    "optimizer.schedule": "constant",
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 2,
    "evaluate.every_steps": 4,
    "evaluate.max_documents": 2,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file; its run and data lie beside it."""
    folder = tmp_path_factory.mktemp("alone")
    build_documents(folder)
    (folder / "job.yaml").write_text(job_text(CHANGES, root=folder))
    return folder / "job.yaml"


def torchrun(job: Path, *overrides: str) -> str:
    """The log of two ranks that have ended well."""
    port = free_port("127.0.0.1")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"),
            *("--master-port", str(port), "-m", "raynium.standalone", str(job), *overrides),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    # torchrun says a page about a rank that failed, behind what the rank itself said.
    assert done.returncode == 0, done.stdout + re.split(r"(?m)^E\d{4} ", done.stderr)[0]
    return done.stderr


def losses(log: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): train/loss ([\d.]+)", log)}


def test_it_trains_saves_and_goes_on_where_it_ended_with_the_same_data(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(job.parent / "alone")
    first = torchrun(job, "train.steps=2")
    assert sorted(losses(first)) == [1, 2]
    assert "eval/bits_per_byte" in first and "rank 0 INFO: finished at step 2" in first
    checkpoint = latest(store)
    assert checkpoint is not None and checkpoint.step == 2 and checkpoint.manifest.world_size == 2
    second = trained(job)
    assert "note: train.steps changed from 2 to 4" in second
    assert "resumed from the checkpoint of step 2" in second and sorted(losses(second)) == [3, 4]
    assert losses(second)[4] < losses(first)[1]
    assert [each.step for each in list_checkpoints(store)] == [2, 4]
    assert store.read(TOKENIZER_NAME) == (job.parent / "data" / TOKENIZER_NAME).read_bytes()
    assert open_sampler(store.url).step == 4
    build_store(tmp_path / "other", source=str(job.parent / "text"), vocab_size=512, heldout_fraction=0.5)
    message = refused(monkeypatch, str(job), f"data.path={tmp_path / 'other'}")
    for path in (job.parent / "data", tmp_path / "other"):
        assert open_store(path).manifest.identity in message


def reported(log: str, name: str) -> list[str]:
    return re.findall(rf"{name} ([\d.e+-]+)", log)


def test_it_is_judged_by_other_stores_and_questions_and_ends_when_they_say_so(job: Path, tmp_path: Path) -> None:
    """Rows of questions are shared by both ranks, over more than one call each."""
    shutil.copytree(job.parent / "data", tmp_path / "copy")
    lines = [f"def function_{number}_1(x): return x * {number}" for number in range(7)]
    parts = [line.split(": ") for line in lines]
    easy = [{"context": f"{head}:", "choices": [rest, "zzz", "import numpy"], "answer": 0} for head, rest in parts]
    hard = [{"context": f"{head}:", "choices": [rest, "zq " * 3], "answer": 1} for head, rest in parts]
    for name, questions in (("easy", easy), ("hard", hard)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    judges = [
        "run.name=judged",
        "train.steps=20",
        "evaluate.every_steps=1",
        "evaluate.patience=2",
        "checkpoint.best_metric=eval/hard/acc",
        f"evaluate.sets=[{tmp_path}/copy]",
        f"evaluate.tasks=[{tmp_path}/easy.jsonl, {tmp_path}/hard.jsonl]",
    ]
    log = trained(job, *judges)
    assert reported(log, "eval/hard/acc") == ["0", "0", "0"]
    assert "finished at step 3: ended early at step 3: eval/hard/acc has not improved in 2 evaluations" in log
    assert reported(log, "eval/copy/loss") == reported(log, "eval/loss") and len(reported(log, "eval/loss")) == 3
    store = Store(job.parent / "judged")
    assert [each.step for each in list_checkpoints(store)] == [2, 3]
    # By command on the last checkpoint: the same numbers.
    found = find_run("judged", job.parent).evaluate(tmp_path / "easy.jsonl", tmp_path / "hard.jsonl")
    assert {name: f"{value:.6g}" for name, value in found.items()} == {name: reported(log, name)[-1] for name in found}
    # From its last checkpoint it knows that it is over; with more patience it goes on.
    assert "finished at step 3: ended early" in trained(job, *judges)
    longer = trained(job, *judges, "evaluate.patience=4")
    assert "finished at step 5: ended early at step 5: eval/hard/acc has not improved in 4 evaluations" in longer


# ------------------------------------------------------------------------------------------------- refused


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str, world_size: int = 2) -> str:
    """The message of a rank that ends before it has met the others; runs in this process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(sys, "argv", ["standalone", *arguments])
    with pytest.raises(SystemExit) as ended:
        standalone.main()
    return str(ended.value.code)


def test_without_torchrun_or_a_config_it_says_how_to_start_it(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "usage: torchrun --nproc-per-node RANKS -m raynium.standalone CONFIG"
    assert refused(monkeypatch).startswith(usage)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(sys, "argv", ["standalone", str(job)])
    with pytest.raises(SystemExit, match=re.escape(usage)):
        standalone.main()


def test_another_number_of_ranks_than_the_config_has_is_refused(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, str(job), world_size=3) == (
        "error: torchrun started 3 ranks, the config asks for 2 (cluster.nodes × cluster.ranks_per_node). "
        "Make them equal"
    )


def test_a_run_that_a_driver_owns_is_refused(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(job.read_text(), {"run.name": "owned"})
    keeper = claim(Store(job.parent / "owned"), "owned", config.model_dump(mode="json"))
    assert "error: run 'owned'" in refused(monkeypatch, str(job), "run.name=owned")
    keeper.update(state="stopped")
    assert not list_checkpoints(Store(job.parent / "owned"))


def test_bad_input_is_one_message(job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "did you mean train.steps" in refused(monkeypatch, str(job), "train.stepz=3")
    assert "is no document store" in refused(monkeypatch, str(job), "run.name=no-data", f"data.path={tmp_path}")
