"""SimpleFSDP: parameters sharded over the data axis and gathered by ordinary operations of the forward pass.

For compiled blocks. FSDP2 gathers in hooks, which a compiler does not see; here a block's graph holds the all-gather of
each parameter and the reduce-scatter of its gradient (arXiv 2411.00284), so that the compiler may start them early and
join them. What a block gathered is gathered again in its backward pass: engines/recompute.py sees to that.

Layout, types and sums are FSDP2's: the same checkpoints, and the same bits where sums have one order. That leaves out a
tied table: it is gathered for each of its two uses, and their gradients are reduced before they are added.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from raynium.models.decoder import Decoder


def shard_parameters(model: Decoder, mesh: DeviceMesh) -> None:
    """Replaces every parameter by this rank's rows of it, in place.

    mesh: ("data", "tensor"). The model must be on the meta device: nothing is sent, and values are not kept.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            rows = nn.Parameter(_shard(parameter.detach(), mesh), requires_grad=parameter.requires_grad)
            module.register_parameter(name, rows)
    # Embedding and head have become two parameters.
    model.tie()


def _shard(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Rows as FSDP2 deals them: those of a tensor-parallel share, where there is one, are split once more."""
    data = mesh["data"]
    placements: tuple[Placement, ...] = (Shard(0),)
    share = whole
    if isinstance(whole, DTensor):
        (on_tensor,) = whole.placements
        on_data = _StridedShard(0, split_factor=mesh["tensor"].size()) if on_tensor == Shard(0) else Shard(0)
        placements, share = (on_data, on_tensor), whole.to_local()
    rows, _ = Shard.local_shard_size_and_offset(share.shape[0], data.size(), data.get_local_rank())
    local = share.new_empty(rows, *share.shape[1:])
    own_mesh = mesh if isinstance(whole, DTensor) else data
    return DTensor.from_local(local, own_mesh, placements, shape=whole.shape, stride=whole.stride())


def gather_in_forward(model: Decoder, mesh: DeviceMesh, *, compute_dtype: torch.dtype) -> None:
    """From now on reading a module's parameter gathers it; `named_parameters` still gives the shards.

    A forward pass is a collective: every rank of the data axis must run it, and one that dies in it leaves the others
    waiting until the agents end the generation. Parameters must have got their memory before.
    """
    # One new class for each class of modules: every block has the same ones, and so the same compiled graph.
    gathering: dict[type[nn.Module], type[nn.Module]] = {}
    for module in model.modules():
        own = type(module)
        if own not in gathering:
            names = [name for name, _ in module.named_parameters(recurse=False)]
            gathered = {name: _gathered(name, mesh, compute_dtype) for name in names}
            gathering[own] = type(f"Gathering{own.__name__}", (own,), gathered) if names else own
        module.__class__ = gathering[own]


def _gathered(name: str, mesh: DeviceMesh, compute_dtype: torch.dtype) -> property:
    data, tensor = mesh["data"], mesh["tensor"]

    def gather(module: nn.Module) -> Tensor:
        """The whole parameter in the compute type; under tensor parallelism this rank's share of it."""
        parameter = module._parameters[name]
        assert isinstance(parameter, DTensor)
        on_tensor = parameter.placements[1:]
        shape = list(parameter.shape)
        for placement in on_tensor:
            if isinstance(placement, Shard):
                shape[placement.dim] //= tensor.size()
        rows = DTensor.from_local(
            parameter.to_local(), data, (Shard(0),), run_check=False, shape=torch.Size(shape), stride=(*shape[1:], 1)
        )
        # Backward, from below: the gradient of this rank's samples, in float32, summed over the ranks.
        whole = rows.redistribute(placements=(Replicate(),), forward_dtype=compute_dtype, backward_dtype=torch.float32)
        share = whole.to_local(grad_placements=(Partial(),))
        return DTensor.from_local(share, tensor, on_tensor, run_check=False) if on_tensor else share

    return property(gather)
