"""The machines Raynium plans for: cores, memory, peak speed, price. A figure nobody has published is None.

One *core* is what one rank owns: a NeuronCore of Trainium1, a logical NeuronCore of Trainium2 and 3 (two physical
cores, LNC=2, which is AWS's default), or a GPU. Memory is the nominal size: drivers and runtimes take a little of it.
`Instance.sources` names where each figure was read, and when.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Chip = Literal["trainium1", "trainium2", "trainium3", "a100", "h100", "h200", "b200"]
Market = Literal["on-demand", "spot", "capacity-block"]

_NEURON_DOCS = "AWS Neuron SDK docs, about-neuron/arch/neuron-hardware; read 2026-11-23"
_NEURON_COUNTS = "optimum-neuron issue 619 (core counts the collectives accept); read 2026-11-23"
_TRN2_COUNTS = "AWS Neuron docs and torch-neuronx community notes for trn2; read 2026-11-23"
_TRN_PRICES = "skypilot-catalog v8 aws/vms.csv at 00148f2a, on demand; read 2026-11-23"
_EC2_SPECS = "AWS EC2 instance type pages; read 2026-11-23"
_TORCHTITAN = "torchtitan at b5bcd76c, torchtitan/tools/utils.py, bf16 dense; read 2026-11-23"
_INSTANCE_TYPES = "EC2 DescribeInstanceTypes, the copy in moto 5.2.5; read 2026-11-23"
_PRICE_LIST = "AWS price list of 2026-07-28, us-east-1, on demand"


@dataclass(frozen=True)
class Instance:
    """One EC2 instance type.

    accelerators: values of cluster.accelerator that can drive it. TorchNeuron (`neuron`) runs on Trainium2 and later
        only; torch-xla (`neuron_xla`) on both.
    core_blocks: how many cores of one instance a job may take. The collectives' hardware routes accept no other
        count, and a block of n begins at a multiple of n. (TorchNeuron's all-to-all is narrower still: 4, 8, 16 or
        a multiple of 32 ranks.)
    efa_gbps: network between instances with EFA; 0 where the type has none.
    efa_interfaces: network cards that take an EFA interface, with the indices 0, 1, …; a cluster file asks for each.
    markets: how EC2 sells the type. Selling is not having: on demand, a large type may be refused for want of capacity.
    """

    name: str
    chip: Chip
    chips: int
    cores: int
    core_blocks: tuple[int, ...]
    accelerators: tuple[str, ...]
    memory_gib_per_core: float
    bf16_flops_per_core: float  # dense peak, FLOP/s: the denominator of MFU
    vcpus: int
    ram_gib: int | None
    efa_gbps: float | None
    efa_interfaces: int | None
    markets: tuple[Market, ...] | None
    usd_per_hour: float | None  # on demand, Linux
    sources: Mapping[str, str]  # figure → where and when it was read; for an unknown figure: why
    name_of_core: str = "NeuronCore"

    @property
    def is_neuron(self) -> bool:
        return self.chip in ("trainium1", "trainium2", "trainium3")


_ANY_MARKET: tuple[Market, ...] = ("on-demand", "spot", "capacity-block")


def _trainium1(
    name: str,
    chips: int,
    vcpus: int,
    ram_gib: int,
    efa_gbps: float,
    efa_interfaces: int,
    usd_per_hour: float,
    core_blocks: tuple[int, ...],
    markets: tuple[Market, ...],
) -> Instance:
    return Instance(
        name=name,
        chip="trainium1",
        chips=chips,
        cores=2 * chips,
        core_blocks=core_blocks,
        accelerators=("neuron_xla",),
        memory_gib_per_core=16,  # 32 a chip
        bf16_flops_per_core=95e12,  # 190e12 a chip
        vcpus=vcpus,
        ram_gib=ram_gib,
        efa_gbps=efa_gbps,
        efa_interfaces=efa_interfaces,
        markets=markets,
        usd_per_hour=usd_per_hour,
        sources=MappingProxyType(
            {
                "cores": _NEURON_DOCS,
                "core_blocks": _NEURON_COUNTS,
                "memory_gib_per_core": _NEURON_DOCS,
                "bf16_flops_per_core": _NEURON_DOCS,
                "vcpus": _NEURON_DOCS,
                "ram_gib": _NEURON_DOCS,
                "efa_gbps": _NEURON_DOCS,
                "efa_interfaces": _INSTANCE_TYPES,
                "markets": _INSTANCE_TYPES,
                "usd_per_hour": _TRN_PRICES,
            }
        ),
    )


def _trainium2(
    name: str,
    chips: int,
    vcpus: int,
    ram_gib: int,
    efa_gbps: float | None,
    efa_interfaces: int,
    core_blocks: tuple[int, ...],
    markets: tuple[Market, ...],
    price_note: str,
) -> Instance:
    return Instance(
        name=name,
        chip="trainium2",
        chips=chips,
        cores=4 * chips,  # logical, LNC=2
        core_blocks=core_blocks,
        accelerators=("neuron", "neuron_xla"),
        memory_gib_per_core=24,  # 96 a chip
        bf16_flops_per_core=166.75e12,  # 667e12 a chip
        vcpus=vcpus,
        ram_gib=ram_gib,
        efa_gbps=efa_gbps,
        efa_interfaces=efa_interfaces,
        markets=markets,
        usd_per_hour=None,
        sources=MappingProxyType(
            {
                "cores": _NEURON_DOCS,
                "core_blocks": _TRN2_COUNTS,
                "memory_gib_per_core": _NEURON_DOCS,
                "bf16_flops_per_core": _NEURON_DOCS,
                "vcpus": _NEURON_DOCS,
                "ram_gib": _NEURON_DOCS,
                "efa_gbps": _NEURON_DOCS if efa_gbps is not None else "one host card; no figure published",
                "efa_interfaces": _INSTANCE_TYPES,
                "markets": _INSTANCE_TYPES,
                "usd_per_hour": price_note,
            }
        ),
    )


def _gpus(
    name: str,
    chip: Chip,
    memory_gib: float,
    bf16_flops: float,
    vcpus: int,
    ram_gib: int,
    efa_gbps: float,
    efa_interfaces: int,
    usd_per_hour: float,
    price_source: str = _PRICE_LIST,
) -> Instance:
    return Instance(
        name=name,
        chip=chip,
        chips=8,
        cores=8,
        core_blocks=tuple(range(1, 9)),
        accelerators=("cuda",),
        memory_gib_per_core=memory_gib,
        bf16_flops_per_core=bf16_flops,
        vcpus=vcpus,
        ram_gib=ram_gib,
        efa_gbps=efa_gbps,
        efa_interfaces=efa_interfaces,
        markets=_ANY_MARKET,
        usd_per_hour=usd_per_hour,
        sources=MappingProxyType(
            {
                "cores": _EC2_SPECS,
                "core_blocks": "NCCL takes any number of GPUs",
                "memory_gib_per_core": _EC2_SPECS,
                "bf16_flops_per_core": _TORCHTITAN,
                "vcpus": _EC2_SPECS,
                "ram_gib": _INSTANCE_TYPES,
                "efa_gbps": _EC2_SPECS,
                "efa_interfaces": _INSTANCE_TYPES,
                "markets": _INSTANCE_TYPES,
                "usd_per_hour": price_source,
            }
        ),
        name_of_core="GPU",
    )


def _trainium3(name: str, servers: int, chips: int) -> Instance:
    """One server of a Trn3 UltraServer: AWS publishes figures of the whole, and no EC2 type of that name."""
    ultraserver = {"trn3-gen1": (768, 8192, 12_800), "trn3-gen2": (2304, 27_648, 28_800)}  # vCPU, RAM GiB, EFA Gbps
    vcpus, ram_gib, efa_gbps = (figure // servers for figure in ultraserver[name])
    share = f"{_NEURON_DOCS}; the UltraServer's figure over its {servers} servers"
    return Instance(
        name=name,
        chip="trainium3",
        chips=chips,
        cores=4 * chips,  # logical, LNC=2
        core_blocks=(4 * chips,),
        accelerators=("neuron", "neuron_xla"),
        memory_gib_per_core=36,  # 144 a chip
        bf16_flops_per_core=167.75e12,  # 671e12 a chip
        vcpus=vcpus,
        ram_gib=ram_gib,
        efa_gbps=efa_gbps,
        efa_interfaces=None,
        markets=None,
        usd_per_hour=None,
        sources=MappingProxyType(
            {
                "cores": share,
                "core_blocks": "2026-11-23: no list of legal counts is published; the whole server is always one",
                "memory_gib_per_core": _NEURON_DOCS,
                "bf16_flops_per_core": _NEURON_DOCS,
                "vcpus": share,
                "ram_gib": share,
                "efa_gbps": share,
                "efa_interfaces": "not published",
                "markets": "not published",
                "usd_per_hour": "no price published",
            }
        ),
    )


_CAPACITY_BLOCKS = "no on-demand price listed on 2026-07-28: sold as Capacity Blocks and spot"
_SPOT_3XLARGE = f"{_CAPACITY_BLOCKS}; spot 2.74 in ap-southeast-4"
_NO_SPOT: tuple[Market, ...] = ("on-demand", "capacity-block")
_NO_BLOCKS: tuple[Market, ...] = ("on-demand", "spot")

INSTANCES: Mapping[str, Instance] = MappingProxyType(
    {
        instance.name: instance
        for instance in (
            #          name         chips vCPU  RAM   EFA  cards USD/h    blocks
            _trainium1("trn1.2xlarge", 1, 8, 32, 0, 0, 1.34375, (1, 2), _NO_BLOCKS),
            _trainium1("trn1.32xlarge", 16, 128, 512, 800, 8, 21.50, (1, 2, 8, 16, 32), _ANY_MARKET),
            _trainium1("trn1n.32xlarge", 16, 128, 512, 1600, 16, 24.78, (1, 2, 8, 16, 32), _NO_BLOCKS),
            _trainium2("trn2.3xlarge", 1, 12, 128, None, 1, (1, 4), _ANY_MARKET, _SPOT_3XLARGE),
            _trainium2("trn2.48xlarge", 16, 192, 2048, 3200, 16, (1, 4, 16, 64), _ANY_MARKET, _CAPACITY_BLOCKS),
            _trainium2("trn2u.48xlarge", 16, 192, 2048, 3200, 16, (1, 4, 16, 64), _NO_SPOT, _CAPACITY_BLOCKS),
            _trainium3("trn3-gen1", servers=4, chips=16),
            _trainium3("trn3-gen2", servers=36, chips=4),
            #     name               chip  GiB  FLOP/s  vCPU RAM   EFA cards USD/h
            _gpus("p4d.24xlarge", "a100", 40, 312e12, 96, 1152, 400, 4, 21.957642),
            _gpus("p5.48xlarge", "h100", 80, 989e12, 192, 2048, 3200, 32, 55.04),
            _gpus("p5en.48xlarge", "h200", 141, 989e12, 192, 2048, 3200, 16, 63.296, "dstack issue 4110, 2026-08-06"),
            _gpus("p6-b200.48xlarge", "b200", 180, 2250e12, 192, 2048, 3200, 8, 113.9328),
        )
    }
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
