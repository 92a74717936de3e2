"""What an engine hands to checkpoints: the training state as named blocks of logical tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raynium.config.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

MODEL_PREFIX = "model/"  # of the names of parameters


@dataclass(frozen=True)
class Chunk:
    """One rank's block of one logical tensor.

    The same object serves both ways: saving reads `tensor`, loading copies into it. A logical tensor's name, global
    shape and dtype do not depend on the world size, the layout or the engine; only the blocks do.
    """

    name: str  # e.g. "model/blocks.0.attention.q.weight", "optimizer/exp_avg/blocks.0.attention.q.weight"
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # where this block begins in the global tensor, one per dim
    tensor: "Tensor"  # this rank's block, on any device; shape gives the block's extent
    saved_here: bool  # of the ranks that hold this block exactly one saves it


def checkpoint_state(config: Config, step: int) -> dict[str, Any]:
    """What a manifest holds beside tensors: the position in the data is a pure function of the step."""
    return {
        "step": step,
        "next_sample": step * config.train.global_batch_size,
        "tokens": step * config.tokens_per_step,
        "config": config.model_dump(mode="json"),
    }
