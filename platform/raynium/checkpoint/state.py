"""What an engine hands to checkpoints: the training state as named blocks of logical tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raynium.config.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

# Of the names of parameters.
MODEL_PREFIX = "model/"
# Of what evaluate.patience counts; the metric that it counts for follows.
PATIENCE_NAME = "patience/"
# The steps that were not learned from; see `train/guard.py`.
LEFT_OUT_NAME = "data/left_out_steps"
# What is told apart from a leap by it; see there.
RECENT_NAME = "guard/recent"


@dataclass(frozen=True)
class Chunk:
    """One rank's block of one logical tensor.

    The same object serves both ways: saving reads `tensor`, loading copies into it. A logical tensor's name, global
    shape and dtype do not depend on the world size, the layout or the engine; only the blocks do.

    name: as "model/blocks.0.attention.q.weight" or "optimizer/exp_avg/blocks.0.attention.q.weight". offsets: where this
    block begins in the global tensor, one per dim; its extent is the shape of `tensor`, which may be on any device.
    saved_here: of the ranks that hold this block exactly one saves it.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: "Tensor"
    saved_here: bool

    @classmethod
    def whole(cls, name: str, tensor: "Tensor", *, saved_here: bool) -> "Chunk":
        """Of a rank that holds all of the logical tensor."""
        return cls(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor, saved_here)


def checkpoint_state(config: Config, step: int) -> dict[str, Any]:
    """What a manifest holds beside tensors: the position in the data is a pure function of the step."""
    return {
        "step": step,
        "next_sample": step * config.train.global_batch_size,
        "tokens": step * config.tokens_per_step,
        "config": config.model_dump(mode="json"),
    }
