"""Our training loop against a bare PyTorch loop, same model, batch and optimizer: python tests/benchmarks/bench_loop.py

Ours is what a rank runs: loader, native engine, guard, metrics, link. Bare is the shortest loop that trains the same:
tensors at hand, cross_entropy, backward, clip_grad_norm_, AdamW; on two ranks with FSDP2 (`fully_shard` per block and
on the whole, as its documentation shows), and with DistributedDataParallel, which keeps the whole optimizer on each
rank. They take turns in the same processes, a few steps each, so that what else the machine does falls on all; ratios
are taken turn by turn. Passes if the median ratio of tokens per second is 0.97 or more against plain PyTorch and FSDP2;
the ratio against DDP is reported.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from raynium.accelerators.detect import detect
from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.loader import Loader
from raynium.data.store import open_store
from raynium.data.store_build import build_store
from raynium.engines.native import build_native_engine
from raynium.engines.optim import decays
from raynium.models.decoder import Decoder
from raynium.models.init import initialise
from raynium.train.link import MemoryLink
from raynium.train.loop import Cadence, train
from raynium.train.metrics import Throughput

LEAST_RATIO = 0.97
REQUIRED = ("plain", "FSDP2")
TURNS = 12
STEPS_PER_TURN = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build_store(Path(folder, "data"), source="python-stdlib", vocab_size=2048)
        print("| ranks | bare | model | rows × tokens per step | bare, tokens/s | ours, tokens/s | ratio |")
        print("|---|---|---|---|---|---|---|")
        ratios = []
        for world_size in (1, 2):
            multiprocessing.spawn(one_rank, (world_size, folder, arguments.turns, _free_port()), nprocs=world_size)
        for line in Path(folder, "rows").read_text().splitlines():
            kind, ratio, row = line.split("\t")
            print(row)
            if kind in REQUIRED:
                ratios.append(float(ratio))
    print(f"\nsmallest ratio {min(ratios):.3f}, required {LEAST_RATIO}")
    return 0 if min(ratios) >= LEAST_RATIO else 1


def one_rank(rank: int, world_size: int, folder: str, turns: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    config = load_config(
        "quickstart",
        {"data.path": f"{folder}/data", "cluster.ranks_per_node": world_size, "engine.dtype": "float32"},
    )
    kinds = ["plain"] if world_size == 1 else ["FSDP2", "DDP"]
    loops = {"ours": our_turns(config)} | {kind: bare_turns(config, world_size, kind) for kind in kinds}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns + 1):
        for name, take_turn in loops.items():
            dist.barrier()
            began = time.perf_counter()
            take_turn(turn)
            dist.barrier()
            if turn > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        tokens = STEPS_PER_TURN * config.tokens_per_step
        size = sum(parameter.numel() for parameter in Decoder(config.model).parameters()) / 1e6
        shape = f"{config.train.global_batch_size} × {config.data.seq_len}"
        with Path(folder, "rows").open("a") as rows:
            for kind in kinds:
                ratio = statistics.median(b / o for b, o in zip(seconds[kind], seconds["ours"], strict=True))
                rates = [tokens / statistics.median(seconds[name]) for name in (kind, "ours")]
                cells = [str(world_size), kind, f"{size:.1f} M", shape, *(f"{rate:,.0f}" for rate in rates)]
                rows.write(f"{kind}\t{ratio}\t| {' | '.join(cells)} | {ratio:.3f} |\n")
    dist.destroy_process_group()


def our_turns(config: Config) -> Callable[[int], None]:
    engine = build_native_engine(config, World.of(config), detect("cpu"))
    loader = Loader(
        open_store(config.data.path),
        seq_len=config.data.seq_len,
        global_batch_size=config.train.global_batch_size,
        data_rank=engine.data_rank,
        data_size=engine.data_size,
        seed=config.run.seed,
    )
    throughput = Throughput(
        World.of(config).size, config.tokens_per_step, config.train.global_batch_size, 1.0, 1.0, 1.0
    )

    def take_turn(turn: int) -> None:
        never = 10**9
        train(
            engine=engine,
            batches=loader,
            cadence=_Turn((turn + 1) * STEPS_PER_TURN, checkpoint_every=never, evaluate_every=never),
            start_step=turn * STEPS_PER_TURN,
            evaluate=dict,
            save=lambda step: None,
            throughput=throughput,
            link=MemoryLink(),
        )

    return take_turn


class _Turn(Cadence):
    """A turn's last step is not the run's: it neither saves nor evaluates."""

    def saves(self, step: int) -> bool:
        return False

    def evaluates(self, step: int) -> bool:
        return False


def bare_turns(config: Config, world_size: int, kind: str) -> Callable[[int], None]:
    decoder = Decoder(config.model)
    initialise(decoder, seed=config.run.seed, config=config.model)
    model = DistributedDataParallel(decoder) if kind == "DDP" else decoder
    if kind == "FSDP2":
        for module in (*decoder.blocks, decoder):
            fully_shard(module)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    decayed = [parameter for parameter in decoder.parameters() if decays(tuple(parameter.shape))]
    others = [parameter for parameter in decoder.parameters() if not decays(tuple(parameter.shape))]
    groups = [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=config.optimizer.betas, fused=True)
    rows = config.train.global_batch_size // world_size
    tokens_RT = torch.randint(config.model.vocab_size, (rows, config.data.seq_len + 1))
    micro_batches = tokens_RT.split(config.train.micro_batch_size)

    def take_turn(turn: int) -> None:
        for _ in range(STEPS_PER_TURN):
            for index, tokens_BT in enumerate(micro_batches):
                if isinstance(model, DistributedDataParallel):
                    model.require_backward_grad_sync = index == len(micro_batches) - 1
                logits_BTV = model(tokens_BT[:, :-1])
                loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
                (loss / len(micro_batches)).backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return take_turn


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
