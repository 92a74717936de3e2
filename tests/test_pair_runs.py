"""Whole runs of DPO and ORPO on CPU ranks: gone on with, at other world sizes, from other weights, over data alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from standalone_ranks import trained
from test_pairs import sums
from test_standalone import losses

from raynium.checkpoint.catalog import choose_checkpoint, latest
from raynium.checkpoint.compare import compare
from raynium.convert.peft_folder import export_adapter
from raynium.storage.store import Store

STEPS = 6


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file of a DPO run; its runs and data lie beside it."""
    folder = tmp_path_factory.mktemp("pairs")
    records = [sums(number) for number in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    values: dict[str, Any] = {
        "task": "dpo",
        "run": {"name": "whole", "root": str(folder / "runs")},
        "cluster": {"accelerator": "cpu"},
        "model": {
            **{"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2},
            **{"head_dim": 16, "ffn_size": 64, "max_seq_len": 32},
        },
        "data": {"source": str(folder / "pairs.jsonl"), "seq_len": 32},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every_steps": 3, "keep_every_steps": 3},
        "evaluate": {"every_steps": 3, "max_documents": 5},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def whole(job: Path) -> str:
    """The log of an uninterrupted run."""
    return trained(job, ranks=1)


def same_bits(job: Path, one: str, other: str) -> bool:
    found = [latest(Store(job.parent / "runs" / name)) for name in (one, other)]
    assert found[0] is not None and found[1] is not None
    assert found[0].step == found[1].step == STEPS
    return not compare(found[0], found[1]).differences


def references(job: Path) -> dict[Path, int]:
    """The files beside the store, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in (job.parent / "runs/data").rglob("reference/*/*.bin")}


def metrics(log: str, step: int) -> dict[str, float]:
    (line,) = re.findall(rf"step {step}: (train/loss .*)", log)
    return {name: float(value) for name, value in (each.split(" ") for each in line.split(", "))}


def test_dpo_begins_at_its_reference_learns_the_pairs_and_those_held_out(job: Path, whole: str) -> None:
    first, last = metrics(whole, 1), metrics(whole, STEPS)
    assert first["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert last["train/loss"] < 0.6 and last["rewards/margins"] > 0.1
    for evaluated in (last, metrics(whole, 3)):
        assert evaluated["eval/loss"] < 0.693 and evaluated["eval/rewards_margins"] > 0
        margin = evaluated["eval/rewards_chosen"] - evaluated["eval/rewards_rejected"]
        assert evaluated["eval/rewards_margins"] == pytest.approx(margin, abs=1e-5)
    assert "eval/bits_per_byte" not in last
    assert len(references(job)) == 2, "of the pairs trained on, and of those held out"


def test_a_run_that_goes_on_changes_no_bit_and_reads_its_reference(job: Path, whole: str) -> None:
    before = references(job)
    trained(job, "run.name=halves", "train.steps=3", ranks=1)
    trained(job, "run.name=halves", ranks=1)
    assert same_bits(job, "whole", "halves")
    assert references(job) == before, "another run on the same weights and pairs computes nothing"


def test_a_run_that_goes_on_without_its_reference_computes_it_of_the_first_weights(job: Path, whole: str) -> None:
    trained(job, "run.name=bereft", "train.steps=3", ranks=1)
    before = references(job)
    contents = {path: path.read_bytes() for path in before}
    for path in before:
        path.unlink()
    trained(job, "run.name=bereft", ranks=1)
    assert {path: path.read_bytes() for path in references(job)} == contents
    assert same_bits(job, "whole", "bereft")


def test_two_ranks_learn_the_same_from_the_same_pairs(job: Path, whole: str) -> None:
    for path in references(job):
        path.unlink()
    log = trained(job, "run.name=two", "cluster.ranks_per_node=2", "train.micro_batch_size=2", ranks=2)
    assert losses(log) == pytest.approx(losses(whole), rel=1e-5)
    expected, found = metrics(whole, STEPS), metrics(log, STEPS)
    names = [name for name in expected if name.startswith(("eval/", "rewards/"))]
    assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-4)
    assert len(references(job)) == 2


def test_a_tensor_group_learns_the_same(job: Path, whole: str) -> None:
    for path in references(job):
        path.unlink()
    log = trained(job, "run.name=tensor", "cluster.ranks_per_node=2", "parallel.tensor=2", ranks=2)
    assert losses(log) == pytest.approx(losses(whole), rel=1e-5)


def test_orpo_learns_without_a_reference_and_goes_on_to_the_bit(job: Path, whole: str) -> None:
    before = references(job)
    log = trained(job, "task=orpo", "run.name=odds", ranks=1)
    first, last = metrics(log, 1), metrics(log, STEPS)
    assert last["train/loss"] < first["train/loss"] and last["eval/loss"] < first["train/loss"]
    assert {"rewards/accuracies", "rewards/margins"} <= set(last)
    trained(job, "task=orpo", "run.name=odds-halves", "train.steps=3", ranks=1)
    trained(job, "task=orpo", "run.name=odds-halves", ranks=1)
    assert same_bits(job, "odds", "odds-halves")
    assert references(job) == before
    two = trained(job, "task=orpo", "run.name=odds-two", "cluster.ranks_per_node=2", "train.micro_batch_size=2")
    assert losses(two) == pytest.approx(losses(log), rel=1e-5)
    assert metrics(two, STEPS)["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)


def test_another_runs_weights_have_a_reference_of_their_own(job: Path, whole: str) -> None:
    before = references(job)
    log = trained(job, "run.name=next", f"model.init={job.parent}/runs/whole", ranks=1)
    assert metrics(log, 1)["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert len(references(job).keys() - before.keys()) == 2


def test_an_adapters_reference_is_the_base_it_begins_as(job: Path, whole: str) -> None:
    """B is 0 at first: it has the reference of its base, so the pass of another run on that base serves it."""
    base = f"model.init={job.parent}/runs/whole"
    trained(job, "run.name=all-learns", "train.steps=1", base, ranks=1)
    before = references(job)
    tuned = (base, "adapter.rank=4", "adapter.dropout=0.1", "optimizer.learning_rate=0.01")
    log = trained(job, "run.name=tuned", *tuned, ranks=1)
    assert references(job) == before
    first, last = metrics(log, 1), metrics(log, STEPS)
    assert first["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert last["train/loss"] < 0.69 and last["rewards/margins"] > 0 and last["eval/rewards_margins"] > 0

    # One that goes on without it computes it of the base again, and not of what the adapter has learned.
    trained(job, "run.name=tuned-halves", "train.steps=3", *tuned, ranks=1)
    contents = {path: path.read_bytes() for path in before}
    for path in before:
        path.unlink()
    trained(job, "run.name=tuned-halves", *tuned, ranks=1)
    found = references(job)
    assert {path: path.read_bytes() for path in found} == {path: contents[path] for path in found}
    assert len(found) == 2 and same_bits(job, "tuned", "tuned-halves")


def test_an_adapter_that_was_begun_with_has_a_reference_of_its_own(job: Path, whole: str) -> None:
    tuned = (f"model.init={job.parent}/runs/whole", "adapter.rank=4", "optimizer.learning_rate=0.01")
    trained(job, "run.name=first-adapter", "train.steps=3", *tuned, ranks=1)
    export_adapter(choose_checkpoint(Store(job.parent / "runs/first-adapter")), job.parent / "adapter")
    before = references(job)
    log = trained(
        job, "run.name=second-adapter", "train.steps=1", *tuned, f"adapter.init={job.parent}/adapter", ranks=1
    )
    assert metrics(log, 1)["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert len(references(job).keys() - before.keys()) == 2
