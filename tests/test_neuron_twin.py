"""The native path on the twin of TorchNeuron: agent, forked ranks, engine, checkpoints; and the rules the twin keeps.

Every process here is a fresh one, since a device can be registered but never taken back.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from neuron_twin import RECORD_VARIABLE
from test_packed_runs import build_short_documents
from tiny import job_text
from twin_runs import run_agent

from raynium.config.load import parse_config

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
JOB = job_text(
    {
        "cluster.accelerator": "neuron",
        "cluster.ranks_per_node": None,
        "model.num_kv_heads": 2,
        "optimizer.learning_rate": 3e-3,
        "optimizer.schedule": "constant",
        "train.steps": 6,
        "checkpoint.every_steps": 3,
        "checkpoint.keep_last": 2,
        "evaluate.every_steps": 3,
        "evaluate.max_documents": 2,
    }
)


def play(run_folder: Path, document_folder: Path, environment: dict[str, str], **changes: Any) -> dict[str, Any]:
    return run_agent(parse_config(JOB, changes), run_folder, document_folder, environment)


def values(found: dict[str, Any], name: str) -> list[float]:
    return [metrics[name] for _, metrics in found["points"] if name in metrics]


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory, document_folder: Path) -> dict[str, Any]:
    return play(tmp_path_factory.mktemp("cpu") / "run", document_folder, {}, **{"cluster.accelerator": "cpu"})


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_short_documents(tmp_path_factory.mktemp("short"))


PACKED = {"data.packing": "documents"}


@pytest.fixture(scope="module")
def packed_on_the_cpu(tmp_path_factory: pytest.TempPathFactory, short_documents: Path) -> dict[str, Any]:
    on_cpu = {"cluster.accelerator": "cpu"}
    return play(tmp_path_factory.mktemp("packed-cpu") / "run", short_documents, {}, **on_cpu | PACKED)


ADAPTER = {"adapter.rank": 4, "adapter.dropout": 0.2, "optimizer.learning_rate": 0.03}


@pytest.fixture(scope="module")
def adapter_on_the_cpu(tmp_path_factory: pytest.TempPathFactory, document_folder: Path) -> dict[str, Any]:
    on_cpu = {"cluster.accelerator": "cpu"}
    return play(tmp_path_factory.mktemp("adapter-cpu") / "run", document_folder, {}, **on_cpu | ADAPTER)


LAYOUTS = {
    "one rank": {},
    "fsdp 2": {"cluster.ranks_per_node": 2},
    "tp 2": {"cluster.ranks_per_node": 2, "parallel.tensor": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_unchanged_path_learns_what_the_cpu_learns(
    layout: str, site: dict[str, str], on_the_cpu: dict[str, Any], document_folder: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    twin = play(tmp_path / "run", document_folder, site | {RECORD_VARIABLE: str(records)}, **LAYOUTS[layout])
    for name in ("train/loss", "eval/loss", "eval/bits_per_byte"):
        assert values(twin, name) == pytest.approx(values(on_the_cpu, name), rel=1e-6), name
    assert values(twin, "train/grad_norm") == pytest.approx(values(on_the_cpu, "train/grad_norm"), rel=1e-4)
    assert values(twin, "device/fallback_operators") == [0, 0], "float64 or a missing operation in the step"
    environments = [json.loads(path.read_text()) for path in sorted(records.iterdir())]
    assert [each["NEURON_RT_VISIBLE_CORES"] for each in environments] == [
        str(rank) for rank in range(len(environments))
    ]
    assert len(environments) == LAYOUTS[layout].get("cluster.ranks_per_node", 1)


@pytest.mark.parametrize("layout", [*LAYOUTS, "tp 2, compiled blocks"])
def test_rows_of_several_documents_learn_what_they_do_on_the_cpu(
    layout: str, site: dict[str, str], packed_on_the_cpu: dict[str, Any], short_documents: Path, tmp_path: Path
) -> None:
    compiled = {"cluster.ranks_per_node": 2, "parallel.tensor": 2, "engine.compile": "block"}
    twin = play(tmp_path / "twin", short_documents, site, **LAYOUTS.get(layout, compiled) | PACKED)
    for name in ("train/loss", "eval/loss"):
        assert values(twin, name) == pytest.approx(values(packed_on_the_cpu, name), rel=1e-5), name
    assert values(twin, "device/fallback_operators") == [0, 0], "an operation that Neuron lacks"


@pytest.mark.parametrize("tensor", [1, 2])
def test_compiled_blocks_hold_their_collectives_and_stop_compiling_after_the_first_steps(
    tensor: int, site: dict[str, str], on_the_cpu: dict[str, Any], document_folder: Path, tmp_path: Path
) -> None:
    """engine.fsdp is auto: SimpleFSDP here. Tensor 2 leaves one data rank, and gathers of its own."""
    records = tmp_path / "records"
    records.mkdir()
    options = {"engine.compile": "block", "engine.activation_checkpointing": "full", "parallel.tensor": tensor}
    environment = site | {RECORD_VARIABLE: str(records)}
    twin = play(tmp_path / "run", document_folder, environment, **{"cluster.ranks_per_node": 2} | options)
    assert values(twin, "train/loss") == pytest.approx(values(on_the_cpu, "train/loss"), rel=1e-5)
    first, last = values(twin, "compile/graphs")
    assert first == last > 0, "every shape had been seen at the first evaluation"
    graphs = [path.read_text() for path in records.glob("graph-0-*.txt")]
    assert len(graphs) == last
    operation = "torch.ops._c10d_functional.{}.default("
    gathers, reductions = (
        [graph.count(operation.format(name)) for graph in graphs]
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor")
    )
    if tensor == 1:  # one a parameter; a model as small keeps what it gathered
        assert set(zip(gathers, reductions, strict=True)) == {(9, 0), (0, 9)}


@pytest.mark.parametrize("layout", ["fsdp 2", "tp 2"])
def test_adapters_learn_what_they_do_on_the_cpu_and_stop_compiling_after_the_first_steps(
    layout: str, site: dict[str, str], adapter_on_the_cpu: dict[str, Any], document_folder: Path, tmp_path: Path
) -> None:
    """The first block has a graph of its own: nothing before it learns, so its input needs no gradient."""
    compiled = {"engine.compile": "block", "engine.activation_checkpointing": "full"}
    twin = play(tmp_path / "twin", document_folder, site, **LAYOUTS[layout] | compiled | ADAPTER)
    for name in ("train/loss", "eval/loss"):
        assert values(twin, name) == pytest.approx(values(adapter_on_the_cpu, name), rel=1e-5), name
    assert values(twin, "device/fallback_operators") == [0, 0], "an operation that Neuron lacks"
    first, last = values(twin, "compile/graphs")
    assert first == last > 0, "every shape had been seen at the first evaluation"


def test_a_checkpoint_of_the_twin_goes_on_on_the_cpu(
    site: dict[str, str], on_the_cpu: dict[str, Any], document_folder: Path, tmp_path: Path
) -> None:
    play(tmp_path / "run", document_folder, site, **{"train.steps": 3})
    rest = play(tmp_path / "run", document_folder, {}, **{"cluster.accelerator": "cpu"})
    assert [step for step, metrics in rest["points"] if "train/loss" in metrics] == [4, 5, 6]
    assert values(rest, "train/loss") == pytest.approx(values(on_the_cpu, "train/loss")[3:], rel=1e-6)


# ---- The rules it keeps ----------------------------------------------------------------------------------------------

RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
CORE = {"NEURON_RT_VISIBLE_CORES": "0", "NEURON_RT_ROOT_COMM_ID": "127.0.0.1:20000", "GLOO_SOCKET_IFNAME": "lo"}
IMPORTS = """
import torch, torch.distributed as dist
import torch_neuronx, torch_neuronx.distributed
def group():
    dist.init_process_group("neuron", store=dist.HashStore(), rank=0, world_size=1)
"""


def script(site: dict[str, str], code: str, environment: dict[str, str]) -> str:
    """The last line that `code` says, on stdout or as its exception."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + code], capture_output=True, text=True, env=os.environ | site | environment
    )
    return (done.stdout + done.stderr).rstrip().splitlines()[-1].removeprefix("[rank0]: ")


def test_a_rank_that_uses_the_device_before_its_process_group_fails(site: dict[str, str]) -> None:
    said = script(site, 'torch.zeros(1, device="neuron")', RANK | CORE)
    assert said.startswith("RuntimeError: the Neuron device was used before init_process_group")
    said = script(site, 'group(); print(torch.ones(2, device="neuron").sum().item())', RANK | CORE)
    assert said == "2.0"


def test_a_process_group_after_a_use_of_the_device_fails(site: dict[str, str]) -> None:
    said = script(site, 'torch.zeros(1, device="neuron"); group()', CORE)
    assert said == ("AssertionError: Neuron runtime should not be initialized before the init_process_group.")


def test_a_process_owns_one_core(site: dict[str, str]) -> None:
    said = script(site, "group()", RANK | CORE | {"NEURON_RT_VISIBLE_CORES": "0-3"})
    assert said.startswith("AssertionError: Attempted to have more than one device per process")


def test_the_device_has_no_number(site: dict[str, str]) -> None:
    for call in ('torch.zeros(1, device="neuron:0")', 'torch.nn.Linear(1, 1).to("neuron:0")'):
        said = script(site, f"group(); {call}", RANK | CORE)
        assert said.startswith("RuntimeError: invalid Neuron device 'neuron:0'")
    said = script(
        site,
        "from raynium.accelerators.neuron import NeuronAccelerator; print(NeuronAccelerator().set_device(1))",
        RANK | CORE | {"LOCAL_RANK": "1"},
    )
    assert said == "neuron"


def test_what_runs_on_the_cpu_is_counted(site: dict[str, str]) -> None:
    code = """
group()
torch.ones(2, device="neuron").add(1)
first = torch_neuronx.get_fallback_ops()
torch.ones(2, device="neuron", dtype=torch.float64).add(1)
torch.empty(2, device="neuron").normal_()
print(first, sorted(set(torch_neuronx.get_fallback_ops()) - {"aten::empty", "aten::fill_"}))
"""
    assert script(site, code, RANK | CORE) == "[] ['aten::add', 'aten::normal_']"


def test_every_shape_is_a_graph_of_its_own_and_none_is_dynamic(site: dict[str, str]) -> None:
    code = """
group()
double = torch.compile(lambda x: x * 2, backend="neuron", dynamic=False)
for size in (4, 4, 5, 5, 4):
    double(torch.ones(size, device="neuron"))
print([graph.input_shapes for graph in torch_neuronx.get_dynamo_metrics()])
"""
    assert script(site, code, RANK | CORE) == "[((4,),), ((5,),)]"
    code = 'group(); torch.compile(lambda x: x * 2, backend="neuron", dynamic=True)(torch.ones(4, device="neuron"))'
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + code], capture_output=True, text=True, env=os.environ | site | RANK | CORE
    )
    assert "Dynamic shape is not supported" in done.stderr
