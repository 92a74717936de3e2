"""Steps that nothing is learned from, through the real loop, engine and snapshots: what a resume makes of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_agent import JOB, Played
from test_loop import THROUGHPUT
from tiny import job_text

from raynium.accelerators.cpu import CpuAccelerator
from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.format.manifest import ImageInfo
from raynium.checkpoint.load import read_tensors
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Engine, StepResult, Votes
from raynium.engines.native import build_native_engine
from raynium.rank.snapshots import Snapshots
from raynium.storage.store import Store
from raynium.tasks.base import Scored
from raynium.tasks.pretraining import Pretraining
from raynium.train.guard import Guard, evidence_path
from raynium.train.link import MemoryLink
from raynium.train.loop import Cadence, train
from raynium.train.patience import Patience

STEPS, SAVE_AT = 8, 5


class Spoilt(Pretraining):
    """Pretraining on texts of which one has a token that makes its micro-batch's gradient NaN."""

    TOKEN = 511

    def score(self, log_probs_BT: torch.Tensor, batch: Batch) -> Scored:
        scored = super().score(log_probs_BT, batch)
        # Without a look at it: as a task must.
        poison = (batch.tokens_BT == self.TOKEN).any().float() * math.inf
        return scored._replace(slope_BT=scored.slope_BT + poison.nan_to_num(nan=0.0, posinf=math.nan))


class Batches:
    """Random tokens, a function of the step. The second micro-batch of step `spoilt` holds the token."""

    def __init__(self, spoilt: int | None):
        self._spoilt = spoilt

    def batch(self, step: int) -> Batch:
        ids_BT = torch.randint(0, 511, (4, 33), generator=torch.Generator().manual_seed(step))
        if step == self._spoilt:
            ids_BT[3, 7] = Spoilt.TOKEN
        return Batch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous())

    def names(self, step: int) -> str:
        return f"step {step}"

    def metrics(self, step: int) -> dict[str, float]:
        return {}


class NoEvidence:
    """No run of these ends."""

    def of(self, step: int, batch: Batch, result: StepResult, why: str) -> str:
        raise AssertionError(f"step {step} ended the run: {why}")


@pytest.fixture
def one_rank() -> Any:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Ran:
    """One generation. losses: by step; state: of its end, by name; images: of its saves."""

    def __init__(self, folder: Path, *, spoilt: int | None = None, start: str | None = None, **changes: Any):
        config = config_of(changes)
        folder.mkdir()
        engine: Engine = build_native_engine(config, World.of(config), CpuAccelerator(), Spoilt())
        link, guard = MemoryLink(), Guard.of(config)
        snapshots = Snapshots(engine, link, folder, guard, Patience(), if_busy="wait")
        start_step = snapshots.restore_images([ImageInfo.from_json(start)]) if start is not None else 0
        train(
            engine=engine,
            batches=Batches(spoilt),
            cadence=Cadence(STEPS, checkpoint_every=SAVE_AT, evaluate_every=100),
            start_step=start_step,
            evaluate=dict,
            guard=guard,
            evidence=NoEvidence(),
            patience=Patience(),
            snapshots=snapshots,
            throughput=THROUGHPUT,
            link=link,
        )
        self.losses = {step: metrics["train/loss"] for step, metrics in link.steps.items()}
        self.state = {chunk.name: chunk.tensor.clone() for chunk in engine.state()}
        self.images, self.bad_steps = link.images, link.bad_steps


def config_of(changes: dict[str, Any]) -> Config:
    return parse_config(
        job_text({"cluster.ranks_per_node": 1, "train.micro_batch_size": 2, "train.steps": STEPS, **changes})
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("one_rank")
def test_a_nan_costs_its_step_alone_and_equals_a_run_told_to_leave_that_step_out(tmp_path: Path) -> None:
    spoilt = Ran(tmp_path / "spoilt", spoilt=3)
    told = Ran(tmp_path / "told", **{"data.leave_out_steps": [3]})
    clean = Ran(tmp_path / "clean")
    assert [step for step, _ in spoilt.bad_steps] == [step for step, _ in told.bad_steps] == [3]
    assert sorted(spoilt.losses) == list(range(1, STEPS + 1))
    assert {**spoilt.losses, 3: 0.0} == {**told.losses, 3: 0.0}
    assert same(spoilt.state, told.state) and not same(spoilt.state, clean.state)


@pytest.mark.usefixtures("one_rank")
def test_what_was_left_out_before_a_snapshot_is_known_to_the_generation_that_starts_from_it(tmp_path: Path) -> None:
    """AdamW's bias correction counts updates, of which there were fewer than steps."""
    whole = Ran(tmp_path / "whole", spoilt=3)
    resumed = Ran(tmp_path / "resumed", spoilt=3, start=whole.images[0])
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > SAVE_AT}
    assert same(resumed.state, whole.state) and resumed.bad_steps == []


@pytest.mark.usefixtures("one_rank")
def test_the_norms_of_the_layers_are_those_of_the_step_and_leave_the_engine_as_it_was() -> None:
    config = config_of({})
    engine: Engine = build_native_engine(config, World.of(config), CpuAccelerator(), Spoilt())
    batch, votes = Batches(None).batch(1), Votes(leave_out=True)
    before = {chunk.name: chunk.tensor.clone() for chunk in engine.state()}
    first = engine.step(batch, step=1, votes=votes)
    norms = engine.layer_norms(batch, step=1)
    assert list(norms) == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]
    assert math.hypot(*norms.values()) == pytest.approx(first.grad_norm, rel=1e-5)
    again = engine.step(batch, step=1, votes=votes)
    assert (again.loss, again.grad_norm) == (first.loss, first.grad_norm)
    assert same(before, {chunk.name: chunk.tensor for chunk in engine.state()})
    spoilt = engine.layer_norms(Batches(1).batch(1), step=1)
    assert all(math.isnan(norm) for norm in spoilt.values())


def test_a_leap_is_undone_from_memory_and_the_run_equals_one_told_to_leave_that_step_out(
    tmp_path: Path, document_folder: Path
) -> None:
    """Two ranks, an agent and a coordinator: they go back to the snapshot of step 56."""
    common = {"train.steps": 80, "checkpoint.every_steps": 8, "evaluate.every_steps": 80}
    spiking = Played(
        parse_config(JOB, common | {"task": "spiking_task:Spiking"}), tmp_path / "spiking", document_folder
    )
    told = Played(parse_config(JOB, common | {"data.leave_out_steps": [60]}), tmp_path / "told", document_folder)
    for run in (spiking, told):
        run.thread.start()
        assert run.finish().ended == "finished"
    losses, expected = spiking.losses(), told.losses()
    assert {step: set(values) for step, values in losses.items()} == {
        step: set(values) for step, values in expected.items()
    }
    assert [step for step, values in losses.items() if len(values) == 2] == [57, 58, 59]
    weights = [read_tensors(open_checkpoint(Store(run.run_folder), 80), "") for run in (spiking, told)]
    assert weights[0].keys() == weights[1].keys()
    differing = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert [name for name in differing if not name.startswith("guard/")] == []
    assert spiking.tracker.values("train/left_out_steps")[-1] == (80, 1.0)
    assert json.loads(Store(spiking.run_folder).read("undone-steps.json")) == {"undone": [60], "suspected": []}


def test_a_run_that_bad_steps_end_keeps_their_samples_and_the_norms_of_its_layers(
    tmp_path: Path, document_folder: Path
) -> None:
    changes = {"train.steps": 80, "checkpoint.every_steps": 80, "evaluate.every_steps": 80, "fault.max_bad_steps": 0}
    run = Played(parse_config(JOB, changes | {"task": "spiking_task:Spiking"}), tmp_path, document_folder)
    run.thread.start()
    status = run.finish()
    path = evidence_path(60)
    assert status.ended == "failed" and path in str(status.cause) and "TooManyBadSteps" in str(status.cause)
    found = json.loads(run.tracker.artifacts[path])
    assert found["step"] == 60 and found["loss"] > 100 and "robust standard deviations" in found["why"]
    norms = found["layer_gradient_norms"]
    assert list(norms) == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"] and min(norms.values()) > 0
    samples = found["samples"]
    assert [each["sample"] for each in samples] == [236, 237, 238, 239] and {each["store"] for each in samples} == {
        "nowhere"
    }
    assert all(0 < len(each["text"]) <= 2000 for each in samples)
