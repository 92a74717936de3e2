"""What a look for silent corruption costs (train/audit.py): python tests/benchmarks/bench_audit.py

Quickstart's model in float32 on two gloo ranks, one thread each. Every second step is audited, so audited steps and
others take turns. Passes if a run that audits each 1000th step is at most 2 % slower than one that audits none.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark import heading, parser, verdict

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.engines.collectives import gather
from raynium.engines.native import build_native_engine
from raynium.tasks.pretraining import Pretraining
from raynium.train.audit import Audits

RANKS = 2
EVERY_STEPS, MOST_SHARE = 1000, 0.02
TINY = {"model.vocab_size": 512, "model.hidden_size": 32, "model.ffn_size": 64, "model.head_dim": 8, "data.seq_len": 32}


def run_rank(rank: int, folder: Path, config: Config, turns: int, connection: Connection) -> None:
    """Rank 0 answers with the seconds of each step, from the second turn on: an unaudited step, then an audited one."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), RANKS)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    world = World.of(config)
    engine = build_native_engine(config, world, CpuAccelerator(), Pretraining())
    rows = config.train.global_batch_size // RANKS

    def batch_of(step: int, data_rank: int) -> Batch:
        generator = torch.Generator().manual_seed(RANKS * step + data_rank)
        ids = torch.randint(config.model.vocab_size, (rows, config.data.seq_len + 1), generator=generator)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    steps = Audits(engine, engine, batch_of, partial(gather, device="cpu"), every_steps=2, world=world)
    seconds = []
    for step in range(1, 2 * turns + 3):
        batch = batch_of(step, engine.data_rank)
        dist.barrier()
        began = time.perf_counter()
        steps.step(batch, step=step, votes=Votes())
        seconds.append(time.perf_counter() - began)
    # The first turn warms up.
    connection.send(seconds[2:])
    dist.destroy_process_group()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=60, help="an unaudited step and an audited one each")
    arguments = options.parse_args()
    heading()
    settings = {"engine.dtype": "float32", "fault.audit_every_steps": EVERY_STEPS}
    config = load_config("quickstart", settings | (TINY if arguments.tiny else {}))
    turns = 3 if arguments.tiny else arguments.turns
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="audit") as folder:
        given = [(rank, Path(folder), config, turns, there) for rank in range(RANKS)]
        ranks = [spawn.Process(target=run_rank, args=each, daemon=True) for each in given]
        for process in ranks:
            process.start()
        # So that a rank that dies is an end of file, and no wait for ever.
        there.close()
        seconds = here.recv()
        for process in ranks:
            process.join()
    plain, audited = seconds[::2], seconds[1::2]
    print("| step | median, ms | min | max |\n|---|---|---|---|")
    for name, taken in (("unaudited", plain), ("audited", audited)):
        figures = (1000 * each for each in (statistics.median(taken), min(taken), max(taken)))
        print(f"| {name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    ratio = statistics.median(with_it / without for with_it, without in zip(audited, plain, strict=True))
    share = (ratio - 1) / EVERY_STEPS
    print(f"\naudited / unaudited, median of {turns} turns: {ratio:.2f}")
    print(f"at each {EVERY_STEPS}th step that is {share:.2%} of a run (at most {MOST_SHARE:.0%})")
    return verdict(share <= MOST_SHARE, arguments.tiny)


if __name__ == "__main__":
    sys.exit(main())
