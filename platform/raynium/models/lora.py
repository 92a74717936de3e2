"""LoRA in the decoder: each adapted linear layer computes x·Wᵀ + scale·(x·Aᵀ)·Bᵀ, and W does not learn.

Nothing is computed for what does not learn: W has no gradient, and autograd follows no input that nothing before it
needs, as in the first block of a frozen embedding. Names in shapes as in `models/decoder.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raynium.config.adapter import AdapterSection
from raynium.models.adapter import TARGETS, adapter_scale, learns_whole, target_names
from raynium.models.decoder import Decoder

# Odd numbers whose products spread bits well (splitmix's and xxHash's kind), as int32.
_SPREAD = (0x7FEB352D, -0x7B935975, 0x27D4EB2F, 0x165667B1)


@dataclass(frozen=True)
class Dropout:
    """Which inputs of adapters are left out: a function of the row's key, the layer, the token's place and the feature,
    and of nothing else, so that a resume and any layout leave out the same.

    keys_B: int32, on the device; written anew before each micro-batch (`row_keys`).
    """

    probability: float
    keys_B: Tensor


def row_keys(*, seed: int, step: int, rows: Sequence[int]) -> Tensor:
    """int32, on the CPU: of rows of a step's global batch, by their numbers in it."""
    digests = (hashlib.blake2b(f"{seed}/dropout/{step}/{row}".encode(), digest_size=4).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int32)


class AdaptedLinear(nn.Module):
    """A linear layer that keeps its own parameters' names, with lora_A [rank, inputs] and lora_B [outputs, rank]."""

    # Of the inputs that this rank has, the first one's number in the whole layer.
    first_input = 0

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float, dropout: Dropout | None, number: int):
        """number: of the layer, its own."""
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        # A tensor, since a compiler would make a graph of its own for each number.
        self.number = None if dropout is None else torch.tensor(number, dtype=torch.int32, device=dropout.keys_B.device)
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        place = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=place))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.weight, self.bias, self.lora_A, self.lora_B)

    def adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """x: [..., inputs] → [..., outputs]; all in one dtype. The adapter's part is added in place, so that no second
        tensor of the outputs' size is made."""
        x_NI = x.flatten(0, -2)
        y_NO = F.linear(x_NI, weight, bias)
        scale = self.scale
        # Where nothing learns, as in an evaluation, nothing is left out.
        if self.dropout is not None and torch.is_grad_enabled():
            x_NI, scale = self._thinned(x).flatten(0, -2), scale / (1 - self.dropout.probability)
        y_NO.addmm_(F.linear(x_NI, lora_A), lora_B.t(), alpha=scale)
        return y_NO.unflatten(0, x.shape[:-1])

    def _thinned(self, x_BTI: Tensor) -> Tensor:
        """Zeros for what is left out."""
        assert self.dropout is not None and self.number is not None
        _, num_tokens, num_inputs = x_BTI.shape
        places_T = torch.arange(num_tokens, dtype=torch.int32, device=x_BTI.device)
        inputs_I = torch.arange(num_inputs, dtype=torch.int32, device=x_BTI.device) + self.first_input
        of_layer_B = _mixed(self.dropout.keys_B + self.number * _SPREAD[2])
        of_token_BT = _mixed(of_layer_B[:, None] + places_T * _SPREAD[3])
        drawn_BTI = _mixed(of_token_BT[..., None] ^ (inputs_I * _SPREAD[2]))
        # Drawn from all of int32.
        bound = int((1 - self.dropout.probability) * (2**32 - 1)) - 2**31
        return x_BTI.where(drawn_BTI < bound, 0)


def _mixed(x: Tensor) -> Tensor:
    """int32 → int32 in which every bit depends on every bit (lowbias32)."""
    x = (x ^ _shifted(x, 16)) * _SPREAD[0]
    x = (x ^ _shifted(x, 15)) * _SPREAD[1]
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int32 shifted to the right, zeros following. The mask is a tensor: with a number, `&` in a compiled graph becomes
    an operation that a device of torch's PrivateUse1 may be handed in a form it cannot run."""
    return (x >> bits) & x.new_full((), 2 ** (32 - bits) - 1)


def adapt(
    model: Decoder, adapter: AdapterSection, *, frozen_dtype: torch.dtype, dropout: Dropout | None = None
) -> None:
    """Puts adapted layers in the place of targets, and freezes all else in `frozen_dtype`; nothing without an adapter.

    In place, before anything is laid over a mesh. A and B are float32, and so is what learns whole.
    """
    if adapter.rank is None:
        return
    scale, targets = adapter_scale(adapter), target_names(adapter)
    for index, block in enumerate(model.blocks):
        for name in targets:
            parent, _, leaf = TARGETS[name].rpartition(".")
            layer = getattr(block.get_submodule(parent), leaf)
            number = index * len(TARGETS) + list(TARGETS).index(name)
            adapted = AdaptedLinear(layer, rank=adapter.rank, scale=scale, dropout=dropout, number=number)
            setattr(block.get_submodule(parent), leaf, adapted)
    for path, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if not leaf.startswith("lora_") and not learns_whole(f"{path}.{leaf}", model.config, adapter):
                frozen = nn.Parameter(parameter.detach().to(frozen_dtype), requires_grad=False)
                module.register_parameter(leaf, frozen)
    model.tie()
