"""Adapted linear layers (`models/lora.py`) split over the tensor axis: no collective more than without an adapter.

A layer that is split by outputs has B split with it and A whole; one that is split by inputs has A split and B whole,
and its adapter's part is in the same sum over ranks as its own. The gradient of what is whole is summed over ranks.
"""

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from raynium.models.lora import AdaptedLinear
from raynium.models.plan import Split

_OUTPUTS, _INPUTS, _WHOLE = Shard(0), Shard(1), Replicate()
# Tokens are dim T of BTD.
_TOKENS = Shard(1)


class _SplitByOutputs(AdaptedLinear):
    """Its input is whole, a DTensor; its output is this rank's features, a plain tensor."""

    def forward(self, x: Tensor) -> Tensor:
        whole = cast(DTensor, x).to_local(grad_placements=(Partial(),))
        bias = None if self.bias is None else _here(self.bias)
        return self.adapted(whole, _here(self.weight), bias, _summed(self.lora_A), _here(self.lora_B))


class _SplitByInputs(AdaptedLinear):
    """Its input is this rank's features, a plain tensor; its output is summed over ranks, and this rank's tokens."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is None, "every rank would add it"
        part = self.adapted(x, _here(self.weight), None, _here(self.lora_A), _summed(self.lora_B))
        mesh = cast(DTensor, self.weight).device_mesh
        return (
            DTensor.from_local(part, mesh, (Partial(),), run_check=False).redistribute(placements=(_TOKENS,)).to_local()
        )


def _here(parameter: Tensor) -> Tensor:
    """This rank's part."""
    return cast(DTensor, parameter).to_local()


def _summed(parameter: Tensor) -> Tensor:
    """What is whole on every rank; its gradients are to be summed over them."""
    return cast(DTensor, parameter).to_local(grad_placements=(Partial(),))


def split_adapted(layer: AdaptedLinear, mesh: DeviceMesh, split: Split) -> None:
    """Splits an adapted layer in place, as the plan has it for the layer alone. mesh: the tensor axis. The layer must
    be on the meta device: nothing is sent.
    """
    assert split in ("column", "row"), f"no adapted layer is split as {split!r}"
    by_outputs = split == "column"
    places = {
        "weight": _OUTPUTS if by_outputs else _INPUTS,
        "bias": _OUTPUTS,
        "lora_A": _WHOLE if by_outputs else _INPUTS,
        "lora_B": _OUTPUTS if by_outputs else _WHOLE,
    }
    for name, parameter in list(layer.named_parameters(recurse=False)):
        part = distribute_tensor(parameter.detach(), mesh, [places[name]])
        layer.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    if not by_outputs:
        layer.first_input = mesh.get_local_rank() * (layer.lora_A.shape[1] // mesh.size())
    layer.__class__ = _SplitByOutputs if by_outputs else _SplitByInputs
