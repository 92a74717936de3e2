"""The devices this build trains on. Light: importing it loads no torch, because node agents have none."""

from raynium.accelerators.base import Accelerator
from raynium.accelerators.cpu import multiplies_bfloat16
from raynium.accelerators.detect import detect

__all__ = ["Accelerator", "detect", "native_dtype", "native_fsdp"]


def native_dtype(accelerator: str) -> str:
    """The compute dtype that is quick on an accelerator: bfloat16, but float32 on most CPUs (we look at this one)."""
    if accelerator == "cpu" and not multiplies_bfloat16():
        return "float32"
    return "bfloat16"


def native_fsdp(accelerator: str, *, compile: str) -> str:
    """How the native engine shards over data ranks: "simple" or "fsdp2", for `engine.compile` as given.

    AWS recommends SimpleFSDP with torch.compile: Neuron's compiler can only order collectives that it sees in a graph,
    and FSDP2's hooks gather between graphs. Elsewhere FSDP2, which fetches ahead without a compiler's help.
    """
    return "simple" if accelerator == "neuron" and compile == "block" else "fsdp2"
