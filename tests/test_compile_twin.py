"""Compilations on the twin of TorchNeuron: shared between nodes by their agents, and explained where they surprise."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import job_text
from twin_runs import run_agent

from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.node.compile_cache import FOLDER, entries
from raynium.node.reports import COMPILES_TOLD, Reports
from raynium.run.coordinator import RunCoordinator
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.run.protocol import Order, Status
from raynium.storage.store import Store
from raynium.tracking.tracker import MemoryTracker
from raynium.train.link import Compiled

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
JOB = job_text(
    {
        "cluster.accelerator": "neuron",
        "model.num_kv_heads": 2,
        "engine.compile": "block",
        "checkpoint.every_steps": 4,
        "evaluate.every_steps": 2,
        "evaluate.max_documents": 2,
    }
)


def executables(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.rglob("*.neff")}


def test_a_second_node_starts_with_what_the_first_one_compiled(
    site: dict[str, str], document_folder: Path, tmp_path: Path
) -> None:
    homes = [tmp_path / name for name in ("first-home", "second-home")]
    found = [
        run_agent(parse_config(JOB), tmp_path / "runs" / home.name, document_folder, site | {"HOME": str(home)})
        for home in homes
    ]
    made, came = (executables(home) for home in homes)
    assert made, "nothing was compiled"
    assert came == made, "bytes that no second compilation would make again"
    (key,) = (path.name for path in (tmp_path / "runs" / FOLDER).iterdir())
    assert key.startswith("neuronx-cc-2.28.7631.0+torch-2.13.") and key.endswith("+lnc-2+trainium2")
    assert len(entries(Store(tmp_path / "runs" / FOLDER / key))) == len(made)

    for each in found:
        log = "\n".join(each["log"])
        graphs = [metrics["compile/graphs"] for _, metrics in each["points"] if "compile/graphs" in metrics]
        seconds = [metrics["compile/seconds"] for _, metrics in each["points"] if "compile/seconds" in metrics]
        assert len(set(graphs)) == 1 and graphs[0] > 0 and seconds[0] > 0, (
            "all shapes were seen by the first evaluation"
        )
        assert "step 1, rank 0: " in log and "graph(s) compiled in" in log
        assert "compiled again" not in log


SECOND_SHAPE = """
import os, sys, torch, torch.distributed as dist
from raynium.engines.torch_compiles import TorchCompiles
from raynium.accelerators.neuron import NeuronAccelerator
from raynium.config.load import parse_config
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.config.world import World
from raynium.engines.native import build_native_engine
from raynium.tasks.pretraining import Pretraining
from raynium.train.compiles import WatchedEngine
from raynium.train.link import MemoryLink
accelerator = NeuronAccelerator()
accelerator.set_device(0)
dist.init_process_group("neuron", store=dist.HashStore(), rank=0, world_size=1)
config = parse_config(sys.stdin.read(), {"cluster.ranks_per_node": 1, "train.micro_batch_size": 4, "train.steps": 9})
accelerator.memory_bytes = lambda **place: 2**30
compiles, link = TorchCompiles(), MemoryLink()
native = build_native_engine(
    config, World.of(config), accelerator, Pretraining(), compile_backend=compiles.backend("neuron")
)
engine = WatchedEngine(native, torch_compiles=compiles, device_counts=accelerator.metrics, link=link)
for step, tokens in enumerate((32, 32, 32, 48, 32), start=1):
    ids = torch.ones(4, tokens, dtype=torch.int64)
    engine.step(Batch(ids, ids), step=step, votes=Votes())
for step, graphs, surprises in link.compiles:
    print(step, graphs, *surprises, sep=" | ")
"""


def test_a_second_shape_after_warm_up_is_explained(site: dict[str, str]) -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    core = {"NEURON_RT_VISIBLE_CORES": "0", "NEURON_RT_ROOT_COMM_ID": "127.0.0.1:20000", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", SECOND_SHAPE],
        input=JOB,
        capture_output=True,
        text=True,
        env=os.environ | site | rank | core,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # How many graphs a block is depends on the twin: torch.compile looks into it, being Python.
    first, second = (line.split(" | ") for line in done.stdout.splitlines())
    assert (first[0], len(first)) == ("1", 2), "no surprises"
    assert (second[0], len(second)) == ("4", 2 + int(second[1]))
    assert second[2].startswith("forward (decoder.py:")
    assert "hidden_BTD is float32 [4, 48, 32] that wants a gradient, seen float32 [4, 32, 32]" in second[2]


# ---- The agent's part ------------------------------------------------------------------------------------------------


def test_a_surprise_is_told_once_for_all_ranks_of_a_node_and_never_without_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raynium")
    config = parse_config(JOB, {"cluster.accelerator": "cpu"})
    coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), str(tmp_path / "run"), 0, 1))
    reports = Reports(config, coordinator, peak_flops_per_rank=lambda: None, halted=lambda rank: False)
    reports.begin_generation(Order(World.of(config), (0,), (0,), 1, "g1", "127.0.0.1", 1), range(2), MemoryTracker())

    def compiled(rank: int, step: int, *surprises: str) -> None:
        reports.take(rank, Compiled(step, 2, 4.1, list(surprises)))

    compiled(0, 1)
    compiled(1, 1)
    compiled(1, 12, "forward was compiled again (4.1 s): x")
    compiled(0, 12, "forward was compiled again (4.3 s): x")
    for step in range(13, 13 + 2 * COMPILES_TOLD):
        compiled(0, step, "forward was compiled again (4.3 s): x")
    status: Status = coordinator.run(lambda each: each.status(0)).result()
    coordinator.close()
    told = [event.text for event in status.events]
    assert told[:2] == [
        "step 12, rank 1: forward was compiled again (4.1 s): x",
        "step 13, rank 0: forward was compiled again (4.3 s): x",
    ]
    assert len(told) == COMPILES_TOLD and told[-1].endswith(" (more are in the log only)")
    assert "step 12, rank 0: forward was compiled again (4.3 s): x" in caplog.messages
    first = next(message for message in caplog.messages if "compiled" in message)
    assert first == "step 1, rank 0: 2 graph(s) compiled in 4.1 s", "the other ranks compile the same"
