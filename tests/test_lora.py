"""Adapters: what they compute beside PEFT's, what learns and what does not, and every layout the same."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft_twin import first_weights, peft_model, peft_name, with_some_b
from test_native_engine import LLAMA3, PLENTY, QWEN3, STEPS, WORKER, config, run, samples

from raynium.accelerators.cpu import CpuAccelerator
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.base import Votes
from raynium.engines.native import NativeEngine, build_native_engine
from raynium.engines.optim import learning_rate
from raynium.models.lora import AdaptedLinear, Dropout, row_keys
from raynium.tasks.pretraining import Pretraining


def adapted(**changes: Any) -> Config:
    """The engine tests' config with an adapter. changes: of the adapter, or arguments of theirs."""
    fields = {"rank": 4, "alpha": 8.0} | {name: changes.pop(name) for name in list(changes) if name in ADAPTER}
    base = config(**changes).model_dump(mode="json")
    return Config.model_validate(base | {"adapter": fields})


ADAPTER = ("rank", "alpha", "dropout", "rank_stabilised", "targets", "train_also")


def engine_of(it: Config) -> NativeEngine:
    return build_native_engine(it, World.of(it), CpuAccelerator(), Pretraining())


def batch(step: int) -> Batch:
    data = samples()
    return Batch(data["tokens"][step - 1], data["labels"][step - 1], {}, None)


# ---- Beside PEFT -----------------------------------------------------------------------------------------------------

PARITY = {
    "all-linear, qwen3 tied": {"model": QWEN3},
    "all-linear, llama3 untied": {"model": LLAMA3},
    "q and v, scaled by the root of the rank": {"targets": ["q_proj", "v_proj"], "rank_stabilised": True},
}


@pytest.mark.parametrize("case", PARITY)
def test_gradients_and_losses_are_pefts(case: str, peft: Any, transformers_model: Callable[..., Any]) -> None:
    """From a B that is not 0, as it is at first: then the gradients of A would be 0."""
    it = adapted(**PARITY[case])
    engine, weights = engine_of(it), with_some_b(first_weights(it))
    for chunk in engine.state():
        if chunk.name.startswith(MODEL_PREFIX):
            chunk.tensor.copy_(weights[chunk.name.removeprefix(MODEL_PREFIX)])
    model = peft_model(peft, transformers_model, it, weights)
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(matrices, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(1, STEPS + 1):
        given = batch(step)
        logits = model(input_ids=given.tokens_BT).logits
        loss = F.cross_entropy(logits.flatten(0, 1), given.labels_BT.flatten(), ignore_index=IGNORED_LABEL)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            expected = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
            found = gradients(engine, given)
            assert {peft_name(name, it) for name in found} == expected.keys()
            for name, gradient in found.items():
                theirs = expected[peft_name(name, it)]
                assert (gradient - theirs).norm() <= 1e-5 * theirs.norm(), name
        torch.nn.utils.clip_grad_norm_(matrices, it.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it.optimizer, step=step, total_steps=STEPS)
        optimizer.step()
        assert engine.step(given, step=step, votes=Votes()).loss == pytest.approx(loss.item(), rel=1e-4)


def gradients(engine: NativeEngine, given: Batch) -> Mapping[str, torch.Tensor]:
    """Of the mean over counted labels, by our names, as the engine has them before a step."""
    engine._accumulate_gradients(given, step=1, data_rank=0)
    count = (given.labels_BT != IGNORED_LABEL).sum()
    found = {part.name: gradient / count for part, gradient in engine._local_gradients()}
    for part in engine._parts:
        part.parameter.grad = None
    return found


# ---- Layouts ---------------------------------------------------------------------------------------------------------

ALL, SOME = ("all-linear",), ("q_proj", "down_proj")
LAYOUTS = {
    "one rank, bfloat16": ({"dtype": "bfloat16"}, ALL, PLENTY),
    "fsdp 2": ({"ranks": 2}, ALL, PLENTY),
    "fsdp 3, a group per block, untied": ({"ranks": 3, "model": LLAMA3}, SOME, 0),
    "tp 2": ({"ranks": 2, "tensor": 2}, ALL, PLENTY),
    "fsdp 2 x tp 2, a group per block": ({"ranks": 4, "tensor": 2}, SOME, 0),
    "tp 2, compiled, checkpointed, dropout": (
        {"ranks": 2, "tensor": 2, "compile": "block", "activation_checkpointing": "full", "dropout": 0.4}, ALL, PLENTY,
    ),
    "simple fsdp 2 x tp 2": ({"ranks": 4, "tensor": 2, "compile": "block", "fsdp": "simple"}, ALL, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    """As in test_native_engine.py."""
    with subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        yield it


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if "compile" in made else ()) for name, (made, *_) in LAYOUTS.items()],
)
def test_every_layout_learns_what_one_rank_does(layout: str, forker: subprocess.Popen[str], tmp_path: Path) -> None:
    arguments, targets, memory = LAYOUTS[layout]
    it = adapted(targets=targets, **arguments)
    dropout = arguments.get("dropout", 0.0)
    alone = engine_of(adapted(targets=targets, dropout=dropout, model=arguments.get("model", QWEN3)))
    expected = [alone.step(batch(step), step=step, votes=Votes()) for step in range(1, 4)]
    found = run(forker, tmp_path / "run", it, memory_bytes=memory, last_step=3)
    tolerance = 0.02 if "dtype" in arguments else 1e-5
    assert found.losses == pytest.approx([each.loss for each in expected], rel=tolerance)
    norms = [each["grad_norm"] for each in found.results[0]]
    assert norms == pytest.approx([each.grad_norm for each in expected], rel=10 * tolerance)
    whole = found.whole_state()
    assert whole.keys() == {chunk.name for chunk in alone.state()}
    assert all("lora_" in name for name in whole)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_leaves_out_its_share_anew_for_each_row_step_layer_and_place() -> None:
    linear, x = torch.nn.Linear(40, 8, bias=False), torch.ones(3, 50, 40)

    def left_out(*, seed: int = 1, step: int = 1, number: int = 0) -> torch.Tensor:
        dropout = Dropout(0.25, row_keys(seed=seed, step=step, rows=range(3)))
        return AdaptedLinear(linear, rank=2, scale=1.0, dropout=dropout, number=number)._thinned(x) == 0

    first = left_out()
    assert torch.equal(first, left_out())
    for share in (first.float().mean(), *first.float().mean((1, 2)), first[0, :, 3].float().mean()):
        assert share.item() == pytest.approx(0.25, abs=0.13)
    assert first.float().mean().item() == pytest.approx(0.25, abs=0.02)
    for other in (left_out(step=2), left_out(number=1), left_out(seed=2), first.roll(1, 0), first.roll(1, 1)):
        # Of two independent draws 0.25 × 0.75 × 2 differ.
        assert (first != other).float().mean().item() == pytest.approx(0.375, abs=0.02)


def test_dropout_scales_what_is_left_and_evaluation_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    dropout = Dropout(0.5, row_keys(seed=0, step=1, rows=[0]))
    layer = AdaptedLinear(torch.nn.Linear(6, 4, bias=False), rank=2, scale=3.0, dropout=dropout, number=5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter.data, generator=generator)
    x = torch.randn(1, 7, 6, generator=generator)
    product = layer.lora_B @ layer.lora_A
    kept = layer._thinned(x)
    torch.testing.assert_close(layer(x), x @ layer.weight.t() + 3 * (kept / 0.5) @ product.t())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ (layer.weight + 3 * product).t())


@pytest.mark.parametrize("layout", ["fsdp 2", "tp 2"])
def test_dropout_is_the_same_in_every_layout(layout: str, forker: subprocess.Popen[str], tmp_path: Path) -> None:
    arguments, _, memory = LAYOUTS[layout]
    alone, without = engine_of(adapted(dropout=0.4)), engine_of(adapted())
    expected = [alone.step(batch(step), step=step, votes=Votes()).loss for step in range(1, 4)]
    found = run(forker, tmp_path / "run", adapted(dropout=0.4, **arguments), memory_bytes=memory, last_step=3)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert without.step(batch(1), step=1, votes=Votes()).loss == expected[0], "B is 0 at first"
    plain = [without.step(batch(step), step=step, votes=Votes()).loss for step in range(2, 4)]
    assert plain != pytest.approx(expected[1:], rel=1e-5)
