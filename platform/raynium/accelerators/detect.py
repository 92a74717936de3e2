"""Chooses the accelerator that a config names, or the best one this machine can use, and says why.

`look()` gathers what the machine has, `findings()` judges it: data in, data out, so that `raynium doctor` can show the
same reasons and tests can make up machines. Neither imports torch or a device library, since agents have none.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from raynium.accelerators.base import Accelerator
from raynium.accelerators.cpu import CpuAccelerator
from raynium.accelerators.cuda import CudaAccelerator
from raynium.accelerators.neuron import NeuronAccelerator
from raynium.accelerators.neuron_xla import NeuronXlaAccelerator
from raynium.errors import LaunchError
from raynium.hardware.catalog import INSTANCES, Instance

DEVICE_FOLDER = Path("/dev")
# On EC2's Nitro machines it is the instance type.
PRODUCT_NAME = Path("/sys/devices/virtual/dmi/id/product_name")

Name = Literal["neuron", "neuron_xla", "cuda", "cpu"]

# AWS keeps these names on the public package index with packages that hold nothing and only raise an error; the real
# ones come from AWS's own repository.
PLACEHOLDERS = {"torch-neuronx": "1.0", "neuronx-distributed": "0.1", "neuronx-cc": "1.0.post1", "libneuronxla": "1.0"}
PACKAGES = ("torch", "torch-xla", *PLACEHOLDERS)
# From here on torch-neuronx is torch's own device "neuron".
FIRST_NATIVE_TORCH = (2, 13)
# The last torch that torch-neuronx drives through torch-xla.
XLA_TORCH = (2, 9)
AWS_REPOSITORY = "AWS's package repository, https://pip.repos.neuron.amazonaws.com"


@dataclass(frozen=True)
class Machine:
    """What the choice of an accelerator depends on.

    neuron_devices: chips that the driver shows. product_name: the machine's own, such as "trn2.48xlarge" on EC2.
    packages: version of each of PACKAGES that is installed.
    """

    gpus: int = 0
    neuron_devices: int = 0
    product_name: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def instance(self) -> Instance | None:
        return INSTANCES.get(self.product_name or "")


@dataclass(frozen=True)
class Finding:
    """Whether this machine can train on one accelerator, and why; a reason against one says what to do about it."""

    accelerator: Name
    usable: bool
    reasons: tuple[str, ...]


def look() -> Machine:
    """This machine. Reads the kernel's lists and the installed packages' metadata; loads and opens nothing."""
    return Machine(
        gpus=len(list(DEVICE_FOLDER.glob("nvidia[0-9]*"))),
        neuron_devices=len(list(DEVICE_FOLDER.glob("neuron[0-9]*"))),
        product_name=PRODUCT_NAME.read_text(encoding="utf-8").strip() if PRODUCT_NAME.is_file() else None,
        packages=_installed(),
    )


@functools.cache
def _installed() -> Mapping[str, str]:
    """Read once: torch's metadata alone take 4 ms, of each start of a rank."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def findings(machine: Machine) -> tuple[Finding, ...]:
    """One for each accelerator; of those that are usable, the first is what `auto` takes."""
    against: dict[Name, list[str]] = {
        "neuron": _against_neuron(machine),
        "neuron_xla": _against_neuron_xla(machine),
        "cuda": [] if machine.gpus else [f"no GPU ({DEVICE_FOLDER}/nvidia0): is the NVIDIA driver loaded?"],
        "cpu": [],
    }
    chips = (
        f"{machine.neuron_devices} Neuron device(s), {machine.product_name or 'machine of unknown type'}, "
        + ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    )
    found: dict[Name, str] = {
        "neuron": chips,
        "neuron_xla": chips,
        "cuda": f"{machine.gpus} GPU(s)",
        "cpu": "every machine has one",
    }
    return tuple(Finding(name, not no, tuple(no) or (found[name],)) for name, no in against.items())


def detect(name: str, machine: Machine | None = None) -> Accelerator:
    """`cluster.accelerator` → its implementation. machine: this one if None.

    "auto" takes TorchNeuron, torch-xla, a GPU or the CPU, the first that works; a machine with Neuron devices that
    neither stack can use is an error rather than a slow run on its CPU. Raises LaunchError with the reasons.
    """
    machine = machine or look()
    found = {finding.accelerator: finding for finding in findings(machine)}
    if name == "auto":
        finding = next(finding for finding in found.values() if finding.usable)
        if machine.neuron_devices and finding.accelerator not in ("neuron", "neuron_xla"):
            raise LaunchError(
                f"cluster.accelerator is 'auto' and this machine has {machine.neuron_devices} Neuron device(s), which "
                f"cannot be used. For neuron: {'; '.join(found['neuron'].reasons)}. For neuron_xla: "
                f"{'; '.join(found['neuron_xla'].reasons)}. Or set it to 'cpu' to train on the machine's CPU"
            )
    else:
        assert name in found, name
        finding = found[name]
        if not finding.usable:
            raise LaunchError(
                f"cluster.accelerator is {name!r}, which this machine cannot use: {'; '.join(finding.reasons)}. "
                "Or set cluster.accelerator to 'auto' or 'cpu'"
            )
    match finding.accelerator:
        case "neuron":
            return NeuronAccelerator(machine.instance)
        case "neuron_xla":
            return NeuronXlaAccelerator(machine.instance)
        case "cuda":
            return CudaAccelerator()
        case "cpu":
            return CpuAccelerator()


def _against_neuron(machine: Machine) -> list[str]:
    reasons = _no_devices(machine)
    if (machine.product_name or "").startswith(("trn1", "inf")):
        reasons.append(
            f"{machine.product_name} is older than Trainium2, which TorchNeuron needs: use neuron_xla, or a trn2"
        )
    other = (
        f"works through torch-xla (neuron_xla); TorchNeuron begins with {_dotted(FIRST_NATIVE_TORCH)}: install "
        f"raynium[neuron] from {AWS_REPOSITORY}"
    )
    reasons += _bad_packages(machine, ("torch-neuronx", "neuronx-cc"), extra="neuron")
    return reasons + _bad_family(machine, lambda family: family >= FIRST_NATIVE_TORCH, other)


def _against_neuron_xla(machine: Machine) -> list[str]:
    packages = ("torch-neuronx", "torch-xla", "libneuronxla", "neuronx-cc", "neuronx-distributed")
    other = (
        f"is TorchNeuron (neuron); torch-xla ended with {_dotted(XLA_TORCH)}: install raynium[neuron-xla] from "
        f"{AWS_REPOSITORY}, in an environment of its own"
    )
    reasons = _no_devices(machine) + _bad_packages(machine, packages, extra="neuron-xla")
    return reasons + _bad_family(machine, lambda family: family <= XLA_TORCH, other)


def _bad_family(machine: Machine, is_ours: Callable[[tuple[int, int]], bool], other: str) -> list[str]:
    """What is wrong with the pair of torch-neuronx and torch. other: said of a torch-neuronx of the other way."""
    version, torch = machine.packages.get("torch-neuronx"), machine.packages.get("torch")
    family = _family(version)
    if family is None or not _is_real(machine, "torch-neuronx"):
        return []
    if not is_ours(family):
        return [f"torch-neuronx {version} {other}"]
    if _family(torch) == family:
        return []
    made_for = _dotted(family)
    return [
        f"torch-neuronx {version} is made for torch {made_for}, and torch {torch} is installed: install the pair of "
        f"one family, torch=={made_for}.*"
    ]


def _no_devices(machine: Machine) -> list[str]:
    if machine.neuron_devices:
        return []
    return [
        f"no Neuron device ({DEVICE_FOLDER}/neuron0): is this a trn instance, is the driver loaded "
        "(`lsmod | grep neuron`), may the container use its devices?"
    ]


def _bad_packages(machine: Machine, names: tuple[str, ...], *, extra: str) -> list[str]:
    remedy = f"install raynium[{extra}] from {AWS_REPOSITORY}"
    missing = [name for name in names if name not in machine.packages]
    there = [name for name in names if name in machine.packages]
    fake = [f"{name} {machine.packages[name]}" for name in there if not _is_real(machine, name)]
    placeholder = "is a placeholder from the public package index, which does nothing"
    reasons = [f"{', '.join(missing)} not installed: {remedy}"] if missing else []
    return reasons + ([f"{', '.join(fake)} {placeholder}: {remedy}"] if fake else [])


def _is_real(machine: Machine, name: str) -> bool:
    return name in machine.packages and machine.packages[name] != PLACEHOLDERS.get(name)


def _family(version: str | None) -> tuple[int, int] | None:
    """(2, 13) of "2.13.3.0.1" and of "2.13.0+cpu"."""
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(family: tuple[int, int]) -> str:
    return f"{family[0]}.{family[1]}"
