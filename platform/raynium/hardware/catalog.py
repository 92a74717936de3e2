"""The machines Raynium plans for: cores, memory, peak speed, price. A figure nobody has published is None.

The figures are rows of machines.toml. One *core* is what one rank owns: a NeuronCore of Trainium1, a logical NeuronCore
of Trainium2 and 3 (two physical cores, LNC=2, which is AWS's default), or a GPU. Memory is the nominal size: drivers
and runtimes take a little of it.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

Chip = Literal["trainium1", "trainium2", "trainium3", "a100", "h100", "h200", "b200"]
Market = Literal["on-demand", "spot", "capacity-block"]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One EC2 instance type.

    accelerators: values of cluster.accelerator that can drive it. TorchNeuron (`neuron`) runs on Trainium2 and later
        only; torch-xla (`neuron_xla`) on both.
    core_blocks: how many cores of one instance a job may take. The collectives' hardware routes accept no other
        count, and a block of n begins at a multiple of n. (TorchNeuron's all-to-all is narrower still: 4, 8, 16 or
        a multiple of 32 ranks.)
    unproven_blocks: counts that nobody has reported to run, nor to be refused.
    bf16_flops_per_core: dense peak, FLOP/s: the denominator of MFU.
    efa_gbps: network between instances with EFA; 0 where the type has none.
    efa_interfaces: network cards that take an EFA interface, with the indices 0, 1, …; a cluster file asks for each.
    markets: how EC2 sells the type. Selling is not having: on demand, a large type may be refused for want of capacity.
    usd_per_hour: on demand, Linux.
    sources: figure → where and when it was read; for an unknown figure: why.
    """

    name: str
    chip: Chip
    chips: int
    cores: int
    core_blocks: tuple[int, ...]
    accelerators: tuple[str, ...]
    memory_gib_per_core: float
    bf16_flops_per_core: float
    vcpus: int
    ram_gib: int
    efa_gbps: float | None = None
    efa_interfaces: int | None = None
    markets: tuple[Market, ...] | None = None
    usd_per_hour: float | None = None
    sources: Mapping[str, str]
    name_of_core: str = "NeuronCore"
    unproven_blocks: tuple[int, ...] = ()

    @property
    def is_neuron(self) -> bool:
        return self.chip.startswith("trainium")


@dataclass(frozen=True)
class CpuInstance:
    """An EC2 type without an accelerator that a cluster may train on with CPU ranks."""

    name: str
    vcpus: int
    ram_gib: int


def _instances(tables: Mapping[str, Any]) -> Iterator[Instance]:
    for group in tables["groups"].values():
        rows = group.pop("instances")
        for name, row in rows.items():
            sources = tables["sources_of"] | group["sources"] | row.get("sources", {})
            named = {figure: tables["sources"].get(source, source) for figure, source in sources.items()}
            row = group | row | {"sources": MappingProxyType(named)}
            figures: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            yield Instance(name=name, **figures)


_TABLES = tomllib.loads(Path(__file__).with_name("machines.toml").read_text(encoding="utf-8"))

INSTANCES: Mapping[str, Instance] = MappingProxyType({each.name: each for each in _instances(_TABLES)})
CPU_INSTANCES: Mapping[str, CpuInstance] = MappingProxyType(
    {name: CpuInstance(name, **figures) for name, figures in _TABLES["cpu_instances"].items()}
)


def peak_note(peak_flops: float, *, dtype: str, machine: str) -> str:
    """In words, which peak an MFU is a share of.

    peak_flops: of one rank's core, as it was taken; machine: the product name of the node, or "".
    """
    text = f"{peak_flops / 1e12:g} TFLOP/s, dense {dtype}, of one"
    instance = INSTANCES.get(machine)
    if instance is None:
        return f"{text} rank's device, by its data sheet"
    kind = "logical " if instance.chip in ("trainium2", "trainium3") else ""
    source = f" ({instance.sources['bf16_flops_per_core']})" if dtype == "bfloat16" else ""
    return f"{text} {kind}{instance.name_of_core} of {instance.name}{source}"
