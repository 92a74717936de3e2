"""NVIDIA GPUs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raynium.accelerators.base import CompileCache, Place
from raynium.errors import LaunchError

if TYPE_CHECKING:
    import torch

# Dense FLOP/s without sparsity, from NVIDIA's data sheets; float32 is plain FP32 (TF32 is off by torch's default).
# The first name found within torch's device name counts, so a longer name stands before its prefix.
_PEAK_FLOPS = {
    "B200": {"bfloat16": 2250e12, "float32": 75e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float32": 30.3e12},
}


class CudaAccelerator:
    """One rank per GPU: local rank i takes GPU i of those visible."""

    name = "cuda"
    device_type = "cuda"
    process_group_backend = "nccl"
    compile_backend = "inductor"
    sum_dtype = "float64"
    static_shapes = False

    def environment(self, place: Place) -> dict[str, str]:
        return {
            # cuBLAS, when its first handle is made: fixed workspaces, so that equal inputs give equal bits and a
            # resumed run repeats the losses of an uninterrupted one.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            # torch, when the first process group starts: how many collectives it remembers, for a run that hangs. To
            # write out its default of 2,000 takes two seconds.
            "TORCH_FR_BUFFER_SIZE": "128",
        }

    def compile_cache(self, inherited: Mapping[str, str]) -> CompileCache | None:
        # Inductor's holds pickles, which run code when they are read: not from a store.
        return None

    def set_device(self, local_rank: int) -> "torch.device":
        import torch

        visible = torch.cuda.device_count()
        if local_rank >= visible:
            raise LaunchError(
                f"local rank {local_rank} needs GPU {local_rank}, but torch {torch.__version__} sees {visible}: set "
                "cluster.ranks_per_node to the number of GPUs, check CUDA_VISIBLE_DEVICES and the driver (nvidia-smi), "
                "and that this torch is a CUDA build"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        import torch

        return torch.cuda.get_device_properties(local_rank).total_memory

    def peak_flops(self, dtype: str) -> float | None:
        import torch

        return peak_flops_of(torch.cuda.get_device_name(), dtype)

    def metrics(self) -> dict[str, float]:
        return {}


def peak_flops_of(device_name: str, dtype: str) -> float | None:
    """device_name: torch's, e.g. "NVIDIA H100 80GB HBM3". None if the table does not have it."""
    words = f" {device_name.removeprefix('NVIDIA ').replace('-', ' ')} "
    for name, peaks in _PEAK_FLOPS.items():
        if f" {name} " in words:
            return peaks[dtype]
    return None
