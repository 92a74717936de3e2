"""Two gloo ranks with a model under FSDP2, for `test_checkpoint_dcp.py`: python _dcp_ranks.py FOLDER.

FOLDER/start holds a run that one process saved. The ranks load its step 1 with DCP, take a step, save theirs with DCP
into FOLDER/theirs and as engines do into FOLDER/ours, and leave what they had as FOLDER/rank-N.pt.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.dcp import CheckpointReader, CheckpointWriter
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.format.manifest import ShardEntry
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.storage.store import Store

STEP = 2


def run_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "rendezvous"), 2)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    weights = model.state_dict()
    dcp_load({"model": weights}, storage_reader=CheckpointReader(str(folder / "start"), step=1))
    model.load_state_dict(weights)
    loaded = {name: full(tensor) for name, tensor in model.state_dict().items()}
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()

    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "scheduler": {"last_rates": (0.1, 0.05), "epoch": 3, "note": None},
    }
    dcp_save(state, storage_writer=CheckpointWriter(str(folder / "theirs"), step=STEP, state={"next_sample": 64}))
    save_as_engines_do(Store(folder / "ours"), model, folder, rank)
    after = {name: full(tensor) for name, tensor in model.state_dict().items()}
    moments = {name: full(optimizer.state[parameter]["exp_avg"]) for name, parameter in model.named_parameters()}
    torch.save({"loaded": loaded, "after": after, "moments": moments}, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def full(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def save_as_engines_do(store: Store, model: torch.nn.Module, folder: Path, rank: int) -> None:
    chunks = []
    for name, tensor in model.state_dict().items():
        assert isinstance(tensor, DTensor)
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        chunks.append(Chunk(f"model/{name}", tuple(tensor.shape), tuple(offsets), tensor.to_local(), saved_here=True))
    plan = plan_image(chunks)
    with ImageFile(folder / f"image-{rank}") as image:
        write_image(plan, chunks, image.reserve(plan.size), step=STEP)
    info = plan.info(step=STEP, path=folder / f"image-{rank}")
    entries: list[str] = ["", ""]
    dist.all_gather_object(entries, upload_shard(store, info, generation="g1", rank=rank).to_json())
    if rank == 0:
        shards = [ShardEntry.from_json(text) for text in entries]
        commit_checkpoint(
            store, step=STEP, generation="g1", entries=shards, state={"step": STEP}, world_size=2, layout={}
        )


def main() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, Path(sys.argv[1]))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
