"""What `raynium chaos` has in a rank, armed by an environment variable that only chaos sets. It names a folder:

steps   written here: a line for each step of rank 0, those of a lost life too: the step, when it was done (Unix time),
        the process that did it, the loss with all its bits, and for how many seconds it was held back by the limit
limit   written by chaos, which replaces it: the last step that may be taken until then, so that a fast run does not end
        before all faults have happened
bad     written by chaos before the run: lines of a step and a factor. In that step, each time that it is taken, the
        slopes of rank 0 are multiplied by it, so that the gradient leaps or is none
full    written by chaos: while it is there, no rank finds shared memory that it does not have yet
refusals  one byte is appended here each time
flips   written by chaos before the run: audited steps. In each of them, once, a bit of one slope of rank 0 is flipped
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from raynium.data.batch import Batch
from raynium.engines.base import Audit, Engine, StepResult, Votes
from raynium.tasks.base import Scored, Task

# A folder of this machine.
CHAOS_VARIABLE = "RAYNIUM_CHAOS"
STEPS_NAME, LIMIT_NAME, BAD_NAME, FLIPS_NAME = "steps", "limit", "bad", "flips"
FULL_NAME, REFUSALS_NAME = "full", "refusals"
LIMIT_POLL_SECONDS = 0.005
# Of a float32: an eighth of the slope, which also shows where gradients are bfloat16.
FLIPPED_BIT = 1 << 20


class _ArmedTask:
    factor = 1.0
    flips = False

    def __init__(self, task: Task):
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def score(self, log_probs_BT: Tensor, batch: Batch) -> Scored:
        scored = self._task.score(log_probs_BT, batch)
        if self.flips:
            self.flips = False
            slopes = scored.slope_BT.clone()
            # One that counts.
            slopes.flatten().view(torch.int32)[slopes.abs().argmax()] ^= FLIPPED_BIT
            return scored._replace(slope_BT=slopes)
        return scored if self.factor == 1.0 else scored._replace(slope_BT=scored.slope_BT * self.factor)


class _ArmedEngine:
    def __init__(self, engine: Engine, task: _ArmedTask, folder: Path):
        self._engine, self._task = engine, task
        self._folder = folder
        factors = (line.split() for line in _lines(folder / BAD_NAME))
        self._factors = {int(step): float(factor) for step, factor in factors}
        self._flips = {int(step) for step in _lines(folder / FLIPS_NAME)}
        self._limit = folder / LIMIT_NAME
        # Appended to in one write each, so that a kill leaves no half a line before the next rank's first.
        self._steps = os.open(folder / STEPS_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batch: Batch, *, step: int, votes: Votes, audit: Audit | None = None) -> StepResult:
        began = time.time()
        while self._limit.exists() and step > int(self._limit.read_text(encoding="utf-8")):
            time.sleep(LIMIT_POLL_SECONDS)
        held = time.time() - began
        if audit is not None and step in self._flips:
            flipped = self._folder / f"{FLIPS_NAME}-{step}"
            self._task.flips = not flipped.exists()
            flipped.touch()
        with self._spoilt(step):
            result = self._engine.step(batch, step=step, votes=votes, audit=audit)
        os.write(self._steps, f"{step} {time.time():.6f} {os.getpid()} {result.loss.hex()} {held:.6f}\n".encode())
        return result

    def layer_norms(self, batch: Batch, *, step: int) -> dict[str, float]:
        with self._spoilt(step):
            return self._engine.layer_norms(batch, step=step)

    @contextlib.contextmanager
    def _spoilt(self, step: int) -> Iterator[None]:
        self._task.factor = self._factors.get(step, 1.0)
        yield
        self._task.factor = 1.0


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def armed_task(task: Task, *, rank: int) -> Task:
    """The task as it is, unless chaos asked for more of rank 0."""
    return cast(Task, _ArmedTask(task)) if rank == 0 and CHAOS_VARIABLE in os.environ else task


def armed(engine: Engine, task: Task) -> Engine:
    """The engine as it is, unless its task, of `armed_task`, is armed."""
    if not isinstance(task, _ArmedTask):
        return engine
    return cast(Engine, _ArmedEngine(engine, task, Path(os.environ[CHAOS_VARIABLE])))


def armed_memory() -> bool:
    """Whether chaos lets this rank find more shared memory."""
    folder = os.environ.get(CHAOS_VARIABLE)
    if folder is None or not Path(folder, FULL_NAME).exists():
        return True
    with Path(folder, REFUSALS_NAME).open("ab") as file:
        file.write(b".")
    return False
