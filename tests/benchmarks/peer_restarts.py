"""What trains beside ours in bench_recovery.py: ranks that say each step, and go on from their last checkpoint.

All train the same model with DistributedDataParallel over gloo, and save as the documentation of each shows:

    python peer_restarts.py elastic FOLDER      one rank, as `torchrun` starts it
    python peer_restarts.py ray FOLDER          a job of Ray Train, with a Ray cluster of its own
    python peer_restarts.py empty FOLDER        as a job of a cluster: two workers of Ray Train that do nothing, of
                                                which each appends to FOLDER/starts, as it begins: when (Unix time),
                                                its rank, its pid and its host

FOLDER/config.json is a resolved config. Each rank leaves its pid in FOLDER/pid-RANK; rank 0 appends a line to
FOLDER/steps for each step: when it was done (Unix time), its pid, and the step's number.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by the first optimizer: loaded here, the bare fork's template has it
import torch.distributed as dist
from peer_loops import WithLoss, adamw
from torch.nn.parallel import DistributedDataParallel

from raynium.config.schema import Config

CHECKPOINT_EVERY = 5

State = dict[str, Any]


def read_config(folder: Path) -> Config:
    return Config.model_validate(json.loads((folder / "config.json").read_text()))


def train(folder: Path, state: State | None, save: Callable[[State], None], *, steps: int) -> None:
    """One rank; torch.distributed is initialised. state: what `save` was given last, by any generation's rank 0."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    temporary = folder / f"pid-{rank}.new"
    temporary.write_text(str(os.getpid()))
    temporary.rename(folder / f"pid-{rank}")
    config = read_config(folder)
    model = WithLoss(config)
    optimizer = adamw(model, config)
    first = 1
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    forward = DistributedDataParallel(model)
    rows = config.train.global_batch_size // world_size
    with (folder / "steps").open("a", buffering=1) as log:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step * world_size + rank)
            batch = torch.randint(config.model.vocab_size, (rows, config.data.seq_len + 1), generator=generator)
            micro_batches = batch.split(config.train.micro_batch_size)
            for index, micro_batch in enumerate(micro_batches):
                forward.require_backward_grad_sync = index == len(micro_batches) - 1
                (forward(micro_batch)["loss"] / len(micro_batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                log.write(f"{time.time()} {os.getpid()} {step}\n")
            if step % CHECKPOINT_EVERY == 0:
                save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})


def bare_fork(folder: Path, rank: int, world_size: int, port: int) -> None:
    """The least that a restart can be: a fork of a process that has torch, a new group, the model, and one step."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init_method = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    train(folder, None, lambda _: None, steps=1)


def run_elastic(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    path = folder / "checkpoint.pt"

    def save(state: State) -> None:
        if dist.get_rank() == 0:
            torch.save(state, f"{path}.new")
            Path(f"{path}.new").rename(path)

    train(folder, torch.load(path) if path.exists() else None, save, steps=10**9)


def run_ray(folder: Path) -> None:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    def one_rank(settings: dict[str, str]) -> None:
        import peer_restarts

        def save(state: State) -> None:
            if dist.get_rank() > 0:
                ray.train.report({})
                return
            with tempfile.TemporaryDirectory() as written:
                torch.save(state, f"{written}/state.pt")
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(written))

        state = None
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            with checkpoint.as_directory() as read:
                state = torch.load(f"{read}/state.pt")
        peer_restarts.train(Path(settings["folder"]), state, save, steps=10**9)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    TorchTrainer(
        one_rank,
        train_loop_config={"folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="peer",
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def run_empty(folder: Path) -> None:
    import ray
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def one_worker(settings: dict[str, str]) -> None:
        rank, host = ray.train.get_context().get_world_rank(), ray.util.get_node_ip_address()
        with Path(settings["folder"], "starts").open("a") as log:
            log.write(f"{time.time()} {rank} {os.getpid()} {host}\n")
        while True:
            time.sleep(1)

    ray.init(log_to_driver=False)
    DataParallelTrainer(
        one_worker,
        train_loop_config={"folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="empty",
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
        ),
    ).fit()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    {"elastic": run_elastic, "ray": run_ray, "empty": run_empty}[sys.argv[1]](Path(sys.argv[2]))
