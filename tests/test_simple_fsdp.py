"""SimpleFSDP: the bits, layout and checkpoints of FSDP2, with the collectives inside the compiled graphs."""

import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _engine_ranks
import pytest
import torch
import torch.distributed as dist
from functorch.compile import default_partition, make_boxed_func, min_cut_rematerialization_partition
from test_models import count_drawn
from test_native_engine import LLAMA3, PLENTY, QWEN3, ROWS, WORKER, Run, config, run, samples
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Interpreter, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.engines.native import NativeEngine, build_native_engine
from raynium.launch.settle import settled
from raynium.tasks.pretraining import Pretraining

# torch.compile looks at the .grad of every graph input, and hides the warning only from those who show all of them.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
STEPS = 5  # and an evaluation after the last
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
REDUCE_SCATTER = torch.ops._c10d_functional.reduce_scatter_tensor.default

# ---- Real ranks: against FSDP2 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    """As in test_native_engine.py."""
    with subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        yield it


@pytest.fixture(scope="module")
def train(forker: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """(fsdp, layout) → its run; one that was asked for before is not trained again."""
    done: dict[str, Run] = {}

    def once(fsdp: str, layout: dict[str, Any], **options: Any) -> Run:
        key = f"{fsdp} {layout} {options}"
        if key not in done:
            # FSDP2 runs operator by operator: "aot_eager" calls the same kernels, and nothing needs compiling twice.
            made: dict[str, Any] = {"model": LLAMA3, "compile": "block" if fsdp == "simple" else "none"} | layout
            given: dict[str, Any] = {"memory_bytes": 0, "last_step": STEPS} | options
            done[key] = run(forker, tmp_path_factory.mktemp("run") / "run", config(fsdp=fsdp, **made), **given)
        return done[key]

    return once


def places(found: Run) -> list[list[tuple[Any, ...]]]:
    """Which part of which tensor each rank holds, saves and counts."""
    return [[(name, shape, begin, tensor.shape, saved) for name, shape, begin, tensor, saved in state]
            for state in found.states]  # fmt: skip


def assert_same_bits(one: Run, other: Run) -> None:
    assert one.results == other.results
    assert one.evaluations == other.evaluations != [[]] * len(one.evaluations)
    state = one.whole_state()
    assert [name for name, tensor in other.whole_state().items() if not torch.equal(tensor, state[name])] == []


CHECKPOINTED: dict[str, Any] = {"ranks": 4, "tensor": 2, "activation_checkpointing": "full"}
SAME_BITS: dict[str, dict[str, Any]] = {  # two data ranks: a + b is b + a
    "fsdp 2 in bfloat16": {"ranks": 2, "dtype": "bfloat16"},
    # ffn_size 46: each tensor rank has 23 rows, and of these a data rank 12 or 11
    "fsdp 2 x tp 2, uneven, checkpointed": CHECKPOINTED | {"model": {**LLAMA3, "ffn_size": 46}},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAME_BITS)
def test_two_data_ranks_train_to_the_bits_of_fsdp2(layout: str, train: Callable[..., Run]) -> None:
    ours, theirs = train("simple", SAME_BITS[layout]), train("fsdp2", SAME_BITS[layout])
    assert len({result["loss"] for result in ours.results[0]}) == STEPS, "nothing changed from step to step"
    assert_same_bits(ours, theirs)
    assert places(ours) == places(theirs)


@pytest.mark.slow
def test_where_sums_have_another_order_training_is_fsdp2s_within_rounding(train: Callable[..., Run]) -> None:
    """Three ranks, whose shares are uneven; and FSDP2 adds up a tied table's two gradients before it reduces."""
    layout = {"ranks": 3, "model": QWEN3}
    ours, theirs = train("simple", layout), train("fsdp2", layout)
    assert ours.losses == pytest.approx(theirs.losses, rel=3e-6)
    for mine, other in zip(ours.results[0], theirs.results[0], strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert places(ours) == places(theirs)


@pytest.mark.slow
def test_a_run_goes_from_one_to_the_other_and_back_bitwise(train: Callable[..., Run]) -> None:
    layout = SAME_BITS["fsdp 2 x tp 2, uneven, checkpointed"]
    found = train("fsdp2", layout, last_step=3)
    losses = found.losses
    for step, fsdp in ((4, "simple"), (5, "fsdp2")):
        found = train(fsdp, layout, first_step=step, last_step=step, load_from=found.folder)
        losses += found.losses
    whole = train("simple", layout)
    assert losses == whole.losses
    state = whole.whole_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.whole_state().items())


# ---- One rank of a pretended group: what the graphs hold -------------------------------------------------------------


class RecordingBackend:
    """Runs a compiled graph node by node, as "aot_eager" does, and keeps it with the memory that its gathers made."""

    def __init__(self, partition: Callable[..., Any]):
        self.forwards: list[GraphModule] = []
        self.backwards: list[GraphModule] = []
        self.gathered: list[StorageWeakRef] = []
        self.data_group = ""
        self._partition = partition

    def __call__(self, graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        return aot_autograd(
            fw_compiler=partial(self._compile, self.forwards),
            bw_compiler=partial(self._compile, self.backwards),
            partition_fn=self._partition,
        )(graph, inputs)

    def _compile(self, kept: list[GraphModule], graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kept.append(graph)
        backend = self

        class Watching(Interpreter):
            def run_node(self, n: Node) -> Any:
                result = super().run_node(n)
                if n in backend.of_data_axis(graph, GATHER):
                    backend.gathered.append(StorageWeakRef(result.untyped_storage()))
                return result

        return make_boxed_func(lambda *values: Watching(graph).run(*values))  # one for each call: it keeps its results

    def of_data_axis(self, graph: GraphModule, collective: Any) -> list[Node]:
        return [node for node in graph.graph.nodes if node.target is collective and node.args[-1] == self.data_group]

    def alive(self) -> int:
        """Whole parameters of blocks that take memory now."""
        return sum(not storage.expired() for storage in self.gathered)


@pytest.fixture
def pretended() -> Iterator[Callable[..., tuple[NativeEngine, Batch]]]:
    """Rank 0 of a group whose collectives do nothing, and its first batch: for shapes and graphs, not for values."""

    def build(made: Config, backend: Callable[..., Any], memory_bytes: int = 0) -> tuple[NativeEngine, Batch]:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=World.of(made).size)
        engine = build_native_engine(
            made, World.of(made), _engine_ranks.TestAccelerator(memory_bytes), Pretraining(), compile_backend=backend
        )
        if isinstance(backend, RecordingBackend):
            assert engine._place.mesh is not None
            backend.data_group = engine._place.mesh.get_group("data").group_name
        rows = made.train.global_batch_size // engine.data_size
        return engine, Batch(samples()["tokens"][0, :rows], samples()["labels"][0, :rows])

    yield build
    dist.destroy_process_group()
    torch.compiler.reset()


PARTITIONS = {"default": default_partition, "min-cut": min_cut_rematerialization_partition}
BLOCK_PARAMETERS = 9  # of a Llama 3 block: q, k, v, o, gate, up, down, and two norms
SHAPES: dict[str, dict[str, Any]] = {
    "fsdp 2": {"ranks": 2},
    "fsdp 3 in bfloat16, uneven": {"ranks": 3, "dtype": "bfloat16"},
    "fsdp 2 x tp 2": {"ranks": 4, "tensor": 2},
    "fsdp 2 x tp 2, checkpointed": {"ranks": 4, "tensor": 2, "activation_checkpointing": "full"},
}


@pytest.mark.parametrize(
    ("shape", "partition"),
    [
        ("fsdp 2", "default"),
        ("fsdp 3 in bfloat16, uneven", "default"),
        ("fsdp 3 in bfloat16, uneven", "min-cut"),
        ("fsdp 2 x tp 2", "min-cut"),
        ("fsdp 2 x tp 2, checkpointed", "default"),
    ],
)
def test_one_graph_of_a_block_holds_its_collectives_and_keeps_no_whole_parameter(
    shape: str, partition: str, pretended: Callable[..., tuple[NativeEngine, Batch]]
) -> None:
    backend = RecordingBackend(PARTITIONS[partition])
    made = config(**SHAPES[shape], model={**LLAMA3, "num_layers": 3}, compile="block", fsdp="simple")
    engine, batch = pretended(made, backend)
    logits = engine._model(next(engine._micro_batches(batch))[0].tokens_BT)
    assert len(backend.gathered) == 3 * BLOCK_PARAMETERS, "every parameter of every block was gathered"
    assert backend.alive() == 0, "between forward and backward"
    logits.backward(logits.detach())
    assert len(backend.gathered) == 2 * 3 * BLOCK_PARAMETERS, "and gathered again"
    assert backend.alive() == 0

    ((forward,), (backward,)) = backend.forwards, backend.backwards  # all blocks have the same two graphs
    assert len(backend.of_data_axis(forward, GATHER)) == len(backend.of_data_axis(backward, GATHER)) == BLOCK_PARAMETERS
    reductions = backend.of_data_axis(backward, REDUCE_SCATTER)
    assert len(reductions) == BLOCK_PARAMETERS and not backend.of_data_axis(forward, REDUCE_SCATTER)
    compute_dtype = getattr(torch, made.engine.dtype)
    gathers = backend.of_data_axis(forward, GATHER)
    (output,) = forward.graph.find_nodes(op="output")
    casts = {node.all_input_nodes[0] for node in gathers}
    assert casts.isdisjoint(output.all_input_nodes), "shards in the compute type are not kept either"
    assert {node.meta["val"].dtype for node in gathers} == {compute_dtype}
    assert {node.meta["val"].dtype for node in reductions} == {torch.float32}
    assert {str(node.args[1]) for node in reductions} == {"sum"}


@pytest.mark.parametrize(("checkpointing", "partition"), [("none", "default"), ("full", "min-cut")])
def test_a_model_that_fits_keeps_what_it_gathered(
    checkpointing: str, partition: str, pretended: Callable[..., tuple[NativeEngine, Batch]]
) -> None:
    backend = RecordingBackend(PARTITIONS[partition])
    made = config(ranks=2, model=LLAMA3, compile="block", fsdp="simple", activation_checkpointing=checkpointing)
    engine, batch = pretended(made, backend, PLENTY)
    logits = engine._model(next(engine._micro_batches(batch))[0].tokens_BT)
    assert backend.alive() == len(backend.gathered) == 2 * BLOCK_PARAMETERS
    logits.backward(logits.detach())
    assert len(backend.gathered) == 2 * BLOCK_PARAMETERS, "nothing was gathered twice"
    assert backend.alive() == 0


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # the engine works on its .data only
@pytest.mark.parametrize(("fsdp", "partition"), [("fsdp2", "min-cut"), ("simple", "min-cut"), ("simple", "default")])
def test_a_checkpointed_block_keeps_its_input_and_its_attention(
    fsdp: str, partition: str, pretended: Callable[..., tuple[NativeEngine, Batch]]
) -> None:
    """Tensor parallel: there torch's own way to make attention again fails."""
    backend = RecordingBackend(PARTITIONS[partition])
    made = config(
        ranks=4, tensor=2, model=LLAMA3, compile="block", fsdp=fsdp, activation_checkpointing="full", micro_batches=1
    )
    engine, batch = pretended(made, backend)
    engine.step(batch, step=1, votes=Votes())
    (forward,) = backend.forwards
    (output,) = forward.graph.find_nodes(op="output")
    kept = [
        node for node in output.args[0][1:] if node.op != "placeholder" and isinstance(node.meta["val"], torch.Tensor)
    ]
    head_dim, heads, rows = 16, 4 // 2, ROWS // 2
    assert {tuple(node.meta["val"].shape) for node in kept} == {(rows, heads, 16, head_dim), (rows, heads, 16)}


def test_a_backend_that_cannot_be_told_what_to_keep_is_named_once(
    pretended: Callable[..., tuple[NativeEngine, Batch]], caplog: pytest.LogCaptureFixture
) -> None:
    engine, batch = pretended(config(ranks=2, model=LLAMA3, compile="block", fsdp="simple"), lambda graph, _: graph)
    with caplog.at_level(logging.WARNING):
        engine.evaluate(batch)
        assert not caplog.records, "an evaluation has no backward pass to keep anything for"
        engine.step(batch, step=1, votes=Votes())
        engine.step(batch, step=2, votes=Votes())
    (record,) = caplog.records
    assert "showed no joint graph" in record.message and "set engine.fsdp to fsdp2" in record.message


@pytest.mark.parametrize("fsdp", ["fsdp2", "simple"])
def test_a_rank_draws_no_first_weight_of_another(
    fsdp: str, pretended: Callable[..., tuple[NativeEngine, Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 512,
        "ffn_size": 1024,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
    }
    drawn = count_drawn(monkeypatch)
    engine, _ = pretended(config(ranks=8, tensor=2, model=LLAMA3 | sizes, fsdp=fsdp, compile="block"), "aot_eager")
    matrices = [part for part in engine._parts if len(part.global_shape) == 2]
    of_all_ranks = sum(math.prod(part.global_shape) for part in matrices)
    held = sum(part.local.numel() for part in matrices)
    assert sum(drawn) == held == of_all_ranks // 8, "tiles end where these shards end"


# ---- What `auto` means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "engine", "chosen"),
    [
        ("neuron", {"compile": "block"}, "simple"),
        ("neuron", {"compile": "none"}, "fsdp2"),
        ("cuda", {"compile": "block"}, "fsdp2"),
        ("neuron", {"compile": "block", "fsdp": "fsdp2"}, "fsdp2"),
        ("neuron_xla", {"kind": "nxd"}, "auto"),  # it has no FSDP, and a config that was settled passes the rules
    ],
)
def test_auto_is_settled_by_accelerator_and_compilation(accelerator: str, engine: dict[str, Any], chosen: str) -> None:
    asked = config(**engine)
    asked = asked.model_copy(update={"cluster": asked.cluster.model_copy(update={"accelerator": accelerator})})
    assert settled(asked, cluster_resources=None, saved=None).engine.fsdp == chosen
