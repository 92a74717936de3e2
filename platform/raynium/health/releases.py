"""Which versions of driver, runtime, collectives and compiler AWS released together, and if a node's are such a set.

AWS tests whole releases. What it documents of mixtures is one-sided: a runtime refuses a driver that is older than it
needs, and cannot run what a newer compiler made (NRT status 10). It publishes no table of which pairs those are, so a
mixture is a warning and not a failure; of the devices' firmware it publishes nothing, so nothing is said of it.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from raynium.accelerators.detect import PLACEHOLDERS
from raynium.health.host import Check, Host

COMPONENTS = ("driver", "runtime", "collectives", "compiler")
RUNTIME_FOLDER = "/opt/aws/neuron/lib"
QUERY_SECONDS = 10.0
_PACKAGES = {"runtime": "aws-neuronx-runtime-lib", "collectives": "aws-neuronx-collectives"}
_LIBRARIES = {"runtime": "libnrt", "collectives": "libnccom"}


# SDK release → component → its version, as far as it is known.
RELEASES: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def loaded_driver(host: Host, *, timeout_seconds: float) -> str | None:
    """Version of the driver that the kernel runs; None: it shows nowhere."""
    loaded = host.read("/sys/module/neuron/version")
    if loaded is None:
        kernel_log = host.run("dmesg", timeout_seconds=timeout_seconds)
        said = re.findall(r"Neuron Driver Started with Version:\s*([\d.]+)", kernel_log.output if kernel_log else "")
        loaded = said[-1].rstrip(".") if said else None
    return loaded.strip() if loaded is not None else None


def versions(host: Host) -> dict[str, str]:
    """Component → version, of those that can be told."""
    found = {
        "driver": loaded_driver(host, timeout_seconds=QUERY_SECONDS),
        "runtime": _installed(host, "runtime"),
        "collectives": _installed(host, "collectives"),
        "compiler": host.version("neuronx-cc"),
    }
    return {name: version for name, version in found.items() if version not in (None, PLACEHOLDERS["neuronx-cc"])}


def _installed(host: Host, component: str) -> str | None:
    """From the system's package manager; else from the name of the library's file, if it has the whole version."""
    package = _PACKAGES[component]
    for query in (("dpkg-query", "-W", "-f=${Version}", package), ("rpm", "-q", "--qf", "%{VERSION}", package)):
        ran = host.run(*query, timeout_seconds=QUERY_SECONDS)
        if ran is not None and ran.code == 0 and re.match(r"\d+\.\d+", ran.output):
            return ran.output.strip()
    names = host.names(RUNTIME_FOLDER)
    matches = [re.fullmatch(rf"{_LIBRARIES[component]}\.so\.(\d+\.\d+\.\d+[\d.]*)", name) for name in names]
    return max((match[1] for match in matches if match), key=_numbers, default=None)


def release_check(host: Host) -> Check:
    """Everything on the node is of one release of the SDK."""
    name, rule = "neuron release", "driver, runtime, collectives and compiler of one Neuron SDK"
    found = versions(host)
    untold = [component for component in COMPONENTS if component not in found]
    known = {component: releases for component, text in found.items() if (releases := releases_of(component, text))}
    shown = ", ".join(
        f"{component} {_short(text)} ({_listed(known.get(component))})" for component, text in found.items()
    )
    if untold:
        shown = "; ".join(part for part in (shown, f"no version found of {', '.join(untold)}") if part)
    if known and not set.intersection(*map(set, known.values())):
        return Check(name, "warning", shown, rule, _remedy(found))
    if len(known) < len(found) or len(known) < 2:
        return Check(
            name,
            "skipped",
            shown,
            f"{rule}; those of {next(iter(RELEASES))} to {next(reversed(RELEASES))} are known here",
        )
    return Check(name, "ok", shown, rule)


def releases_of(component: str, version: str) -> tuple[str, ...]:
    """The SDK releases that came with a version of this component, oldest first; (): none that is known here."""
    return tuple(sdk for sdk, versions in RELEASES.items() if versions.get(component) == _short(version))


def _remedy(found: Mapping[str, str]) -> str:
    runtime, driver = (releases_of(component, found.get(component, "")) for component in ("runtime", "driver"))
    if runtime and driver and _numbers(driver[-1]) < _numbers(runtime[0]):
        return (
            "the driver is older than the runtime, which may refuse it: update aws-neuronx-dkms and reload the driver"
        )
    return "install all of them from one release of the Neuron SDK, or take its image"


def _short(version: str) -> str:
    """ "2.31" of "2.31.7.0"."""
    return ".".join(version.split(".")[:2])


def _listed(releases: tuple[str, ...] | None) -> str:
    return f"SDK {' or '.join(releases)}" if releases else "no release known here"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
