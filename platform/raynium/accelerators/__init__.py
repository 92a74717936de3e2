"""The devices this build trains on. Light: importing it loads no torch, because node agents have none."""

from raynium.accelerators.base import Accelerator
from raynium.accelerators.cpu import multiplies_bfloat16
from raynium.accelerators.detect import detect

__all__ = ["Accelerator", "detect", "native_dtype"]


def native_dtype(accelerator: str) -> str:
    """The compute dtype that is quick on an accelerator: bfloat16, but float32 on most CPUs (we look at this one)."""
    if accelerator == "cpu" and not multiplies_bfloat16():
        return "float32"
    return "bfloat16"
