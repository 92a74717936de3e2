"""The catalogue: figures that other figures imply, and a source for each."""

import dataclasses
from typing import get_type_hints

import pytest
from pydantic import TypeAdapter

from raynium.hardware.catalog import CPU_INSTANCES, INSTANCES, CpuInstance, Instance, peak_note

pytestmark = pytest.mark.quick

FIGURES = (
    "cores",
    "core_blocks",
    "memory_gib_per_core",
    "bf16_flops_per_core",
    "vcpus",
    "ram_gib",
    "efa_gbps",
    "efa_interfaces",
    "markets",
    "usd_per_hour",
)
every_instance = pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES)


def test_the_instances_of_the_plan_are_there_under_their_own_names():
    assert list(INSTANCES) == [
        "trn1.2xlarge", "trn1.32xlarge", "trn1n.32xlarge", "trn2.3xlarge", "trn2.48xlarge", "trn2u.48xlarge",
        "trn3-gen1", "trn3-gen2",
        "p4d.24xlarge", "p5.48xlarge", "p5en.48xlarge", "p6-b200.48xlarge",
    ]  # fmt: skip
    assert all(name == instance.name for name, instance in INSTANCES.items())


@pytest.mark.parametrize("machine", [*INSTANCES.values(), *CPU_INSTANCES.values()], ids=lambda machine: machine.name)
def test_every_figure_has_the_type_that_the_catalogue_says(machine: Instance | CpuInstance):
    """The loader takes the table's word for it."""
    for figure, hint in get_type_hints(type(machine)).items():
        value = getattr(machine, figure)
        TypeAdapter(hint).validate_python(dict(value) if figure == "sources" else value, strict=True)


@every_instance
def test_every_figure_names_its_source_and_a_known_one_its_date(instance: Instance):
    assert set(instance.sources) == set(FIGURES)
    for figure in FIGURES:
        note = instance.sources[figure]
        if getattr(instance, figure) is None:
            assert any(word in note for word in ("no ", "not ")), f"{figure} is unknown and must say why, not {note!r}"
        elif figure != "core_blocks" or instance.is_neuron:
            assert "2026-" in note, f"{figure} must say when it was read"


@every_instance
def test_all_cores_together_are_a_legal_block(instance: Instance):
    assert instance.core_blocks[-1] == instance.cores
    assert list(instance.core_blocks) == sorted(set(instance.core_blocks))
    assert not set(instance.unproven_blocks) & set(instance.core_blocks)
    assert all(0 < count < instance.cores for count in instance.unproven_blocks)
    assert instance.cores % instance.chips == 0


@pytest.mark.parametrize(
    # Published per instance in the AWS Neuron docs: device memory GiB, dense bf16 TFLOPS.
    ("name", "memory_gib", "tflops"),
    [
        ("trn1.2xlarge", 32, 190),
        ("trn1.32xlarge", 512, 3_040),
        ("trn2.3xlarge", 96, 667),
        ("trn2.48xlarge", 1_536, 10_672),
        ("trn3-gen1", 9_216 / 4, 42_944 / 4),
        ("trn3-gen2", 20_736 / 36, 96_624 / 36),
    ],
)
def test_cores_add_up_to_the_published_instance(name, memory_gib, tflops):
    instance = INSTANCES[name]
    assert instance.cores * instance.memory_gib_per_core == memory_gib
    assert instance.cores * instance.bf16_flops_per_core == pytest.approx(tflops * 1e12)


def test_figures_nobody_published_are_unknown():
    assert INSTANCES["trn2.48xlarge"].usd_per_hour is None
    assert "Capacity Blocks" in INSTANCES["trn2.48xlarge"].sources["usd_per_hour"]
    assert INSTANCES["trn2.3xlarge"].efa_gbps is None
    assert INSTANCES["trn3-gen1"].markets is None and INSTANCES["trn3-gen2"].efa_interfaces is None


def test_torchneuron_does_not_drive_trainium1():
    assert INSTANCES["trn1.32xlarge"].accelerators == ("neuron_xla",)
    assert INSTANCES["trn2.48xlarge"].accelerators == ("neuron", "neuron_xla")
    assert INSTANCES["p5.48xlarge"].accelerators == ("cuda",)


@pytest.mark.parametrize("instance", [each for each in INSTANCES.values() if each.efa_interfaces and each.efa_gbps])
def test_network_cards_carry_the_published_bandwidth(instance: Instance):
    # 100, 200 and 400 Gbit/s are the speeds of the cards that exist.
    assert instance.efa_gbps is not None and instance.efa_interfaces is not None
    assert instance.efa_gbps / instance.efa_interfaces in (100, 200, 400)


@every_instance
def test_figures_are_those_that_ec2_itself_gives(instance: Instance):
    """moto carries EC2's answers to DescribeInstanceTypes; it knows no Trainium3."""
    from moto.ec2.models.instance_types import INSTANCE_TYPES

    if instance.chip == "trainium3":
        assert instance.name not in INSTANCE_TYPES
        return
    theirs = INSTANCE_TYPES[instance.name]
    assert instance.vcpus == theirs["VCpuInfo"]["DefaultVCpus"]
    assert instance.ram_gib == theirs["MemoryInfo"]["SizeInMiB"] / 1024
    assert instance.efa_interfaces == theirs["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
    assert set(instance.markets or ()) == set(theirs["SupportedUsageClasses"])


def test_instances_without_an_accelerator_are_those_that_ec2_itself_gives():
    from moto.ec2.models.instance_types import INSTANCE_TYPES

    for instance in CPU_INSTANCES.values():
        theirs = INSTANCE_TYPES[instance.name]
        assert instance.vcpus == theirs["VCpuInfo"]["DefaultVCpus"]
        assert instance.ram_gib == theirs["MemoryInfo"]["SizeInMiB"] / 1024


def test_the_denominator_of_mfu_is_said():
    assert peak_note(166.75e12, dtype="bfloat16", machine="trn2.48xlarge") == (
        "166.75 TFLOP/s, dense bfloat16, of one logical NeuronCore of trn2.48xlarge "
        "(AWS Neuron SDK docs, about-neuron/arch/neuron-hardware; read 2026-11-23)"
    )
    assert (
        peak_note(67e12, dtype="float32", machine="p5.48xlarge")
        == "67 TFLOP/s, dense float32, of one GPU of p5.48xlarge"
    )
    unknown = "95 TFLOP/s, dense bfloat16, of one rank's device, by its data sheet"
    assert peak_note(95e12, dtype="bfloat16", machine="") == unknown


def test_the_catalogue_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        INSTANCES["p5.48xlarge"].cores = 9  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        INSTANCES["mine"] = INSTANCES["p5.48xlarge"]  # pyright: ignore[reportIndexIssue]
