"""What a step compiled, and why it had to: with torch's own compiler in front of a real model on the CPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny import job_text
from torch import nn

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import FakeEngine, Votes
from raynium.engines.native import build_native_engine
from raynium.engines.torch_compiles import GraphInput, TorchCompiles, difference
from raynium.tasks.pretraining import Pretraining
from raynium.train.compiles import WARM_UP_CALLS, WatchedEngine
from raynium.train.link import MemoryLink

JOB = job_text(
    {
        "cluster.ranks_per_node": 1,
        "data.seq_len": 16,
        "engine.compile": "block",
        "train.steps": 20,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 2,
    }
)


@pytest.fixture
def compiles() -> Iterator[TorchCompiles]:
    torch._dynamo.reset()
    watched = TorchCompiles()
    yield watched
    watched.close()
    torch._dynamo.reset()


def batch(rows: int = 2, tokens: int = 16) -> Batch:
    return Batch(torch.ones(rows, tokens, dtype=torch.int64), torch.ones(rows, tokens, dtype=torch.int64))


def no_counts() -> dict[str, float]:
    return {}


def steps(engine: WatchedEngine, *tokens: int, first: int = 1) -> None:
    for step, count in enumerate(tokens, start=first):
        engine.step(batch(tokens=count), step=step, votes=Votes())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own look at it, which it means to hide
def test_a_second_shape_is_explained_and_equal_shapes_compile_nothing(compiles: TorchCompiles) -> None:
    link = MemoryLink()
    native = build_native_engine(
        parse_config(JOB),
        World.of(parse_config(JOB)),
        CpuAccelerator(),
        Pretraining(),
        compile_backend=compiles.backend("aot_eager"),
    )
    engine = WatchedEngine(native, torch_compiles=compiles, device_counts=no_counts, link=link)
    link.phase("step", 1)
    steps(engine, 16)
    assert link.phases[:3] == [("step", 1), ("compile", 1), ("step", 1)], "it waits in a collective from then on"
    assert link.phases[-1] == ("step", 1)
    steps(engine, 16, first=2)
    link.phase("evaluate", 2)
    engine.evaluate(batch())
    engine.evaluate(batch())
    assert link.phases[-2:] == [("compile", 2), ("evaluate", 2)]
    (first, graphs, surprises), (evaluated, _, none) = link.compiles
    assert (first, graphs, surprises) == (1, 2, []), "one graph for both blocks, forward and backward"
    assert (evaluated, none) == (2, []), "the first evaluation may compile: it keeps nothing for a backward"

    steps(engine, 16, 16, first=3)
    engine.evaluate(batch())
    assert len(link.compiles) == 2

    steps(engine, 24, 24, first=5)
    step, graphs, surprises = link.compiles[2]
    assert (step, graphs, len(link.compiles)) == (5, 2, 3)
    forward, backward = surprises
    assert forward.startswith("forward (decoder.py:")
    assert " was compiled again (" in forward
    assert "hidden_BTD is float32 [2, 24, 32] that wants a gradient, seen float32 [2, 16, 32]" in forward
    assert backward.startswith("backward of forward (decoder.py:") and "hidden_BTD is float32" in backward

    engine.evaluate(batch(tokens=24))
    step, _, (surprise,) = link.compiles[3]
    assert step == 6 and "hidden_BTD is float32 [2, 24, 32], seen float32 [2, 16, 32]" in surprise

    metrics = engine.compile_metrics()
    assert metrics["compile/graphs"] == sum(graphs for _, graphs, _ in link.compiles)
    assert metrics["compile/seconds"] > 0
    engine.close()


class Scale(nn.Module):
    def forward(self, hidden: torch.Tensor, power: int) -> torch.Tensor:
        return hidden**power


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((torch.ones(4), 2), (torch.ones(4, dtype=torch.float64), 2), "hidden is float64 [4], seen float32 [4]"),
        (
            (torch.ones(4, 3), 2),
            (torch.ones(3, 4).t(), 2),
            "hidden is float32 [4, 3] with strides [1, 4], seen float32 [4, 3]",
        ),
        ((torch.ones(4), 2), (torch.ones(4), 3), "its inputs are like those seen, but power == 2"),
    ],
    ids=["dtype", "layout", "guard"],
)
def test_whatever_differs_is_named(compiles: TorchCompiles, first: Any, second: Any, words: str) -> None:
    scale = torch.compile(Scale(), backend=compiles.backend("aot_eager"), dynamic=False)
    scale(*first)
    assert [each.why for each in compiles.new()] == [""]
    scale(*first)
    assert compiles.new() == []
    scale(*second)
    (again,) = compiles.new()
    assert again.why.startswith(words)


def test_the_nearest_graph_is_compared_and_not_the_newest(compiles: TorchCompiles) -> None:
    scale = torch.compile(Scale(), backend=compiles.backend("aot_eager"), dynamic=False)
    scale(torch.ones(4, 4), 2)
    scale(torch.ones(4, dtype=torch.float64), 2)
    scale(torch.ones(4, 4, requires_grad=True), 2)
    *_, last = compiles.new()
    assert last.why == "hidden is float32 [4, 4] that wants a gradient, seen float32 [4, 4]"


def test_a_function_that_torch_gives_up_on_is_said(compiles: TorchCompiles) -> None:
    scale = torch.compile(Scale(), backend=compiles.backend("aot_eager"), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        scale(torch.ones(4), 2)
        scale(torch.ones(5), 2)
    first, second = compiles.new()
    assert (first.given_up, second.given_up, second.name) == (False, True, first.name)
    assert "size mismatch at index 0. expected 4, actual 5" in second.why


def test_a_change_of_many_inputs_is_cut_short() -> None:
    def inputs(kind: str) -> list[GraphInput]:
        return [GraphInput(f"input{number}", kind) for number in range(10)]

    said = difference(inputs("float32 [2]"), [inputs("bfloat16 [2]")])
    assert said.startswith("input0 is float32 [2], seen bfloat16 [2]; ") and said.endswith("; and 7 more inputs")
    assert difference(inputs("float32 [2]"), []) == ""
    assert difference([GraphInput("mask", "bool [2]")], [inputs("float32 [2]")]) == "mask is new"


# ---- What the device's library compiles by itself, as torch-xla does -------------------------------------------------


class Device:
    """Counts as torch-xla does: a graph for each shape of a batch, and for each number that `branch` holds."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.branch = 0
        self._seen: set[Any] = set()
        step = self.engine.step

        def counted(batch: Batch, **options: Any) -> Any:
            self._seen.add((batch.tokens_BT.shape, self.branch))
            return step(batch, **options)

        self.engine.step = counted  # pyright: ignore[reportAttributeAccessIssue]

    def copies(self, graphs: int) -> None:
        """What a save or a load has to compile."""
        self._seen |= {f"copy {len(self._seen) + each}" for each in range(graphs)}

    def counts(self) -> dict[str, float]:
        return {"compile/graphs": 5.0 + len(self._seen), "compile/seconds": 100.0 + 2.5 * len(self._seen)}


def test_what_the_device_compiles_is_explained_by_the_batch(compiles: TorchCompiles) -> None:
    device, link = Device(), MemoryLink()
    engine = WatchedEngine(device.engine, torch_compiles=compiles, device_counts=device.counts, link=link)
    steps(engine, *[16] * WARM_UP_CALLS)
    assert link.compiles == [(1, 1, [])]
    assert engine.compile_metrics() == {"compile/graphs": 1, "compile/seconds": 2.5}, "the start's are not ours"
    steps(engine, 16, 24, first=3)
    assert link.compiles[1:] == [
        (
            4,
            1,
            [
                "the device's graph was compiled again (2.5 s): tokens is int64 [2, 24], seen int64 [2, 16]; "
                "labels is int64 [2, 24], seen int64 [2, 16]"
            ],
        )
    ]
    device.branch = 1
    steps(engine, 24, first=5)
    ((_, _, (why,)),) = link.compiles[2:]
    assert "the batch is like those seen, so a Python number or a branch in the step changed" in why


def test_what_a_save_compiles_is_not_said_of_the_next_step(compiles: TorchCompiles) -> None:
    """torch-xla compiles the copies of the state that a save makes, between two calls."""
    device, link = Device(), MemoryLink()
    engine = WatchedEngine(device.engine, torch_compiles=compiles, device_counts=device.counts, link=link)
    steps(engine, *[16] * 4)
    device.copies(3)
    steps(engine, 16, first=5)
    assert link.compiles[1:] == [(4, 3, [])]
    assert engine.compile_metrics()["compile/graphs"] == 4
    for step in (6, 7):
        device.copies(1)
        steps(engine, 16, first=step)
    (first, _, none), (second, _, (surprise,)) = link.compiles[2:]
    assert (first, none, second) == (5, [], 6)
    assert surprise.startswith("a copy of the state was compiled again (2.5 s): ")


TORCH_XLA = """
import torch, torch_xla
from raynium.engines.torch_compiles import TorchCompiles
from raynium.accelerators.neuron_xla import NeuronXlaAccelerator
from raynium.data.batch import Batch
from raynium.engines.base import FakeEngine, Votes
from raynium.train.compiles import WatchedEngine
from raynium.train.link import MemoryLink

class Engine(FakeEngine):
    power = 2
    def step(self, batch, *, step, votes):
        (batch.tokens_BT.to(torch_xla.device()).float() ** self.power).sum().item()
        return super().step(batch, step=step, votes=votes)

fake, link = Engine(), MemoryLink()
counts = NeuronXlaAccelerator().metrics
engine = WatchedEngine(fake, torch_compiles=TorchCompiles(), device_counts=counts, link=link)
for step, (tokens, power) in enumerate([(16, 2), (16, 2), (16, 2), (24, 2), (24, 2), (24, 3)], start=1):
    fake.power = power
    ids = torch.ones(2, tokens, dtype=torch.int64)
    engine.step(Batch(ids, ids), step=step, votes=Votes())
for each in link.compiles:
    print(*each)
print(engine.compile_metrics()["compile/seconds"] > 0)
"""


def test_torch_xlas_own_counters() -> None:
    """Where torch-xla installs (torch 2.9), on its CPU device."""
    pytest.importorskip("torch_xla", reason="needs torch-xla, of torch 2.9")
    done = subprocess.run(
        [sys.executable, "-c", TORCH_XLA], capture_output=True, text=True, env=os.environ | {"PJRT_DEVICE": "CPU"}
    )
    assert done.returncode == 0, done.stderr
    first, shape, number, timed = done.stdout.splitlines()
    assert first.startswith("1 ") and first.endswith(" []")
    assert shape.startswith("4 ") and "tokens is int64 [2, 24], seen int64 [2, 16]" in shape
    assert number.startswith("6 ") and "a Python number or a branch in the step changed" in number
    assert timed == "True"
