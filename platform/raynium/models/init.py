"""How a run's parameters begin: a pure function of (seed, name), so every layout starts from the same bits."""

import hashlib
import math

import numpy as np
import torch
from numpy.random import Generator, Philox  # by name: numpy loads the module late, and a forked rank should not
from torch import Tensor, nn

from raynium.config.schema import ModelSection


def init_parameter(name: str, *, shape: tuple[int, ...], seed: int, config: ModelSection) -> Tensor:
    """The whole parameter `name` (e.g. "blocks.0.attention.q.weight"), float32 on the CPU.

    Norm weights are 1. Everything else is normal(0, init_std), and the two matrices of a layer that write into the
    residual stream are smaller by sqrt(2 * num_layers), so that its variance does not grow with depth (GPT-2).
    numpy's Philox and not torch's generator: torch draws other bits on CPUs with other vector units.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = Generator(Philox(key=int.from_bytes(digest, "little")))
    std = config.init_std
    if name.endswith(("attention.o.weight", "ffn.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(std)


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int, config: ModelSection) -> None:
    """Fill a whole, unsharded model in place; for one process without an engine (sampling, tests, benchmarks)."""
    for name, parameter in model.named_parameters():
        parameter.copy_(init_parameter(name, shape=tuple(parameter.shape), seed=seed, config=config))
