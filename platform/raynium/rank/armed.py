"""What `raynium chaos` has in a rank, armed by an environment variable that only chaos sets. It names a folder:

steps   written here: a line for each step of rank 0, those of a lost life too: the step, when it was done (Unix time),
        the process that did it, the loss with all its bits, and for how many seconds it was held back by the limit
limit   written by chaos, which replaces it: the last step that may be taken until then, so that a fast run does not end
        before all faults have happened
"""

import os
import time
from pathlib import Path
from typing import Any, cast

from raynium.data.batch import Batch
from raynium.engines.base import Engine, StepResult, Votes

# A folder of this machine.
CHAOS_VARIABLE = "RAYNIUM_CHAOS"
STEPS_NAME, LIMIT_NAME = "steps", "limit"
LIMIT_POLL_SECONDS = 0.005


class _ArmedEngine:
    def __init__(self, engine: Engine, folder: Path):
        self._engine = engine
        self._limit = folder / LIMIT_NAME
        # Appended to in one write each, so that a kill leaves no half a line before the next rank's first.
        self._steps = os.open(folder / STEPS_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batch: Batch, *, step: int, votes: Votes) -> StepResult:
        began = time.time()
        while self._limit.exists() and step > int(self._limit.read_text(encoding="utf-8")):
            time.sleep(LIMIT_POLL_SECONDS)
        held = time.time() - began
        result = self._engine.step(batch, step=step, votes=votes)
        os.write(self._steps, f"{step} {time.time():.6f} {os.getpid()} {result.loss.hex()} {held:.6f}\n".encode())
        return result


def armed(engine: Engine, *, rank: int) -> Engine:
    """The engine as it is, unless chaos asked for more of rank 0."""
    folder = os.environ.get(CHAOS_VARIABLE)
    return engine if folder is None or rank != 0 else cast(Engine, _ArmedEngine(engine, Path(folder)))
