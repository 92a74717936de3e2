"""Our training loop beside the shortest PyTorch loop and those of libraries: python tests/benchmarks/bench_loop.py

All train the same model on the same samples with the same optimizer, each in processes of its own, and take turns of a
few steps, so that what else the machine does falls on all; ratios are taken turn by turn, and the median is shown. Ours
is what a rank runs: loader, native engine, guard, metrics, link. Bare loops have their tensors at hand (peer_loops.py):
on two ranks with FSDP2 (`fully_shard` per block and on the whole, as its documentation shows) and with
DistributedDataParallel, which keeps the whole optimizer on each rank. The libraries use DistributedDataParallel on two
ranks. Passes if ours has 0.97 of the tokens per second or more of plain PyTorch on one rank and of FSDP2 on two; the
other ratios are reported.
"""

import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from benchmark import heading, parser, verdict
from peer_loops import LIBRARIES, StepDone, Task, bare, installed

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_documents

from raynium.accelerators.detect import detect
from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.data.build.store_build import build_store
from raynium.data.loader import Loader, open_loader
from raynium.data.store import open_store
from raynium.engines.base import StepResult
from raynium.engines.native import build_native_engine
from raynium.models.flops import parameter_count
from raynium.rank.ports import free_port
from raynium.tasks.pretraining import Pretraining
from raynium.train.guard import Guard
from raynium.train.link import MemoryLink
from raynium.train.loop import Cadence, train
from raynium.train.metrics import Throughput
from raynium.train.patience import Patience

LEAST_RATIO = 0.97
REQUIRED = {(1, "plain"), (2, "FSDP2")}
BARE = {1: ("plain",), 2: ("FSDP2", "DDP")}
TINY = {
    **{"model.vocab_size": 512, "model.hidden_size": 32, "model.num_layers": 1, "model.ffn_size": 64},
    **{
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 16,
        "model.max_seq_len": 32,
        "data.seq_len": 16,
    },
}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=12)
    options.add_argument("--steps", type=int, default=6, help="of a turn")
    arguments = options.parse_args()
    turns, steps, changes = (1, 2, TINY) if arguments.tiny else (arguments.turns, arguments.steps, {})
    heading()
    smallest = 10.0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            build_documents(Path(folder))
        else:
            build_store(Path(folder, "data"), source="python-stdlib", vocab_size=2048)
        libraries = installed()
        print("| ranks | loop | tokens/s | ours, times as fast |")
        print("|---|---|---|---|")
        for world_size in (1, 2):
            places = {"data.path": f"{folder}/data", "cluster.ranks_per_node": world_size, "engine.dtype": "float32"}
            config = load_config("quickstart", places | changes)
            seconds = measure(("ours", *BARE[world_size], *libraries), config, world_size, folder, turns, steps)
            for name, taken in seconds.items():
                ratio = statistics.median(theirs / ours for theirs, ours in zip(taken, seconds["ours"], strict=True))
                rate = steps * config.tokens_per_step / statistics.median(taken)
                print(f"| {world_size} | {name} | {rate:,.0f} | {ratio:.3f} |")
                if (world_size, name) in REQUIRED:
                    smallest = min(smallest, ratio)
    size = f"{parameter_count(config.model)[0] / 1e6:.1f} M parameters in float32"
    print(f"\n{size}, {config.train.global_batch_size} × {config.data.seq_len} tokens a step, {turns} turns of {steps}")
    print(f"smallest of plain and FSDP2: {smallest:.3f}, required {LEAST_RATIO}")
    return verdict(smallest >= LEAST_RATIO, arguments.tiny)


def measure(
    names: tuple[str, ...], config: Config, world_size: int, folder: str, turns: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each turn of each loop, but for the first turn, which warms up."""
    spawn = multiprocessing.get_context("spawn")
    ranks: dict[str, list[tuple[Any, Connection]]] = {name: [] for name in names}
    try:
        for name in names:
            port = free_port("127.0.0.1")
            for rank in range(world_size):
                here, there = spawn.Pipe()
                arguments = (name, rank, world_size, config, folder, turns, steps, port, there)
                process = spawn.Process(target=run_rank, args=arguments, daemon=True)
                process.start()
                ranks[name].append((process, here))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(turns + 1):
            for name in names:
                began = time.perf_counter()
                for _, connection in ranks[name]:
                    connection.send("go")
                for rank, (_, connection) in enumerate(ranks[name]):
                    if answer := connection.recv():
                        raise RuntimeError(f"rank {rank} of {name} failed:\n{answer}")
                if turn > 0:
                    seconds[name].append(time.perf_counter() - began)
        return seconds
    finally:
        for process, _ in (each for group in ranks.values() for each in group):
            process.kill()
            process.join()


def run_rank(
    name: str,
    rank: int,
    world_size: int,
    config: Config,
    folder: str,
    turns: int,
    steps: int,
    port: int,
    connection: Connection,
) -> None:
    """One rank of one loop: waits for "go", takes `steps` steps, answers "", and again; or answers what went wrong."""
    warnings.filterwarnings("ignore")
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    taken = 0

    def step_done() -> None:
        nonlocal taken
        taken += 1
        if taken % steps == 0:
            connection.send("")
            connection.recv()

    loops: dict[str, Callable[[Task, StepDone], None]] = {"ours": ours}
    loops |= {kind: partial(bare, kind) for kinds in BARE.values() for kind in kinds}
    loops |= {library: loop for library, (loop, _) in LIBRARIES.items()}
    connection.recv()
    try:
        # Libraries would wrap a model for one rank that has a process group.
        if world_size > 1 or name == "ours":
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
            dist.init_process_group("gloo")
        task = Task(config, world_size, rank, samples_of(config, (turns + 1) * steps), folder)
        loops[name](task, step_done)
    except BaseException:
        connection.send(traceback.format_exc())


def samples_of(config: Config, num_steps: int) -> torch.Tensor:
    """Of all ranks, [global batch × steps, T + 1]."""
    loader = _loader(config, data_rank=0, data_size=1)
    batches = [loader.batch(step) for step in range(1, num_steps + 1)]
    return torch.cat([torch.cat((each.tokens_BT, each.labels_BT[:, -1:]), dim=1) for each in batches])


def _loader(config: Config, *, data_rank: int, data_size: int) -> Loader:
    return open_loader(config, [open_store(config.data.path)], data_rank=data_rank, data_size=data_size)


def ours(task: Task, step_done: StepDone) -> None:
    class Link(MemoryLink):
        def step(self, step: int, metrics: dict[str, float]) -> None:
            super().step(step, metrics)
            step_done()

    config, world = task.config, World.of(task.config)
    engine = build_native_engine(config, world, detect("cpu"), Pretraining())
    train(
        engine=engine,
        batches=_loader(config, data_rank=engine.data_rank, data_size=engine.data_size),
        cadence=_Never(task.num_steps, checkpoint_every=1, evaluate_every=1),
        start_step=0,
        evaluate=dict,
        guard=Guard(),
        evidence=_NoEvidence(),
        patience=Patience(),
        snapshots=_NoSnapshots(),
        throughput=Throughput(
            Pretraining(), world.size, config.tokens_per_step, config.train.global_batch_size, 1.0, 1.0, 1.0
        ),
        link=Link(),
    )


class _Never(Cadence):
    """Neither saves nor evaluates, at the last step neither."""

    def saves(self, step: int) -> bool:
        return False

    def evaluates(self, step: int) -> bool:
        return False


class _NoEvidence:
    def of(self, step: int, batch: Batch, result: StepResult, why: str) -> str:
        raise AssertionError("no step of this run is bad")


class _NoSnapshots:
    def wants_to_skip(self, *, upload: bool) -> bool:
        return False

    def save(self, step: int, *, upload: bool) -> None:
        raise AssertionError("this run saves nothing")


if __name__ == "__main__":
    sys.exit(main())
