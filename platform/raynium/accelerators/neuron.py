"""Trainium2 and later through TorchNeuron: torch's own device "neuron", one logical NeuronCore per rank.

Needs torch-neuronx 2.13 or later from AWS's package repository. What it asks of us, and what goes wrong otherwise:

- The process group comes first: it starts the runtime, and fails if anything touched the device before.
- The device is the bare "neuron". On rank r the only index there is r, so "neuron:0" fails on all others.
- There is no float64: such an operation runs on the CPU, unless it fails. Hence `sum_dtype`.
"""

import ipaddress
import logging
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from raynium.accelerators.base import CompileCache, Place
from raynium.accelerators.cores import VISIBLE_CORES, rank_cores
from raynium.accelerators.cpu import is_loopback
from raynium.accelerators.timeouts import EXECUTION_TIMEOUT_SECONDS
from raynium.config.local_folders import cache_home
from raynium.errors import LaunchError
from raynium.hardware.catalog import Instance

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Here the kernel lists network cards with remote memory access.
EFA_FOLDER = Path("/sys/class/infiniband")
LNC = "NEURON_LOGICAL_NC_CONFIG"
NEFF_CACHE = "TORCH_NEURONX_NEFF_CACHE_DIR"
# Below those that Linux gives to outgoing connections (32768 and up).
COLLECTIVES_PORTS = range(20000, 30000)
ROUTES = Path("/proc/net/route")
# AWS's, on Trainium2 and later; Trainium1 has no such thing.
DEFAULT_LNC = "2"

# AWS Neuron docs, about-neuron/arch/neuron-hardware, read 2026-11-23: dense FP32 of a chip.
_FP32_FLOPS_PER_CHIP = {"trainium1": 47.5e12, "trainium2": 181e12}


class NeuronAccelerator:
    """instance: the machine's catalogue entry; None if it has none (not EC2, or newer than the catalogue)."""

    name = "neuron"
    device_type = "neuron"
    process_group_backend = "neuron"
    compile_backend = "neuron"
    sum_dtype = "float32"
    static_shapes = True

    def __init__(self, instance: Instance | None = None):
        self._instance = instance
        self._fallbacks_told: set[str] = set()

    def environment(self, place: Place) -> dict[str, str]:
        cores = rank_cores(place.inherited.get(VISIBLE_CORES), local_world_size=place.local_world_size)
        cache = default_cache(place.inherited)
        variables = {
            # The runtime: the one core this process owns. torch-neuronx keeps it, and insists that it is one.
            VISIBLE_CORES: str(cores[place.local_rank]),
            # The runtime, and torch-neuronx for the compiler's option: how many physical cores a logical one is.
            LNC: place.inherited.get(LNC, DEFAULT_LNC),
            # torch-neuronx, at compilation: where executables are kept between ranks, generations and runs. Its
            # default is in /tmp, which a reboot empties.
            NEFF_CACHE: place.inherited.get(NEFF_CACHE, cache),
            # torch-neuronx, at each operation: one that Neuron has but that fails is an error, not a slow CPU run.
            "TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS": "1",
        }
        variables |= runtime_environment(place)
        if "FI_PROVIDER" not in variables:
            # torch-neuronx, at the first collective: without an EFA card it otherwise waits for one, for ever.
            variables["TORCH_NEURONX_ENABLE_HOST_CC"] = "1"
        return variables

    def compile_cache(self, inherited: Mapping[str, str]) -> CompileCache | None:
        if self._instance is None:
            # Nobody can say which other machines its executables would fit.
            return None
        key = compile_key(self._instance, inherited)
        return CompileCache(NEFF_CACHE, key, "folder", suffix=".neff")

    def set_device(self, local_rank: int) -> "torch.device":
        import torch

        # The first registers the device and does not touch it, the second registers the process group.
        try:
            import torch_neuronx  # pyright: ignore[reportMissingImports]
            import torch_neuronx.distributed  # noqa: F401  # pyright: ignore
        except ImportError as error:
            raise LaunchError(
                f"torch_neuronx cannot be imported ({error}): install raynium[neuron] from AWS's package repository, "
                "in the torch-neuronx family of this torch "
                f"({torch.__version__}); `raynium doctor` says what is there"
            ) from error
        return torch.device("neuron")

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        if self._instance is not None:
            return memory_bytes_of(self._instance)
        import torch

        return torch.get_device_module("neuron").get_device_properties(local_rank).total_memory

    def peak_flops(self, dtype: str) -> float | None:
        return peak_flops_of(self._instance, dtype)

    def metrics(self) -> dict[str, float]:
        import torch_neuronx  # pyright: ignore[reportMissingImports]

        fallbacks = set(torch_neuronx.get_fallback_ops())
        if new := sorted(fallbacks - self._fallbacks_told):
            self._fallbacks_told |= fallbacks
            logger.warning("ran on the CPU, since TorchNeuron has no such operation: %s", ", ".join(new))
        return {"device/fallback_operators": float(len(fallbacks))}


def default_cache(inherited: Mapping[str, str]) -> str:
    """Where executables are kept if nobody says so; with a store behind it node/compile_cache.py chooses.

    torch-neuronx names them after the graph and the compiler's flags, of which the size of a logical core is none; the
    runtime loads none of another size.
    """
    return str(cache_home() / "neff" / f"lnc-{inherited.get(LNC, DEFAULT_LNC)}")


def compile_key(instance: Instance, inherited: Mapping[str, str]) -> str:
    """Of the executables that this node makes: compiler, torch, cores per logical core and chip."""
    versions = "+".join(f"{name}-{metadata.version(name)}" for name in ("neuronx-cc", "torch"))
    lnc = "1" if instance.chip == "trainium1" else inherited.get(LNC, DEFAULT_LNC)
    return f"{versions}+lnc-{lnc}+{instance.chip}"


def runtime_environment(place: Place) -> dict[str, str]:
    """What the Neuron runtime itself reads, under torch-neuronx and torch-xla alike."""
    host = f"[{place.master_host}]" if ":" in place.master_host else place.master_host
    variables = {
        # The runtime, when collectives start: where rank 0's root communicator listens. Ray sets none, and then more
        # than one node fails in Nrt::BuildGlobalComm (ray issue 65070).
        "NEURON_RT_ROOT_COMM_ID": f"{host}:{collectives_port(place.master_port)}",
        # The runtime, at each execution: seconds until it is given up.
        "NEURON_RT_EXEC_TIMEOUT": str(EXECUTION_TIMEOUT_SECONDS),
        # neuron-monitor and neuron-top: whose process this is; up to 255 characters.
        "NEURON_PROCESS_TAG": f"{place.run_name}/rank-{place.rank:05d}",
    }
    if EFA_FOLDER.is_dir() and any(EFA_FOLDER.iterdir()):
        # libfabric, under the runtime's collectives between nodes. On a node without EFA cards they would fail.
        variables |= {
            "FI_PROVIDER": "efa",
            # From card to accelerator memory, past the CPU. Ranks are forks, of which kernels before 5.15 must be told.
            "FI_EFA_USE_DEVICE_RDMA": "1",
            "FI_EFA_FORK_SAFE": "1",
        }
    if place.world_size > place.local_world_size and (interface := interface_towards(place.master_host)) is not None:
        # The runtime's collectives, and NCCL's bootstrap code in them: the interface that the ranks meet on. With
        # several they may pick another (a container's bridge), where no other node answers (ray issue 65070).
        variables |= {
            name: place.inherited.get(name, interface) for name in ("CCOM_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        }
    return variables


def interface_towards(host: str, routes: str | None = None) -> str | None:
    """The interface of this node's way to an IPv4 address, where the node has a choice of several; else None.

    routes: the text of /proc/net/route; None: this machine's. Interfaces that only carry EFA have no route.
    """
    if routes is None:
        routes = ROUTES.read_text(encoding="utf-8") if ROUTES.is_file() else ""
    try:
        address = int(ipaddress.IPv4Address(host))
    # IPv6, whose routes are elsewhere, or a name.
    except ValueError:
        return None
    if is_loopback(host):
        return None
    interfaces, ways = set(), []
    for line in routes.splitlines()[1:]:
        name, destination, _gateway, flags, _refs, _use, metric, mask, *_ = line.split()
        is_up = int(flags, 16) & 1
        if not is_up:
            continue
        interfaces.add(name)
        network, bits = (int.from_bytes(bytes.fromhex(each), sys.byteorder) for each in (destination, mask))
        if address & bits == network:
            # The narrowest network comes first, then the least metric.
            ways.append((-bits, int(metric), name))
    return min(ways)[2] if ways and len(interfaces) > 1 else None


def collectives_port(master_port: int) -> int:
    """The root communicator's port: another one than the rendezvous', and new in every generation as that is.

    Every node must come to the same number, so it is made of the one number that all are told; node/ports.py makes
    sure that it is free on the root's node.
    """
    return COLLECTIVES_PORTS[master_port % len(COLLECTIVES_PORTS)]


def memory_bytes_of(instance: Instance) -> int:
    """Of one logical core."""
    return int(instance.memory_gib_per_core * 2**30 * _core_size(instance))


def peak_flops_of(instance: Instance | None, dtype: str) -> float | None:
    """Of one logical core."""
    if instance is None:
        return None
    bfloat16 = instance.bf16_flops_per_core
    float32 = _FP32_FLOPS_PER_CHIP[instance.chip] * instance.chips / instance.cores
    return {"bfloat16": bfloat16, "float32": float32}[dtype] * _core_size(instance)


def _core_size(instance: Instance) -> float:
    """This rank's logical core in units of the catalogue's, which assumes the default LNC."""
    return 1.0 if instance.chip == "trainium1" else int(os.environ.get(LNC, DEFAULT_LNC)) / int(DEFAULT_LNC)
