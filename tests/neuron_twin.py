"""A twin of TorchNeuron for machines without Trainium: torch's device "neuron", computed on the CPU.

Not a mock: real tensors on torch's PrivateUse1 device run the unchanged training path, through autograd, FSDP2, DTensor
and torch.compile. `write_site()` makes a folder for PYTHONPATH that holds a `torch_neuronx` made of this module,
package metadata, and a device list, so that a process finds what it would find on a trn2.3xlarge.

How it works. A tensor of the twin has real memory of the CPU, taken over through DLPack with its device field
changed, so `data_ptr`, views, version counters and storages are torch's own. One Python function stands in for every
operation that PrivateUse1 lacks: it looks at the same memory as CPU tensors and calls the CPU's kernel.

The rules of the real one that it enforces (read in torch-neuronx's source and AWS's documentation, 2026-11-23):
- a rank that uses the device before `init_process_group` fails, and so does `init_process_group` after a use;
- a process owns one core (NEURON_RT_VISIBLE_CORES), and the root communicator has an address;
- the device's index is the local rank, so a name with a number in it ("neuron:0") fails;
- float64 and operations of `NOT_ON_NEURON` run "on the CPU" and are counted by `get_fallback_ops()`;
- `torch.compile(backend="neuron")` refuses dynamic shapes; every graph is counted by `get_dynamo_metrics()`, and a file
  of its own in TORCH_NEURONX_NEFF_CACHE_DIR stands for its executable;
- `barrier()` of a group of one raises NotImplementedError.

What it cannot show: speed, memory (FSDP's freed storage stays, since Python cannot resize a PrivateUse1 storage),
numerics of the hardware, and the index itself: torch's Python hook knows device 0 only, so the tensors of rank 3 say
neuron:0 and not neuron:3.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import os
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    ReduceScatterOptions,
    _create_work_from_future,
)
from torch.utils._pytree import tree_map

# A folder: each rank leaves its Neuron environment in rank-N.json, and the code of each graph in graph-N-I.txt.
RECORD_VARIABLE = "NEURON_TWIN_RECORD"
NOT_ON_NEURON = {"aten::normal_", "aten::uniform_"}  # seen to fall back (community notes on the beta)
NRT_VARIABLES = ("NEURON_", "TORCH_NEURONX_", "FI_", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")

_KDL_CPU, _KDL_EXT_DEV = 1, 12  # dlpack.h
_CPU_KEY = torch._C.DispatchKey.CPU


class _State:
    runtime_started = False
    registered = False
    group_registered = False


_fallback_ops: dict[str, int] = {}
_executed_ops: dict[str, int] = {}
_graphs: list["GraphMetrics"] = []


class GraphMetrics(NamedTuple):
    """One compiled graph, as `torch_neuronx.get_dynamo_metrics()` tells of it."""

    graph_name: str
    graph_node_count: int
    input_shapes: tuple[tuple[int, ...], ...]


def get_fallback_ops() -> list[str]:
    return list(_fallback_ops)


def get_executed_ops() -> list[str]:
    return list(_executed_ops)


def clear_op_tracking() -> None:
    _fallback_ops.clear()
    _executed_ops.clear()


def get_dynamo_metrics() -> list[GraphMetrics]:
    return list(_graphs)


def is_neuron_runtime_initialized() -> bool:
    return _State.runtime_started


# ---- Memory: the same bytes as a tensor of the CPU and as one of the twin --------------------------------------------


class _DLDevice(ctypes.Structure):
    """The head of dlpack.h's DLTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _aliased(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor)
    _DLDevice.from_address(_capsule_pointer(capsule, b"dltensor")).device_type = device_type
    return torch._C._from_dlpack(capsule)


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The twin's tensor, seen by the CPU."""
    return _aliased(tensor.detach(), _KDL_CPU) if tensor.device.type == "neuron" else tensor.detach()


# ---- Operations ------------------------------------------------------------------------------------------------------


def _use_device() -> None:
    if _State.runtime_started:
        return
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        raise RuntimeError(
            "the Neuron device was used before init_process_group: the process group starts the runtime and chooses "
            "this rank's core"
        )
    _State.runtime_started = True


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operation of PrivateUse1 that torch has no kernel for."""
    _use_device()
    name = op._schema.name
    if any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns):
        return op._op_dk(_CPU_KEY, *args, **kwargs)  # a view: the CPU's kernel only makes another tensor of the storage
    if name == "aten::_copy_from":
        source, target = args[:2]
        on_cpu(target).copy_(on_cpu(source))
        return target

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # ours, the CPU's

    def down(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "neuron":
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor) or value.device.type != "neuron":
            return value
        # An empty `out=` is about to be resized, which memory that was taken over cannot be.
        cpu = on_cpu(value) if value.numel() else torch.empty(value.shape, dtype=value.dtype)
        seen.append((value, cpu))
        return cpu

    def up(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for ours, cpu in seen:
            if value is cpu:  # in place, or `out=`
                return ours if ours.shape == cpu.shape else _adopt(ours, _aliased(cpu, _KDL_EXT_DEV))
        return _aliased(value, _KDL_EXT_DEV)

    cpu_args, cpu_kwargs = tree_map(down, (args, kwargs))
    _count(name, [cpu for _, cpu in seen], kwargs.get("dtype"))
    return tree_map(up, op(*cpu_args, **cpu_kwargs))


def _adopt(ours: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Gives `ours` the memory and the shape of `result`."""
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_._op_dk(_CPU_KEY, ours, result.untyped_storage(), 0, result.shape, result.stride())


def _count(name: str, tensors: list[torch.Tensor], dtype: torch.dtype | None) -> None:
    wide = dtype == torch.float64 or any(tensor.dtype == torch.float64 for tensor in tensors)
    counter = _fallback_ops if wide or name in NOT_ON_NEURON else _executed_ops
    counter[name] = counter.get(name, 0) + 1


class _BareName(torch.overrides.TorchFunctionMode):
    """Refuses "neuron:0" and any other number, in calls from the main thread: bare "neuron" is this rank's device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, str) and value.startswith("neuron:"):
                raise RuntimeError(f"invalid Neuron device {value!r}: this process has one device, named 'neuron'")
        if func is torch.Tensor.unflatten:
            func = torch.ops.aten.unflatten.int  # the method calls super(), which Dynamo cannot trace from in here
        return func(*args, **(kwargs or {}))


# ---- torch.neuron ----------------------------------------------------------------------------------------------------


class Event:
    """A point of a stream. All work is done when a call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass


class DeviceProperties(NamedTuple):
    name: str
    total_memory: int  # bytes


@contextmanager
def stream(it: Stream | None) -> Iterator[None]:
    yield


def _device_module() -> types.ModuleType:
    module = types.ModuleType("torch.neuron")
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": is_neuron_runtime_initialized,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: Stream(),
        "stream": stream,
        "get_device_properties": lambda device: DeviceProperties("trn2", 24 * 2**30),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    module.Stream, module.Event = Stream, Event  # pyright: ignore[reportAttributeAccessIssue]
    return module


def register_device() -> None:
    """What `import torch_neuronx` does: the device and the compile backend. Once in a process."""
    if _State.registered:
        return
    _State.registered = True
    from torch._dynamo import register_backend
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("neuron", _device_module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    _State.library = library  # pyright: ignore[reportAttributeAccessIssue]  # its end would take the operations back
    torch.UntypedStorage.resize_ = _resize  # pyright: ignore[reportAttributeAccessIssue]
    register_backend(_compile, name="neuron")
    _BareName().__enter__()  # for ever


_torch_resize = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """FSDP frees what it gathered by resizing to 0 and back; the twin's memory simply stays."""
    if storage.device.type != "neuron":
        return _torch_resize(storage, size)
    assert size in (0, storage.nbytes()), "a storage of the twin keeps its size"
    return storage


# ---- torch.compile(backend="neuron") ---------------------------------------------------------------------------------


def _compile(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiled(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if any(isinstance(each, torch.SymInt) for each in inputs):
            raise RuntimeError("[NCC_EMOD025] Dynamic shape is not supported: use torch.compile(dynamic=False)")
        shapes = tuple(tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor))
        if folder := os.environ.get(RECORD_VARIABLE):
            Path(folder, f"graph-{os.environ['RANK']}-{len(_graphs)}.txt").write_text(graph.code)
        _graphs.append(GraphMetrics(f"graph_{len(_graphs)}", len(graph.graph.nodes), shapes))
        _keep_executable(graph.code, shapes)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiled, bw_compiler=compiled)(graph, inputs)


def _keep_executable(code: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """As torch-neuronx does: a name by the graph, a temporary file and a rename. Its bytes are like no other's."""
    if folder := os.environ.get("TORCH_NEURONX_NEFF_CACHE_DIR"):
        name = hashlib.sha256(f"{code}{shapes}".encode()).hexdigest()
        path = Path(folder, name[:2], name[2:4], f"{name}.neff")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"tmp{os.getpid()}.neff.tmp")
            temporary.write_bytes(os.urandom(200))
            temporary.replace(path)


# ---- init_process_group("neuron") ------------------------------------------------------------------------------------


class ProcessGroupNeuron(dist.ProcessGroup):
    """Collectives of the twin's tensors: gloo's, on the same memory."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any):
        super().__init__(rank, size)
        if not dist.is_initialized():
            _start_runtime()
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)  # pyright: ignore[reportPrivateImportUsage]

    def getBackendName(self) -> str:
        return "neuron"

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    @property
    def group_name(self) -> str:
        return self._group_name

    def _get_backend(self, device: torch.device) -> "ProcessGroupNeuron":
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("neuron")]

    def _call(self, method: str, *args: Any) -> Any:
        tensors = tree_map(lambda value: on_cpu(value) if isinstance(value, torch.Tensor) else value, args)
        return getattr(self._gloo, method)(*tensors)

    def _each(self, collective: Callable[..., Any], outputs: Any, inputs: Any, opts: Any) -> Any:
        for output, input in zip(outputs, inputs, strict=True):
            collective(output, input, opts).wait()
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(outputs)
        return _create_work_from_future(done)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        return self._call("allreduce", tensors, opts or AllreduceOptions())

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> Any:
        return self._call("allreduce_coalesced", tensors, opts)

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        return self._call("broadcast", tensors, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._call("allgather", outputs, inputs, opts or AllgatherOptions())

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        return self._call("_allgather_base", output, input, opts or AllgatherOptions())

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._each(self.all_gather_single, outputs, inputs, opts)

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        return self._call("_reduce_scatter_base", output, input, opts or ReduceScatterOptions())

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._each(self.reduce_scatter_single, outputs, inputs, opts)

    def barrier(self, opts: Any = None) -> Any:
        if self.size() == 1:
            raise NotImplementedError("barrier of a group of one")
        return self._gloo.barrier()


def _start_runtime() -> None:
    """The default group's first act. Fails where the real one does; leaves a record for tests."""
    assert not _State.runtime_started, "Neuron runtime should not be initialized before the init_process_group."
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "NEURON_RT_ROOT_COMM_ID"):
        assert name in os.environ, f"{name} is not set"
    cores = os.environ["NEURON_RT_VISIBLE_CORES"]
    assert cores.isdecimal(), f"Attempted to have more than one device per process in distributed setup ({cores})"
    _State.runtime_started = True
    if os.environ.get("MASTER_ADDR", "").startswith("127."):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the twin's collectives are gloo's; see accelerators/cpu.py
    if folder := os.environ.get(RECORD_VARIABLE):
        found = {name: value for name, value in os.environ.items() if name.startswith(NRT_VARIABLES)}
        Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


def register_process_group() -> None:
    """What `import torch_neuronx.distributed` does."""
    if not _State.group_registered:
        _State.group_registered = True
        dist.Backend.register_backend("neuron", ProcessGroupNeuron, devices=["neuron"])


# ---- A machine that has it -------------------------------------------------------------------------------------------


def write_site(folder: Path, *, product_name: str = "trn2.3xlarge") -> dict[str, str]:
    """Makes `folder` a place for PYTHONPATH where processes find a Trainium2 with TorchNeuron.

    Returns the variables that a process needs: give them to it, and to nobody else.
    """
    devices = folder / "dev"
    devices.mkdir(parents=True)
    (devices / "neuron0").touch()
    (folder / "product_name").write_text(product_name + "\n")
    (folder / "sitecustomize.py").write_text(
        "import importlib\n"
        "from pathlib import Path\n"
        "detect = importlib.import_module('raynium.accelerators.detect')\n"
        f"detect.DEVICE_FOLDER = Path({str(devices)!r})\n"
        f"detect.PRODUCT_NAME = Path({str(folder / 'product_name')!r})\n"
    )
    shutil.copy(__file__, folder / "neuron_twin.py")
    package = folder / "torch_neuronx"
    (package / "distributed").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from neuron_twin import *\nfrom neuron_twin import register_device as _r\n_r()\n"
    )
    (package / "distributed/__init__.py").write_text("import neuron_twin\nneuron_twin.register_process_group()\n")
    family = ".".join(importlib.metadata.version("torch").split(".")[:2])
    for name, version in (("torch-neuronx", f"{family}.3.0"), ("neuronx-cc", "2.28.7631.0")):
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    # Of its own: executables of the twin must not get into the compile cache of whoever runs the tests.
    return {"PYTHONPATH": str(folder), "HOME": str(folder / "home")}
