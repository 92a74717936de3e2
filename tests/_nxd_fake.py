"""A small fake of what `engines/nxd*.py` calls of neuronx-distributed, for tests where the library is not installed.

It does the arithmetic over gloo, in NxD's CPU mode (no ZeRO-1), so the engine's own work is tested: layouts, loss,
counts, state. Names and signatures are the library's; `test_nxd.py` compares them with the real ones where it has them.
Arguments that the engine does not give are kept in the signatures and refused when they are given.
"""

import sys
import types
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _nxd_fake_pipeline import NxDPPModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_state: dict[str, Any] = {"platform": "trn1"}


# ---- parallel_state --------------------------------------------------------------------------------------------------


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    skip_collective_init: bool = False,
    lnc_size: int = 1,
    mesh_only: bool = False,
    context_parallel_size: int = 1,
) -> None:
    """Ranks of a tensor group are neighbours, and so are those of a stage."""
    size, tensor, rank = dist.get_world_size(), tensor_model_parallel_size, dist.get_rank()
    of_stage = size // pipeline_model_parallel_size
    _state["tensor_groups"] = [list(range(start, start + tensor)) for start in range(0, size, tensor)]
    _state["data_groups"] = [
        list(range(stage + start, stage + of_stage, tensor))
        for stage in range(0, size, of_stage)
        for start in range(tensor)
    ]
    _state["pipeline_groups"] = [list(range(start, size, of_stage)) for start in range(of_stage)]
    for kind in ("tensor", "data", "pipeline"):
        groups = [(ranks, dist.new_group(ranks)) for ranks in _state[f"{kind}_groups"]]
        _state[kind] = next(group for ranks, group in groups if rank in ranks)


def destroy_model_parallel() -> None:
    _state.clear()


def initialize_kv_group(kv_shared_group_size: int = 1, sequential_ranks_in_group: bool = False) -> None:
    if "kv" in _state:
        return
    stride = 1 if _state["platform"] == "trn2" else _size() // kv_shared_group_size
    _state["kv_groups"] = []
    for ranks in _state["tensor_groups"]:
        heads = range(_size() // kv_shared_group_size)
        firsts = [head * kv_shared_group_size if stride == 1 else head for head in heads]
        _state["kv_groups"] += [ranks[first::stride][:kv_shared_group_size] for first in firsts]
    groups = [(ranks, dist.new_group(ranks)) for ranks in _state["kv_groups"]]
    _state["kv"] = next(group for ranks, group in groups if dist.get_rank() in ranks)


def get_kv_shared_replica_groups() -> list[list[int]]:
    return _state["kv_groups"]


def get_data_parallel_rank() -> int:
    return _state["data"].rank()


def get_data_parallel_size() -> int:
    return _state["data"].size()


def get_tensor_model_parallel_rank() -> int:
    return _state["tensor"].rank()


def get_tensor_model_parallel_size() -> int:
    return _size()


def get_pipeline_model_parallel_rank() -> int:
    return _state["pipeline"].rank()


def get_pipeline_model_parallel_size() -> int:
    return _state["pipeline"].size()


def pipeline_ranks() -> list[int]:
    """The ranks of this pipeline, by stage."""
    return next(ranks for ranks in _state["pipeline_groups"] if dist.get_rank() in ranks)


def _size() -> int:
    return _state["tensor"].size()


# ---- layers ----------------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Along dim 0; the gradient is summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _scattered_sum(gradient)


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _scattered_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gathered(gradient)


class _SharedGradient(torch.autograd.Function):
    """The gradient is summed over the ranks that hold a copy of the same key/value head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone()
        dist.all_reduce(total, group=_state["kv"])
        return total


def _gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_size())]
    dist.all_gather(parts, x.contiguous(), group=_state["tensor"])
    return torch.cat(parts)


def _scattered_sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_state["tensor"])
    return total.chunk(_size())[_state["tensor"].rank()].contiguous()


def set_tensor_model_parallel_attributes(
    tensor: Tensor, is_parallel: bool, dim: int, stride: int, num_partitions: int = -1, rank_ordering: Any = None
) -> None:
    assert not hasattr(tensor, "tensor_model_parallel")
    tensor.tensor_model_parallel = is_parallel  # pyright: ignore[reportAttributeAccessIssue]


def _parameter(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
    assert parameter.is_meta, "the engine builds on the meta device"
    return parameter


class ColumnParallelLinear(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        stride: int = 1,
        init_method: Any = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
    ):
        super().__init__()
        assert not bias and not gather_output and sequence_dimension in (None, 0)
        assert sequence_parallel_enabled == (_size() > 1) and output_size % (_size() * stride) == 0
        self.weight = _parameter(output_size // _size(), input_size, dtype)
        set_tensor_model_parallel_attributes(self.weight, True, 0, stride, _size())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(_Gather.apply(input), self.weight)


class RowParallelLinear(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        stride: int = 1,
        init_method: Any = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
    ):
        super().__init__()
        assert not bias and input_is_parallel and sequence_dimension in (None, 0)
        assert sequence_parallel_enabled == (_size() > 1)
        self.weight = _parameter(output_size, input_size // _size(), dtype)
        set_tensor_model_parallel_attributes(self.weight, True, 1, stride, _size())

    def forward(self, input_: Tensor) -> Tensor:
        return _ScatterSum.apply(F.linear(input_, self.weight))


class ParallelEmbedding(nn.Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_method: Any = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        shard_across_embedding: bool = False,
        pad: bool = False,
        sequence_parallel_enabled: bool = False,
    ):
        super().__init__()
        assert sequence_parallel_enabled, "its output has tokens first only then"
        self.weight = _parameter(num_embeddings // _size(), embedding_dim, dtype)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1, _size())

    def forward(self, input_: Tensor) -> Tensor:
        rows = input_ - _state["tensor"].rank() * len(self.weight)
        here = (rows >= 0) & (rows < len(self.weight))
        looked_up = F.embedding(rows.where(here, 0), self.weight) * here[..., None]
        return _ScatterSum.apply(looked_up.transpose(0, 1))


class GQAQKVColumnParallelLinear(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        init_method: Any = None,
        sequence_parallel_enabled: bool = False,
        keep_master_weight: bool = False,
        kv_size_multiplier: int = 1,
        fuse_qkv: bool = True,
    ):
        super().__init__()
        assert not bias and not gather_output and not fuse_qkv and sequence_parallel_enabled == (_size() > 1)
        assert output_sizes[1] * kv_size_multiplier % _size() == 0
        initialize_kv_group(kv_size_multiplier)
        self.weight_q = _parameter(output_sizes[0] // _size(), input_size, dtype)
        self.weight_k = _parameter(output_sizes[1] * kv_size_multiplier // _size(), input_size, dtype)
        self.weight_v = _parameter(output_sizes[1] * kv_size_multiplier // _size(), input_size, dtype)
        for name in ("bias_q", "bias_k", "bias_v"):
            self.register_parameter(name, None)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        whole = _Gather.apply(input)
        weights = (self.weight_q, _SharedGradient.apply(self.weight_k), _SharedGradient.apply(self.weight_v))
        # As in the library: the biases' gradients are this rank's own, also where ranks share a head.
        biases = (self.bias_q, self.bias_k, self.bias_v)
        projected = [F.linear(whole, weight) for weight in weights]
        return tuple(x if bias is None else x + bias for x, bias in zip(projected, biases, strict=True))


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        columns = target - _state["tensor"].rank() * logits.shape[-1]
        here = (columns >= 0) & (columns < logits.shape[-1])
        columns = columns.where(here, 0)[..., None]
        norms = [torch.empty_like(target, dtype=logits.dtype) for _ in range(_size())]
        dist.all_gather(norms, logits.logsumexp(-1), group=_state["tensor"])
        norm = torch.stack(norms).logsumexp(0)
        chosen = logits.gather(-1, columns)[..., 0] * here
        dist.all_reduce(chosen, group=_state["tensor"])
        ctx.save_for_backward((logits - norm[..., None]).exp(), columns, here)
        return norm - chosen

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        softmax, columns, here = ctx.saved_tensors
        mine = softmax.scatter_add(-1, columns, -here.to(softmax.dtype)[..., None])
        return mine * gradient[..., None], None


def parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    assert label_smoothing == 0
    return _ParallelCrossEntropy.apply(vocab_parallel_logits, target)


PARALLEL_MODULES = (ColumnParallelLinear, RowParallelLinear, ParallelEmbedding)


# ---- model and optimizer ---------------------------------------------------------------------------------------------


def neuronx_distributed_config(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    context_parallel_size: int = 1,
    pipeline_config: Any = None,
    optimizer_config: Any = None,
    activation_checkpoint_config: Any = None,
    pad_model: bool = False,
    sequence_parallel: bool = False,
    model_init_config: Any = None,
    lora_config: Any = None,
    mixed_precision_config: Any = None,
    sequential_move_factor: int = 11,
    lnc_size: int = 1,
) -> dict[str, Any]:
    assert expert_parallel_size == context_parallel_size == 1 and (pipeline_config is None) == (
        pipeline_parallel_size == 1
    )
    assert set(optimizer_config) == {"zero_one_enabled", "grad_clipping", "max_grad_norm"}
    assert not optimizer_config["zero_one_enabled"], "no XLA device here"
    assert set(model_init_config) == {"meta_device_init", "param_init_fn"} and model_init_config["meta_device_init"]
    assert sequence_parallel == (tensor_parallel_size > 1)
    initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size, pipeline_model_parallel_size=pipeline_parallel_size
    )
    return {
        "pipeline_config": pipeline_config,
        "optimizer_config": optimizer_config,
        "activation_checkpoint_config": activation_checkpoint_config,
        "sequence_parallel": sequence_parallel,
        "model_init_config": model_init_config,
    }


class NxDModel(nn.Module):
    def __init__(self, module: nn.Module, nxd_config: Any):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def run_train(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.run_train(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def run_eval(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.run_eval(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def original_module(self) -> Any:
        return self.module.original_torch_module if isinstance(self.module, NxDPPModel) else self.module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.module, NxDPPModel):
            return self.module.local_named_parameters()
        return self.module.named_parameters(*args, **kwargs)


def initialize_parallel_model(
    nxd_config: Any, model_fn: Any, include_buffers: bool = False, *model_args: Any, **model_kwargs: Any
) -> NxDModel:
    """As the library: shared parameters are taken apart, and marks on parameters are kept."""
    model = model_fn(*model_args, **model_kwargs)
    local: nn.Module = model
    if nxd_config["pipeline_config"] is not None:
        model = NxDPPModel(model, use_model_wrapper=True, **nxd_config["pipeline_config"])
        (local,) = model.local_stage_modules
    for module in local.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            filled = nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"))
            vars(filled).update(vars(parameter))
            setattr(module, leaf, filled)
        with torch.no_grad():
            nxd_config["model_init_config"]["param_init_fn"](module, torch.device("cpu"))
    for kind in nxd_config["activation_checkpoint_config"] or ():
        for module in [module for module in local.modules() if type(module) is kind]:
            plain = module.forward
            module.forward = lambda *a, plain=plain, **k: checkpoint(plain, *a, use_reentrant=False, **k)
    return NxDModel(model, nxd_config)


class NxDOptimizer:
    def __init__(self, optimizer: Any, nxd_config: Any):
        self.optimizer = optimizer
        self.nxd_config = nxd_config
        self.grad_norm: Tensor = torch.zeros(1)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        square = torch.zeros(1)
        for parameter in parameters:
            if self.nxd_config["sequence_parallel"] and getattr(parameter, "sequence_parallel_enabled", False):
                dist.all_reduce(parameter.grad, group=_state["tensor"])
            parameter.grad /= get_data_parallel_size()
            dist.all_reduce(parameter.grad, group=_state["data"])
            if not getattr(parameter, "shared", False):
                whole = not getattr(parameter, "tensor_model_parallel", False)
                square += parameter.grad.square().sum() / (_size() if whole else 1)
        dist.all_reduce(square, group=_state["tensor"])
        dist.all_reduce(square, group=_state["pipeline"])
        self.grad_norm = square.sqrt()
        scale = (self.nxd_config["optimizer_config"]["max_grad_norm"] / (self.grad_norm + 1e-6)).clamp(max=1)
        for parameter in parameters:
            parameter.grad *= scale
        self.optimizer.step()


def initialize_parallel_optimizer(nxd_config: Any, optimizer_class: Any, parameters: Any, **defaults: Any) -> Any:
    return NxDOptimizer(optimizer_class(parameters, **defaults), nxd_config)


# ---- as modules ------------------------------------------------------------------------------------------------------

# Module → what the engine takes from it.
SURFACE: dict[str, tuple[Any, ...]] = {
    "neuronx_distributed": (neuronx_distributed_config, initialize_parallel_model, initialize_parallel_optimizer),
    "neuronx_distributed.utils": (),
    "neuronx_distributed.modules": (),
    "neuronx_distributed.modules.qkv_linear": (GQAQKVColumnParallelLinear,),
    "neuronx_distributed.trainer": (),
    "neuronx_distributed.trainer.model": (NxDModel,),
    "neuronx_distributed.pipeline": (NxDPPModel,),
    "neuronx_distributed.parallel_layers": (
        *(ColumnParallelLinear, RowParallelLinear, ParallelEmbedding),
        *(parallel_cross_entropy, set_tensor_model_parallel_attributes),
    ),
    "neuronx_distributed.parallel_layers.parallel_state": (
        *(initialize_kv_group, get_kv_shared_replica_groups, destroy_model_parallel),
        *(get_data_parallel_rank, get_data_parallel_size),
        *(get_tensor_model_parallel_rank, get_tensor_model_parallel_size),
        *(get_pipeline_model_parallel_rank, get_pipeline_model_parallel_size),
    ),
}


def install(*, platform: str) -> None:
    """Puts the fake where `import neuronx_distributed` finds it."""
    _state["platform"] = platform
    for name, parts in SURFACE.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update({part.__name__: part for part in parts})
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    vars(sys.modules["neuronx_distributed.utils"]).update(
        get_device=lambda: torch.device("cpu"), mark_step=lambda: None
    )
