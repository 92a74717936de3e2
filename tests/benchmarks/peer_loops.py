"""The training loops that people use beside ours, on the same model, samples and optimizer.

Each trains on all of a `Task` and calls `step_done()` after every step. Each is used as its documentation shows, with
what is no part of training a step (bars, checkpoints, files of logs) turned off, and has the loss of every step as a
number, as ours has.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from first_weights import initialise

from raynium.config.schema import Config
from raynium.engines.optim import decays
from raynium.models.decoder import Decoder

StepDone = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """What all loops do. `samples`: every rank's rows, [global batch × steps, T + 1], in the order of steps."""

    config: Config
    world_size: int
    rank: int
    samples: torch.Tensor
    folder: str

    @property
    def num_steps(self) -> int:
        return len(self.samples) // self.config.train.global_batch_size

    @property
    def num_micro_batches(self) -> int:
        return self.config.train.global_batch_size // self.world_size // self.config.train.micro_batch_size


class WithLoss(torch.nn.Module):
    """The decoder, with the mean loss of a micro-batch [B, T + 1] as what it gives."""

    def __init__(self, config: Config):
        super().__init__()
        self.decoder = Decoder(config.model)
        initialise(self.decoder, seed=config.run.seed, config=config.model)

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        logits_BTV = self.decoder(rows[:, :-1])
        return {"loss": F.cross_entropy(logits_BTV.flatten(0, 1), rows[:, 1:].flatten())}


def adamw(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in model.parameters() if decays(tuple(parameter.shape))]
    others = [parameter for parameter in model.parameters() if not decays(tuple(parameter.shape))]
    groups = [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=config.optimizer.betas, fused=True)


# ------------------------------------------------------------------------------------------------- without a library


def bare(kind: str, task: Task, step_done: StepDone) -> None:
    """The shortest loop that trains the same. kind: "plain" (one rank), "FSDP2" or "DDP"."""
    config = task.config
    model = WithLoss(config)
    forward: Any = DistributedDataParallel(model) if kind == "DDP" else model
    if kind == "FSDP2":
        for module in (*model.decoder.blocks, model):
            fully_shard(module)
            # gloo has no other.
            module.set_force_sum_reduction_for_comms(True)  # pyright: ignore
    optimizer = adamw(model, config)
    for batch in task.samples.unflatten(0, (task.num_steps, task.world_size, -1))[:, task.rank]:
        micro_batches = batch.split(config.train.micro_batch_size)
        for index, rows in enumerate(micro_batches):
            if kind == "DDP":
                forward.require_backward_grad_sync = index == len(micro_batches) - 1
            loss = forward(rows)["loss"]
            (loss / len(micro_batches)).backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        step_done()


# ------------------------------------------------------------------------------------------------- libraries


def with_accelerate(task: Task, step_done: StepDone) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.num_micro_batches)
    model = WithLoss(task.config)
    loader = DataLoader(_rows(task), batch_size=task.config.train.micro_batch_size)
    forward, optimizer, loader = accelerator.prepare(model, adamw(model, task.config), loader)
    for rows in loader:
        with accelerator.accumulate(forward):
            loss = forward(rows)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(forward.parameters(), task.config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        if accelerator.sync_gradients:
            step_done()


def with_trainer(task: Task, step_done: StepDone) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = WithLoss(task.config)
    arguments = TrainingArguments(
        output_dir=f"{task.folder}/trainer",
        max_steps=task.num_steps,
        per_device_train_batch_size=task.config.train.micro_batch_size,
        gradient_accumulation_steps=task.num_micro_batches,
        max_grad_norm=task.config.optimizer.clip_norm,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_done()

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_rows(task),
        data_collator=lambda rows: {"rows": torch.stack(rows)},
        optimizers=(adamw(model, task.config), None),  # pyright: ignore
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def with_lightning(task: Task, step_done: StepDone) -> None:
    import pytorch_lightning as lightning
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from pytorch_lightning.strategies import DDPStrategy

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss(task.config)

        def training_step(self, rows: torch.Tensor) -> torch.Tensor:
            loss = self.model(rows)["loss"]
            self.log("loss", loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self, task.config)

    class Steps(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % task.num_micro_batches == 0:
                step_done()

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=task.world_size,
        strategy="auto" if task.world_size == 1 else DDPStrategy(process_group_backend="gloo"),
        plugins=[LightningEnvironment()],
        max_steps=task.num_steps,
        accumulate_grad_batches=task.num_micro_batches,
        gradient_clip_val=task.config.optimizer.clip_norm,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps()],
    )
    trainer.fit(Module(), DataLoader(_rows(task), batch_size=task.config.train.micro_batch_size))


LIBRARIES = {
    "accelerate": (with_accelerate, ("accelerate",)),
    "transformers' Trainer": (with_trainer, ("transformers", "accelerate")),
    "Lightning": (with_lightning, ("pytorch_lightning",)),
}


def installed() -> list[str]:
    """Names of LIBRARIES; says which are left out."""
    missing = {
        name: [package for package in packages if importlib.util.find_spec(package) is None]
        for name, (_, packages) in LIBRARIES.items()
    }
    if left_out := [f"{name} (no {', '.join(packages)})" for name, packages in missing.items() if packages]:
        print(f"left out, not installed (pip install 'raynium[bench]'): {'; '.join(left_out)}\n")
    return [name for name, packages in missing.items() if not packages]


def _rows(task: Task) -> list[torch.Tensor]:
    """A map-style dataset of all ranks' rows; the libraries divide it themselves."""
    return list(task.samples)
