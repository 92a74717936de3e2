"""Trains on forked gloo ranks from and to checkpoints, for `test_world_size.py`, which writes folders to its stdin.

FOLDER/scenario.json says what to do; each rank leaves FOLDER/rank-N.json: its losses and its sample ids.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _forked_ranks import serve_folders

from raynium.accelerators.detect import detect
from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.format.manifest import ShardEntry
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.upload import upload_shard
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.loader import open_loader
from raynium.data.store import open_store
from raynium.engines.base import Engine, Votes
from raynium.engines.native import build_native_engine
from raynium.storage.store import Store
from raynium.tasks.pretraining import Pretraining


def run_rank(rank: int, folder: Path, scenario: dict[str, Any]) -> None:
    """Load what there is to load, save it at once in FOLDER/resaved, take the steps, save some in FOLDER/run."""
    config = Config.model_validate(scenario["config"])
    with (folder / "stderr").open("ab") as stderr:
        os.dup2(stderr.fileno(), 2)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), World.of(config).size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=World.of(config).size)
    engine = build_native_engine(config, World.of(config), detect("cpu"), Pretraining())
    stores = [open_store(config.data.path)]
    loader = open_loader(config, stores, data_rank=engine.data_rank, data_size=engine.data_size)
    first, last = scenario["first_step"], scenario["last_step"]
    if scenario["load_from"] is not None:
        load_checkpoint(open_checkpoint(Store(scenario["load_from"]), first - 1), engine.state())
        engine.set_updates(first - 1)
        save(engine, Store(folder / "resaved"), first - 1, folder)
    losses, sample_ids = [], []
    for step in range(first, last + 1):
        losses.append(engine.step(loader.batch(step), step=step, votes=Votes()).loss)
        sample_ids.append(loader.samples(step).rows.tolist())
        if step in scenario["save_steps"]:
            save(engine, Store(folder / "run"), step, folder)
    result = {"losses": losses, "sample_ids": sample_ids, "data_rank": engine.data_rank}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    engine.close()
    dist.destroy_process_group()


def save(engine: Engine, store: Store, step: int, folder: Path) -> None:
    """As ranks, agent and coordinator do it together."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    chunks = engine.state()
    plan = plan_image(chunks)
    with ImageFile(folder / f"image-{rank}") as image:
        write_image(plan, chunks, image.reserve(plan.size), step=step)
        entry = upload_shard(store, plan.info(step=step, path=image.path), generation="g1", rank=rank)
        image.unlink()
    entries: list[Any] = [None] * world_size
    dist.all_gather_object(entries, entry.to_json())
    if rank == 0:
        shards = [ShardEntry.from_json(text) for text in entries]
        commit_checkpoint(
            store, step=step, generation="g1", entries=shards, state={"step": step}, world_size=world_size, layout={}
        )
    dist.barrier()


if __name__ == "__main__":
    serve_folders(run_rank)
