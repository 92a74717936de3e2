"""Importing it makes one rank hang once: `RAYNIUM_TEST_HANG` says "where rank step file"; the file says that it did.

where: "data", in place of a batch; "collective", in place of a step; "native", the same with the interpreter's lock
held, so that no thread of the process answers; "slow": it does not hang, but waits a while for each batch from that
step on, and all ranks tell of two steps at once. `_agent_process.py` has the template preload it.
"""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raynium.data.batch import Batch
from raynium.data.loader import Loader
from raynium.engines.native import NativeEngine
from raynium.train import link

WHERE, RANK, STEP, FILE = os.environ["RAYNIUM_TEST_HANG"].split()


def hang_at_its_step(step: int) -> None:
    if os.environ["RANK"] == RANK and step == int(STEP) and not Path(FILE).exists():
        Path(FILE).touch()
        if WHERE == "native":
            # The thread that tells of this step needs the lock too: without it the rank would seem to be where it was.
            time.sleep(0.1)
            ctypes.PyDLL(None).sleep(600)
        time.sleep(600)


def hanging(method: Callable[..., Any], step_of: Callable[..., int]) -> Callable[..., Any]:
    def method_that_hangs_once(*arguments: Any, **named: Any) -> Any:
        hang_at_its_step(step_of(*arguments, **named))
        return method(*arguments, **named)

    return method_that_hangs_once


def slow_from_its_step(loader: Loader, step: int) -> Batch:
    if os.environ["RANK"] == RANK and step >= int(STEP):
        time.sleep(0.5)
    return own_batch(loader, step)


own_batch = Loader.batch
if WHERE == "slow":
    link.STEPS_TIMED = 2
    Loader.batch = slow_from_its_step
elif WHERE == "data":
    Loader.batch = hanging(Loader.batch, lambda _, step: step)
else:
    NativeEngine.step = hanging(NativeEngine.step, lambda *_, step, **__: step)
