"""First weights in a model that no engine has: whole, in one process."""

import torch
from torch import nn

from raynium.config.schema import ModelSection
from raynium.models.init import init_parameter


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int, config: ModelSection) -> None:
    """Fills it in place, with what every layout begins with."""
    for name, parameter in model.named_parameters():
        parameter.copy_(init_parameter(name, shape=tuple(parameter.shape), seed=seed, config=config))
