"""Importing it makes one rank fail once: `RAYNIUM_TEST_HANG` says "where rank step file"; the file says that it did.

where: "data", it hangs in place of a batch; "collective", in place of a step; "native", the same with the interpreter's
lock held, so that no thread of the process answers; "bit", it flips one of the gradients that it computes in an audit.
`_agent_process.py` has the template preload it.
"""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raynium.data.loader import Loader
from raynium.engines.local_gradients import GradientWatch
from raynium.engines.native import NativeEngine

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


def flip_a_bit(watch: GradientWatch, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **named: Any) -> Any:
    if os.environ["RANK"] == RANK and watch._watching and not Path(FILE).exists():
        Path(FILE).touch()
        input_tensor.view(torch.int32)[len(input_tensor) // 2] ^= 1
    return reduce_scatter(watch, output_tensor, input_tensor, **named)


reduce_scatter = GradientWatch.__call__
if WHERE == "bit":
    GradientWatch.__call__ = flip_a_bit
elif WHERE == "data":
    Loader.batch = hanging(Loader.batch, lambda _, step: step)
else:
    NativeEngine.step = hanging(NativeEngine.step, lambda *_, step, **__: step)
