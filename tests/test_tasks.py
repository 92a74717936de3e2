"""The seam of tasks: those that learn from pairs train on both engines as a plain float64 loop does."""

import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from first_weights import initialise
from pair_task import PAIR_TASKS, in_pairs, plain_rows, plain_sums
from test_native_engine import LLAMA3, QWEN3, ROWS, STEPS, Run, config, run, samples
from test_nxd import LIBRARIES, needs_xla, nxd_config, start_worker

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.engines.native import build_native_engine
from raynium.engines.nxd import build_nxd_engine
from raynium.engines.optim import decays, learning_rate
from raynium.errors import ConfigError
from raynium.models.decoder import Decoder
from raynium.tasks.base import Task, counts_of, loss_of
from raynium.tasks.pretraining import Pretraining
from raynium.train.metrics import Throughput

TAKEN = 5  # steps, and an evaluation after the last
DATA = in_pairs(samples())


class Reference(NamedTuple):
    losses: list[float]
    sums: list[dict[str, float]]
    norms: list[float]
    moments: dict[str, torch.Tensor]  # AdamW's first: the mean of all clipped gradients so far, the newest most
    evaluation: dict[str, float]
    rows: torch.Tensor


@cache
def reference(
    config: Config, task: str, *, change: Callable[[dict[str, torch.Tensor]], None] | None = None
) -> Reference:
    """Whole batches through plain torch in float64. change: something done to the samples before."""
    model = Decoder(config.model)
    initialise(model, seed=config.run.seed, config=config.model)
    model.double()
    groups = [
        {"params": [p for p in model.parameters() if decays(tuple(p.shape))], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if not decays(tuple(p.shape))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    data = dict(DATA)
    if change is not None:
        change(data)
    losses, sums, norms = [], [], []
    for step in range(1, TAKEN + 1):
        found = plain_sums(task, model, {name: column[step - 1] for name, column in data.items()})
        loss = found.pop("loss")
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step=step, total_steps=STEPS)
        optimizer.step()
        losses.append(loss.item())
        sums.append({name: value.item() for name, value in found.items()})
    moments = {f"optimizer/exp_avg/{name}": optimizer.state[each]["exp_avg"] for name, each in model.named_parameters()}
    last = {name: column[TAKEN - 1] for name, column in data.items()}
    evaluation = plain_sums(task, model, last)
    del evaluation["loss"]
    evaluated = {name: value.item() for name, value in evaluation.items()}
    return Reference(losses, sums, norms, moments, evaluated, plain_rows(model, last).detach())


@pytest.fixture(scope="module", params=LIBRARIES)
def forker(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """`_nxd_ranks.py` with one kind of neuronx-distributed, waiting for folders: it runs both engines."""
    with start_worker(request.param, "trn1") as worker:
        yield worker


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank, a pair at a time": {"ranks": 1, "micro_batches": 6},
    "dp 2": {"ranks": 2, "micro_batches": 1},
    "dp 2, micro-batches": {"ranks": 2, "micro_batches": 3},
    "tp 2": {"ranks": 2, "tensor": 2, "micro_batches": 2},
    "tp 2 x dp 2, micro-batches": {"ranks": 4, "tensor": 2, "micro_batches": 3, "model": LLAMA3},
}
PIPELINES: dict[str, dict[str, Any]] = {
    "pp 2": {"ranks": 2, "pipeline": 2, "micro_batches": 3},
    "pp 2 x tp 2": {"ranks": 4, "pipeline": 2, "tensor": 2, "micro_batches": 2, "model": LLAMA3},
    "pp 2 x dp 2": {"ranks": 4, "pipeline": 2, "micro_batches": 3},
}
RUNS = {
    **{f"native, {name}": config(**layout) for name, layout in LAYOUTS.items()},
    "native, simple fsdp": config(ranks=2, micro_batches=3, fsdp="simple", compile="block"),
    **{f"nxd, {name}": nxd_config(**layout) for name, layout in (LAYOUTS | PIPELINES).items()},
}


# ORPO has columns of both shapes and two means in its loss; DPO goes where its reference is computed otherwise.
OF_DPO = [
    *("native, dp 2, micro-batches", "native, tp 2 x dp 2, micro-batches"),
    *("nxd, tp 2 x dp 2, micro-batches", "nxd, pp 2 x tp 2", "nxd, pp 2 x dp 2"),
]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        *(pytest.param("orpo", name, marks=pytest.mark.slow if "simple" in name else ()) for name in RUNS),
        *(("dpo", name) for name in OF_DPO),
    ],
)
def test_a_task_of_rows_in_pairs_trains_as_a_plain_float64_loop_does(
    task: str, name: str, forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    check_against_reference(train(forker, tmp_path, task, name), task, RUNS[name])


@needs_xla
@pytest.mark.parametrize("task", PAIR_TASKS)
@pytest.mark.parametrize("name", ["nxd, tp 2 x dp 2, micro-batches", "nxd, pp 2 x dp 2"])
def test_it_does_so_over_torch_xla_too(task: str, name: str, tmp_path: Path) -> None:
    with start_worker("xla", "trn1") as worker:
        check_against_reference(train(worker, tmp_path, task, name), task, RUNS[name])


def train(forker: subprocess.Popen[str], tmp_path: Path, task: str, name: str) -> Run:
    return run(forker, tmp_path / "run", RUNS[name], task=task, data=DATA, last_step=TAKEN, rows=True)


def check_against_reference(ran: Run, task: str, made: Config) -> None:
    expected = reference(config(model=LLAMA3 if made.model.embeddings == "untied" else QWEN3), task)
    for results, evaluations in zip(ran.results, ran.evaluations, strict=True):
        assert [result["loss"] for result in results] == pytest.approx(expected.losses, rel=3e-6)
        assert [result["grad_norm"] for result in results] == pytest.approx(expected.norms, rel=1e-5)
        for result, sums in zip(results, expected.sums, strict=True):
            assert result["sums"] == pytest.approx(sums, rel=3e-6)
        (evaluation,) = evaluations
        assert evaluation == pytest.approx(expected.evaluation, rel=3e-6)
    for rows in ran.rows:
        torch.testing.assert_close(rows.double(), expected.rows, rtol=3e-6, atol=0)
    state = ran.whole_state()
    for moment, tensor in expected.moments.items():
        assert (state[moment] - tensor).norm() < 1e-5 * tensor.norm(), moment


def no_reference(data: dict[str, torch.Tensor]) -> None:
    data["reference"] = torch.zeros_like(data["reference"])


def all_ones(data: dict[str, torch.Tensor]) -> None:
    data["answer"] = torch.ones_like(data["answer"])


def part_the_pairs(data: dict[str, torch.Tensor]) -> None:
    for name, column in data.items():
        data[name] = torch.cat((column[:, :2], column[:, 2:].roll(1, dims=1)), dim=1)


@pytest.mark.parametrize(
    ("task", "change"),
    [("dpo", no_reference), ("dpo", part_the_pairs), ("orpo", all_ones), ("orpo", part_the_pairs)],
)
def test_an_engine_that_ignored_a_column_or_parted_pairs_would_show(task: str, change: Callable[..., None]) -> None:
    right, wrong = reference(config(), task), reference(config(), task, change=change)
    assert all(abs(a - b) > 1e-4 * a for a, b in zip(right.losses, wrong.losses, strict=True))
    assert all(
        (right.moments[name] - wrong.moments[name]).norm() > 0.01 * right.moments[name].norm() for name in right.moments
    )
    assert len({sums["preferred"] for sums in right.sums}) > 1
    assert {sums["pairs"] for sums in right.sums} == {ROWS / 2 - 1}, "a pair without labels adds nothing"


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_micro_batches_that_would_part_a_pair_are_refused_by_both_engines() -> None:
    made = config(micro_batches=4)
    message = (
        "train.micro_batch_size is 3, and a sample of this task is 2 rows, which one forward pass must hold together: "
        "set 2 or 4"
    )
    with pytest.raises(ConfigError, match=message):
        build_native_engine(made, World.of(made), CpuAccelerator(), PAIR_TASKS["orpo"])
    with pytest.raises(ConfigError, match=message):
        build_nxd_engine(made, World.of(made), PAIR_TASKS["orpo"])


def test_a_batch_that_was_made_for_another_task_is_refused() -> None:
    made, data = config(), DATA
    engine = build_native_engine(made, World.of(made), CpuAccelerator(), PAIR_TASKS["orpo"])
    tokens_BT, labels_BT = data["tokens"][0], data["labels"][0]
    for others in (
        {},
        {"answer": data["answer"][0]},
        {"answer": data["answer"][0].double(), "nats_weight": data["nats_weight"][0]},
        {"answer": data["answer"][0], "nats_weight": data["answer"][0]},
    ):
        with pytest.raises(AssertionError, match="beside tokens and labels, and the task reads"):
            engine.step(Batch(tokens_BT, labels_BT, others), step=1, votes=Votes())


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Pretraining(), *PAIR_TASKS.values()])
def test_a_batch_in_which_nothing_counts_has_loss_0_and_changes_no_weight_by_its_gradient(task: Task) -> None:
    made, data = config(), DATA
    engine = build_native_engine(made, World.of(made), CpuAccelerator(), task)
    others = {column.name: data[column.name][0] for column in task.columns}
    batch = Batch(data["tokens"][0], torch.full_like(data["labels"][0], -100), others)
    result = engine.step(batch, step=1, votes=Votes())
    assert result.loss == result.grad_norm == result.tokens == 0
    assert all(not chunk.tensor.any() for chunk in engine.state() if chunk.name.startswith("optimizer/exp_avg/"))


def test_a_fraction_that_was_counted_is_divided_by_and_not_by_1() -> None:
    assert loss_of(PAIR_TASKS["dpo"], {"objective": 0.5, "pairs": 0.25}) == 2.0


def test_a_step_reports_what_its_task_says() -> None:
    rates = Throughput(
        task=PAIR_TASKS["dpo"],
        world_size=1,
        tokens_per_step=64,
        global_batch_size=2,
        flops_per_token_6n=1,
        flops_per_token_with_attention=1,
        peak_flops_per_rank=None,
    )
    made, data = config(), DATA
    engine = build_native_engine(made, World.of(made), CpuAccelerator(), PAIR_TASKS["dpo"])
    batch = Batch(*(data[name][0] for name in ("tokens", "labels")), {"reference": data["reference"][0]})
    result = engine.step(batch, step=1, votes=Votes())
    metrics = rates.metrics(1, result, step_seconds=1, data_seconds=0)
    assert metrics["train/loss"] == result.loss
    assert metrics["rewards/accuracies"] == result.sums["preferred"] / result.sums["pairs"]
    assert result.tokens == counts_of(PAIR_TASKS["dpo"], batch)["tokens"] == (data["labels"][0] != -100).sum()
