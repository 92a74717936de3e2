"""Runs audited steps of the native engine on forked gloo ranks. `test_audit.py` starts it and writes it folders.

FOLDER/scenario.json says what to do (`run` of the test), FOLDER/batches.pt holds all samples. Each rank leaves
FOLDER/rank-N.pt: the losses and norms of the steps that were taken, the state after them, and what was raised.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _engine_ranks import TestAccelerator, saved_state
from _forked_ranks import serve_folders

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.engines.collectives import GradientWatch, gather
from raynium.engines.native import build_native_engine
from raynium.tasks.pretraining import Pretraining
from raynium.train.audit import Audits


class Flips(GradientWatch):
    """Of this rank: the lowest bit of one element of the first gradients that it makes in a step, `times` times.

    moves: another bit each time.
    """

    at_step, times, moves, step = 0, 0, False, 0

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if self.step == self.at_step and self.times:
            self.times -= 1
            input_tensor.view(torch.int32)[len(input_tensor) // 2] ^= 1 << (self.times % 20 if self.moves else 0)
        return super().__call__(output_tensor, input_tensor, *rest, **more)


def run_rank(rank: int, folder: Path, scenario: dict) -> None:
    config, every_steps = Config.model_validate(scenario["config"]), scenario["every_steps"]
    torch.set_num_threads(1)
    world = World(**scenario["world"])
    store = dist.FileStore(str(folder / "rendezvous"), world.size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world.size)
    engine = build_native_engine(config, world, TestAccelerator(scenario["memory_bytes"]), Pretraining())
    samples = torch.load(folder / "batches.pt")
    rows = config.train.global_batch_size // engine.data_size

    def batch_of(step: int, data_rank: int) -> Batch:
        mine = slice(data_rank * rows, (data_rank + 1) * rows)
        return Batch(samples["tokens"][step - 1, mine], samples["labels"][step - 1, mine])

    gathers = partial(gather, device="cpu")
    steps = Audits(engine, engine, batch_of, gathers, every_steps=every_steps, world=world) if every_steps else engine
    if every_steps:
        engine._watch.__class__ = Flips
        assert isinstance(engine._watch, Flips)
        flip = scenario["flip"].get(str(rank), (0, 0, False))
        engine._watch.at_step, engine._watch.times, engine._watch.moves = flip
    kept: dict[str, Any] = {"results": [], "raised": None}
    try:
        for step in range(1, scenario["steps"] + 1):
            if isinstance(engine._watch, Flips):
                engine._watch.step = step
            if scenario["replica"] == [rank, step]:
                norm = next(chunk for chunk in engine.state() if "norm" in chunk.name)
                norm.tensor.view(torch.int32)[0] ^= 1
            before = saved_state(engine)
            result = steps.step(batch_of(step, engine.data_rank), step=step, votes=Votes())
            kept["results"].append((result.loss, result.grad_norm))
    except Exception as error:
        kept["raised"] = type(error).__name__, str(error)
        after = saved_state(engine)
        assert all(torch.equal(old[3], new[3]) for old, new in zip(before, after, strict=True)), "it was not applied"
    torch.save(kept | {"state": saved_state(engine)}, folder / f"rank-{rank}.pt")
    # Others wait for this rank until its connections break; a group that is taken down in order would wait for them.
    os._exit(0)


if __name__ == "__main__":
    serve_folders(run_rank)
