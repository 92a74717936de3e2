"""A CPU twin of the closed packages under neuronx-distributed, so that its real, unchanged code runs in tests.

neuronx-distributed imports `torch_neuronx`, the compiler and the kernel libraries, none of which exist off AWS's own
package repository, and torch-xla, whose last release belongs to torch 2.9. `install()` puts stand-ins of ours into
`sys.modules`. What training without kernels calls is written out: collectives over gloo, ranks, the platform's name.
Everything else is inert: it can be imported, subclassed and called, and does nothing.

`install(xla=False)`: torch-xla is replaced as well; NxD runs in its CPU mode. Any torch.
`install(xla=True)`: the real torch-xla computes on its CPU device, and its collectives go over gloo. torch 2.9 only.
Call it once in a process, before neuronx-distributed is imported.
"""

# pyright: reportMissingImports=false

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_CLOSED = {"torch_neuronx", "neuronxcc", "nki", "nkilib", "nkilib_src", "libneuronxla"}
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

Groups = Sequence[Sequence[int]] | None  # each rank is in one of them; None: one group of all ranks


class _InertMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _inert(name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


def _inert(name: str) -> Any:
    return _InertMeta(name, (), {})


class _InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _inert(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of the given packages, inert unless `parts` has something for it."""

    def __init__(self, packages: set[str], parts: dict[str, dict[str, Any]]):
        self._packages = packages
        self._parts = parts

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(self._parts.get(module.__name__, {}))


def install(*, xla: bool, platform: str = "trn1") -> None:
    """See the module. platform: what `torch_neuronx` says the machine is; it settles which ranks share a head."""
    packages = set(_CLOSED)
    if importlib.util.find_spec("tenacity") is None:
        packages.add("tenacity")  # retries of S3, which no test of ours uses
    parts: dict[str, dict[str, Any]] = {
        "torch_neuronx": {"__version__": "2.9.0"},
        "torch_neuronx.utils": {"get_platform_target": lambda: platform},
    }
    if xla:
        os.environ["NXD_CPU_MODE"] = "0"
        _collectives_of_real_xla()
    else:
        packages |= {"torch_xla"}
        parts |= _stand_in_for_torch_xla()
        os.environ["NXD_CPU_MODE"] = "1"
        os.environ["PJRT_DEVICE"] = "NEURON"  # NxD then asks torch-xla, and not an environment of old, for local ranks
    sys.meta_path.insert(0, _Finder(packages, parts))
    # NxD 0.18 cannot be imported beside transformers 5, which has lost a module that it asks for; it needs neither.
    sys.modules["transformers"] = None  # pyright: ignore[reportArgumentType]
    vars(torch.classes)["neuron"] = _inert("neuron")  # NxD's tracer looks at it when it is imported


# ---- collectives by lists of ranks, as torch-xla takes them ----------------------------------------------------------

_process_groups: dict[tuple[int, ...], Any] = {}


def _group_of_this_rank(groups: Groups) -> Any:
    ranks = next((tuple(group) for group in groups or [] if dist.get_rank() in group), None)
    ranks = tuple(range(dist.get_world_size())) if ranks is None else ranks
    if ranks not in _process_groups:
        # Not by `new_group`: it needs all ranks of the world, or as many groups before it on each of these ranks, and
        # the stages of a pipeline differ in that. With torch-xla it makes every group an XLA one, too.
        store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportAttributeAccessIssue]
        store = dist.PrefixStore(f"twin-{ranks}", store)  # pyright: ignore[reportPrivateImportUsage]
        rank = ranks.index(dist.get_rank())
        _process_groups[ranks] = dist.ProcessGroupGloo(store, rank, len(ranks), timedelta(minutes=5))  # pyright: ignore
    return _process_groups[ranks]


def _reduced(kind: str, value: Any, group: Any) -> torch.Tensor:
    here = value.detach().to("cpu", copy=True).contiguous()
    options = dist.AllreduceOptions()  # pyright: ignore[reportPrivateImportUsage]
    options.reduceOp = _REDUCTIONS[kind]  # pyright: ignore[reportAttributeAccessIssue]
    group.allreduce([here], options).wait()
    return here


def _all_reduce(kind: str, inputs: Any, scale: float = 1.0, groups: Groups = None, pin_layout: bool = True) -> Any:
    """In place, as torch-xla's is for a list of tensors."""
    tensors = inputs if isinstance(inputs, list) else [inputs]
    for tensor in tensors:
        here = _reduced(kind, tensor, _group_of_this_rank(groups))
        tensor.data.copy_(here * scale if scale != 1.0 else here)
    return inputs


def _all_gather(value: Any, dim: int = 0, groups: Groups = None, output: Any = None, pin_layout: bool = True) -> Any:
    group = _group_of_this_rank(groups)
    here = value.detach().cpu().contiguous()
    parts = [torch.empty_like(here) for _ in range(group.size())]
    group.allgather([parts], [here]).wait()
    whole = torch.cat(parts, dim=dim).to(value.device)
    return whole if output is None else output.copy_(whole)


def _reduce_scatter(
    reduce_type: str,
    input: Any,
    scale: float,
    scatter_dim: int,
    shard_count: int,
    groups: Groups = None,
    output: Any = None,
    pin_layout: bool = True,
) -> Any:
    group = _group_of_this_rank(groups)
    assert shard_count == group.size()
    here = _reduced(reduce_type, input, group)
    mine = here.chunk(shard_count, dim=scatter_dim)[group.rank()].contiguous()
    mine = (mine * scale if scale != 1.0 else mine).to(input.device)
    return mine if output is None else output.copy_(mine)


def _bucketized(collective: Any) -> Any:
    """The variant for many tensors that returns a list of results."""

    def run(*arguments: Any, bucket_cap_mb: int = 0, **named: Any) -> list[Any]:
        *kind, tensors = arguments
        return [collective(*kind, tensor, **named) for tensor in tensors]

    return run


def _barrier(tag: str, *_: Any, **__: Any) -> None:
    _group_of_this_rank(None).barrier().wait()


# ---- the two kinds of torch-xla --------------------------------------------------------------------------------------


class _NoZeroRedundancyOptimizer(torch.optim.Optimizer):
    """Real torch-xla's refuses anything but XLA tensors; so does this, and NxD's subclass only has to exist."""

    def __init__(self, *_: Any, **__: Any):
        raise AssertionError("ZeRO-1 needs an XLA device")


class _Arena:
    """torch-xla's walk over nested state; there are no XLA tensors here to move."""

    def __init__(self, *_: Any):
        pass

    def transform(self, data: Any) -> Any:
        return data


def _runtime() -> dict[str, Any]:
    """torch_xla.runtime: one process per device, all on one machine."""
    return {
        "global_ordinal": lambda: dist.get_rank(),
        "local_ordinal": lambda: dist.get_rank(),
        "world_size": lambda: dist.get_world_size(),
        "global_device_count": lambda: dist.get_world_size(),
        "local_process_count": lambda: dist.get_world_size(),
    }


def _stand_in_for_torch_xla() -> dict[str, dict[str, Any]]:
    from torch.utils.checkpoint import checkpoint

    return {
        "torch_xla": {"__version__": "2.9.0"},
        "torch_xla.core.xla_model": {
            **{"REDUCE_SUM": "sum", "REDUCE_MAX": "max", "REDUCE_MIN": "min"},
            "xla_device": lambda: torch.device("cpu"),
            "mark_step": lambda: None,
            "rendezvous": _barrier,
            "is_master_ordinal": lambda local=True: dist.get_rank() == 0,
            "get_ordinal": lambda: dist.get_rank(),
            "all_reduce": _all_reduce,
            "all_gather": _all_gather,
            "reduce_scatter": _reduce_scatter,
            "ToXlaTensorArena": _Arena,
        },
        "torch_xla.runtime": _runtime(),
        "torch_xla.utils.checkpoint": {"checkpoint": checkpoint},
        "torch_xla.distributed.zero_redundancy_optimizer": {"ZeroRedundancyOptimizer": _NoZeroRedundancyOptimizer},
    }


def _collectives_of_real_xla() -> None:
    """torch-xla's CPU client knows one process only, and its collectives would quietly return what they were given."""
    import torch_xla.core.xla_env_vars as xla_env_vars
    import torch_xla.core.xla_model as xla_model
    import torch_xla.runtime as runtime

    xla_model.all_reduce = _all_reduce
    xla_model.all_gather = _all_gather
    xla_model.reduce_scatter = _reduce_scatter
    xla_model.all_gather_bucketized = _bucketized(_all_gather)
    xla_model.reduce_scatter_bucketized = _bucketized(_reduce_scatter)
    xla_model.rendezvous = _barrier
    for name, function in _runtime().items():
        setattr(runtime, name, function)
    # Off Trainium NxD divides by a variable whose name torch-xla 2.9 no longer has: the number of hosts.
    xla_env_vars.HOST_WORLD_SIZE = "RAYNIUM_TWIN_HOSTS"
    os.environ["RAYNIUM_TWIN_HOSTS"] = "1"
    os.environ["PJRT_DEVICE"] = "CPU"
