"""Lays a decoder over a device mesh: tensor parallelism by the plan, checkpointing, compiling, then FSDP.

The mesh has two axes, ("data", "tensor"), tensor innermost: ranks of one tensor group are neighbours on a node.
"""

from collections.abc import Iterator
from datetime import timedelta
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # pyright: ignore[reportPrivateUsage]
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from raynium.accelerators import Accelerator
from raynium.accelerators.timeouts import PROCESS_GROUP_TIMEOUT_SECONDS
from raynium.config.schema import Config, EngineSection
from raynium.config.world import World
from raynium.engines.adapted_layers import split_adapted
from raynium.engines.torch_compiles import Backend
from raynium.models.decoder import Decoder
from raynium.models.flops import learned_count
from raynium.models.lora import AdaptedLinear
from raynium.models.plan import Split, tensor_parallel_plan

# checkpoint_wrapper puts this into parameter names; checkpoints must not see it.
_WRAPPER_PREFIX = "_checkpoint_wrapped_module."


def mesh_of(world: World, device_type: str) -> DeviceMesh:
    """All ranks, by data and tensor rank. Every rank calls it."""
    mesh = init_device_mesh(device_type, (world.data, world.tensor), mesh_dim_names=("data", "tensor"))
    # Its groups begin with torch's own timeout, whatever the world's is. torch can change these backends' only.
    for group in mesh.get_all_groups():
        if dist.get_backend(group) in ("gloo", "nccl"):
            _set_pg_timeout(timedelta(seconds=PROCESS_GROUP_TIMEOUT_SECONDS), group)
    return mesh


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Splits parameters over the tensor axis in place. The model must be on the meta device: nothing is sent."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for rule in tensor_parallel_plan(model.config):
        layers = [layer for name, layer in model.named_modules() if fnmatchcase(name, rule.module)]
        # A target is one in every block.
        if adapted := [layer for layer in layers if isinstance(layer, AdaptedLinear)]:
            for layer in adapted:
                split_adapted(layer, mesh, rule.split)
        else:
            parallelize_module(model, mesh, {rule.module: _style(rule.split)})
    # torch's styles make parameters that learn of all.
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    # Embedding and head have become two parameters.
    model.tie()
    # In the dtype and place that it has, but arrived: blocks would get a tensor that is still under way, and a compiled
    # block gives such an input no gradient (torch 2.13, AsyncCollectiveTensor).
    model.embedding.register_forward_hook(lambda module, inputs, hidden_BTD: hidden_BTD.clone())


def _style(split: Split) -> ParallelStyle:
    # Tokens are dim T of BTD.
    tokens = Shard(1)
    match split:
        case "vocabulary":
            return RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens)
        case "gather":
            return PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate())
        case "column":
            return ColwiseParallel()
        case "row":
            return RowwiseParallel(output_layouts=tokens)
        case "sequence":
            return SequenceParallel()
        case "heads":
            # Heads are dim H of BTHK.
            return SequenceParallel(sequence_dim=2, use_local_output=True)
        case "logits":
            return ColwiseParallel(input_layouts=tokens)


def wrap_blocks(model: Decoder, engine: EngineSection, *, compile_backend: Backend | str, whole_graphs: bool) -> None:
    """Activation checkpointing and compilation, block by block; before FSDP2, so that it gathers outside of both.

    whole_graphs: a block that torch cannot trace into one graph is an error, rather than several graphs.
    """
    if engine.activation_checkpointing == "full":
        for index, block in enumerate(model.blocks):
            # No dropout in the model, so no random state to keep.
            model.blocks[index] = checkpoint_wrapper(block, preserve_rng_state=False)
    if engine.compile == "block":
        for block in model.blocks:
            block.compile(backend=compile_backend, dynamic=False, fullgraph=whole_graphs)


def apply_fsdp(model: Decoder, mesh: DeviceMesh, *, compute_dtype: torch.dtype, gathered: bool) -> None:
    """Shards parameters, gradients and optimizer state over the data axis.

    gathered: keep whole parameters from forward to backward, in one group, so a step has one all-gather and one
    reduce-scatter: for models that are small beside the device. Otherwise a group per block, whole while it computes.
    Gradients are summed over the ranks, in float32; the engine divides by the token count. What does not learn is
    sharded too, in the compute type; of one rank it is left alone, since gathering would copy it.
    """
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    ignored = frozen if mesh.size() == 1 else None
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        # Activations follow the embedding's dtype; RoPE tables stay float32.
        cast_forward_inputs=False,
    )
    if not gathered:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        # gloo has no reduction but the sum.
        module.set_force_sum_reduction_for_comms(True)


def fits_gathered(config: Config, accelerator: Accelerator) -> bool:
    """Whether whole parameters and whole float32 gradients are a small part (an eighth) of each rank's memory.

    Then they are kept through a step: one gather and one reduction a step, not three of them per block and micro-batch.
    (SimpleFSDP: from forward to backward of a micro-batch.) All ranks call it, and are told the same: they must gather
    alike, and may be on machines of unlike memory.
    """
    compute_bytes = getattr(torch, config.engine.dtype).itemsize
    count = learned_count(config.model, config.adapter)
    gathered_bytes = (count.adapter + count.whole) * (compute_bytes + 4) + count.frozen * compute_bytes
    whole = gathered_bytes // config.parallel.tensor
    memory = accelerator.memory_bytes(local_rank=0, local_world_size=config.cluster.ranks_per_node)
    ranks_short = torch.tensor([float(whole > memory // 8)], device=accelerator.device_type)
    if dist.is_initialized():
        dist.all_reduce(ranks_short)
    return ranks_short.item() == 0


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, under the name it has in an unwrapped decoder."""
    return {name.replace(_WRAPPER_PREFIX, ""): parameter for name, parameter in model.named_parameters()}
