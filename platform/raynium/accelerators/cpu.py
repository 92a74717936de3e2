"""The CPU twin: every code path of training, on any machine."""

import ipaddress
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raynium.accelerators.base import CompileCache, Place

if TYPE_CHECKING:
    import torch

# Of cgroup v2, as containers see it. Without a limit it says "max".
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class CpuAccelerator:
    """Ranks share the machine's cores and memory evenly."""

    name = "cpu"
    device_type = "cpu"
    process_group_backend = "gloo"
    compile_backend = "inductor"
    sum_dtype = "float64"
    static_shapes = False

    def environment(self, place: Place) -> dict[str, str]:
        variables = {
            # torch, when the first process group starts: how many collectives it remembers, for a run that hangs. To
            # write out its default of 2,000 takes two seconds.
            "TORCH_FR_BUFFER_SIZE": "128",
            # OpenMP under torch, and our own set_device: without it each rank starts a thread per core of the machine.
            "OMP_NUM_THREADS": str(max(1, usable_cores() // place.local_world_size)),
        }
        if is_loopback(place.master_host):
            # gloo, when the process group starts: by default it binds what the host's name resolves to, which on
            # laptops and in containers is often an address that nothing answers on.
            variables["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        return variables

    def compile_cache(self, inherited: Mapping[str, str]) -> CompileCache | None:
        # Inductor's holds pickles, which run code when they are read: not from a store.
        return None

    def set_device(self, local_rank: int) -> "torch.device":
        import torch

        # OpenMP reads OMP_NUM_THREADS when it is loaded, which in a forked rank was long ago, in the template.
        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return torch.device("cpu")

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        return machine_memory_bytes() // local_world_size

    def peak_flops(self, dtype: str) -> float | None:
        # It depends on vector units, clocks and neighbours, and an MFU made of a guess misleads.
        return None

    def metrics(self) -> dict[str, float]:
        return {}


def multiplies_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bfloat16 is worth it: only with matrix units (Intel AMX).

    Measured on one core with torch 2.13, 2048×384 by 384×1024, GFLOP/s: float32 143; bfloat16 1330 with AMX, 100 with
    AVX512_BF16 alone, 34 with AVX-512, 2 with AVX2 (one machine, lesser ones by ONEDNN_MAX_CPU_ISA, which torch's
    products keep to).
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if most not in ("ALL", "DEFAULT") and "AMX" not in most:
        return False
    return cpu_info.is_file() and "amx_bf16" in cpu_info.read_text(encoding="utf-8")


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine's under taskset and in many containers. macOS says none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """Physical memory, or the container's limit where that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text(encoding="utf-8").strip()) != "max":
        return min(physical, int(limit))
    return physical


def is_loopback(address: str) -> bool:
    """Whether a host name or address means this machine only. Other names are not resolved: that may block."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
