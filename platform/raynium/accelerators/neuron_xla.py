"""Trainium through torch-xla: what neuronx-distributed trains on, and the only way on Trainium1.

Needs torch 2.9 with torch-neuronx 2.9, torch-xla and libneuronxla from AWS's package repository. torch-xla reads its
place from the environment when it is imported, and only if it believes that torchrun started it.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from raynium.accelerators.base import CompileCache, Place
from raynium.accelerators.cores import VISIBLE_CORES, rank_cores
from raynium.accelerators.neuron import (
    DEFAULT_LNC,
    LNC,
    compile_key,
    memory_bytes_of,
    peak_flops_of,
    runtime_environment,
)
from raynium.config.local_folders import cache_home
from raynium.errors import LaunchError
from raynium.hardware.catalog import Instance

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CACHE_URL = "NEURON_COMPILE_CACHE_URL"
# Of a core of Trainium1, which has least.
_SMALLEST_MEMORY_BYTES = 16 * 2**30


class NeuronXlaAccelerator:
    """instance: the machine's catalogue entry; None if it has none."""

    name = "neuron_xla"
    device_type = "xla"
    process_group_backend = "xla"
    # Not used: torch-xla compiles whatever it is given.
    compile_backend = "openxla"
    sum_dtype = "float32"
    static_shapes = True

    def __init__(self, instance: Instance | None = None):
        self._instance = instance

    def environment(self, place: Place) -> dict[str, str]:
        cores = rank_cores(place.inherited.get(VISIBLE_CORES), local_world_size=place.local_world_size)
        has_lnc = self._instance is not None and self._instance.chip != "trainium1"
        lnc = place.inherited.get(LNC, DEFAULT_LNC)
        # A transformer that is trained over many cores: fuses and schedules for that. Products of float32 in float32:
        # the compiler's default rounds them to bfloat16 first (AWS's reference of its options), unasked. And a failed
        # compilation, which the cache keeps too, is tried again: it may have been a full disk.
        flags = "--model-type=transformer --distribution-strategy=llm-training --auto-cast=none"
        flags += " --retry_failed_compilation"
        if has_lnc:
            # The runtime loads no executable that is made for another.
            flags += f" --logical-nc-config={lnc}"
        variables = {
            # torch_xla/_internal/neuron.py, at import: any value makes it read RANK, LOCAL_RANK and so on, and tell
            # them to the plugin. torch.distributed too; it must be the same on all ranks.
            "TORCHELASTIC_RUN_ID": f"{place.run_name}-{place.master_port}",
            # The same: the node's cores in numeric order, as many as ranks; it picks this rank's and drops the others.
            VISIBLE_CORES: ",".join(map(str, cores)),
            # torch-xla, at the first use: without it a missing plugin means a quiet run on the CPU.
            "PJRT_DEVICE": "NEURON",
            # The compiler's options, and those of its wrapper in libneuronxla.
            "NEURON_CC_FLAGS": place.inherited.get("NEURON_CC_FLAGS", flags),
            # libneuronxla: where executables are kept; a folder, or an s3:// URL that nodes share.
            CACHE_URL: place.inherited.get(CACHE_URL, default_cache()),
        }
        if has_lnc:
            # The runtime: how many physical cores a logical one is.
            variables[LNC] = lnc
        return variables | runtime_environment(place)

    def compile_cache(self, inherited: Mapping[str, str]) -> CompileCache | None:
        if self._instance is None:
            # Nobody can say which other machines its executables would fit.
            return None
        return CompileCache(CACHE_URL, compile_key(self._instance, inherited), "url", suffix=".neff")

    def set_device(self, local_rank: int) -> "torch.device":
        try:
            import torch_xla  # pyright: ignore[reportMissingImports]
            import torch_xla.distributed.xla_backend  # pyright: ignore[reportMissingImports]
            import torch_xla.runtime  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise LaunchError(
                f"torch_xla cannot be imported ({error}): install raynium[neuron-xla] from AWS's package repository; "
                "`raynium doctor` says what is there"
            ) from error
        kind = torch_xla.runtime.device_type()
        if kind != "NEURON":
            raise LaunchError(
                f"torch-xla took device {kind!r} and not 'NEURON', which would train on this machine's CPU: install "
                "libneuronxla from AWS's package repository, and unset PJRT_DEVICE where it is set"
            )
        if local_rank == 0:
            _clear_cache_locks()
        return torch_xla.device()

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        return memory_bytes_of(self._instance) if self._instance is not None else _SMALLEST_MEMORY_BYTES

    def peak_flops(self, dtype: str) -> float | None:
        return peak_flops_of(self._instance, dtype)

    def metrics(self) -> dict[str, float]:
        import torch_xla.debug.metrics  # pyright: ignore[reportMissingImports]

        compiles = torch_xla.debug.metrics.counter_value("UncachedCompile")
        # Count, sum in ns and samples; None before the first.
        times = torch_xla.debug.metrics.metric_data("CompileTime")
        return {"compile/graphs": float(compiles or 0), "compile/seconds": times[1] / 1e9 if times else 0.0}


def default_cache() -> str:
    """Where executables are kept if nobody says so; in a run node/compile_cache.py does."""
    return str(cache_home() / "neuron-compile-cache")


def _clear_cache_locks() -> None:
    """Removes what compilations that were killed left in the cache: whoever needs their graphs waits for them for ever.

    In-place restarts, and a preflight at its end, kill ranks while they compile. The first rank of each node comes here
    before the process group is made, and no rank of the group compiles earlier. Another run that compiles into the same
    cache at this moment loses its lock: the same graph may be compiled twice.
    """
    try:
        from libneuronxla.neuron_cc_cache import (  # pyright: ignore[reportMissingImports]
            CacheUrl,
            create_compile_cache,
        )

        create_compile_cache(CacheUrl.get_cache_url()).clear_locks()
    # AWS documents the command that does this, not the function: it may raise anything.
    except Exception as error:
        logger.warning("locks of killed compilations stay in the cache, and may keep ranks waiting: %r", error)
