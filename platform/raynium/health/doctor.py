"""`raynium doctor`: what this machine has, what it can train on, what it cannot and why. Loads no torch, ray or mlflow.

Data in, data out, over the seam of `host.py`: the tests replay a laptop, the public index's placeholders, versions that
do not belong together, and a healthy Trn2.
"""

from dataclasses import dataclass
from typing import Any

from raynium.accelerators.detect import AWS_REPOSITORY, PLACEHOLDERS, Finding, findings
from raynium.health import checks
from raynium.health.host import Check, Host
from raynium.health.releases import release_check

# What every machine needs, and the oldest that pyproject.toml admits.
REQUIRED = {"ray": (2, 60), "torch": (2, 9), "mlflow": (3, 17)}
SHOWN = ("raynium", "s3fs", "boto3", "torch-xla", *PLACEHOLDERS)
FIRST_PYTHON = (3, 11)

CREDENTIAL_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)
# What Docker gives a container. Snapshots of any real model need more.
DOCKER_SHARED_MEMORY_GIB = 0.0625


@dataclass(frozen=True)
class Examination:
    """What the doctor found. `chosen` is what cluster.accelerator=auto would take; None: it would refuse."""

    machine: str
    chosen: str | None
    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]

    @property
    def is_well(self) -> bool:
        return not any(check.is_bad for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "well": self.is_well,
            "machine": self.machine,
            "accelerator": self.chosen,
            "accelerators": {
                finding.accelerator: {"usable": finding.usable, "reasons": list(finding.reasons)}
                for finding in self.findings
            },
            "checks": [check.to_json() for check in self.checks],
        }


def examine(host: Host, *, python: tuple[int, int, int]) -> Examination:
    """python: of the interpreter that training would use."""
    machine = host.machine
    found = findings(machine)
    best = next(finding.accelerator for finding in found if finding.usable)
    chosen = None if machine.neuron_devices and best not in ("neuron", "neuron_xla") else best
    made = [
        _python(python),
        *(_required(host, package, oldest) for package, oldest in REQUIRED.items()),
        _other_packages(host),
        *_placeholders(host),
        _choice(chosen, found),
    ]
    if machine.gpus and (version := host.version("torch")) is not None and version.endswith("+cpu"):
        remedy = "install a CUDA build of torch"
        made.append(Check("torch for GPUs", "failed", f"torch {version} cannot use them", "a CUDA build", remedy))
    if machine.neuron_devices:
        listed = checks.neuron_devices(host)
        shown = f"{len(listed.devices)} chip(s), {listed.num_cores} cores" if listed.devices else listed.problem
        made += [checks.driver(host), checks.runtime_libraries(host), release_check(host)]
        made.append(Check("neuron cores", "ok" if listed.devices else "warning", shown))
        made += _silent_cpu(host)
        made += [checks.locked_memory(host), checks.huge_pages(host), checks.metadata_service(host)]
    made += [_shared_memory(host), _s3_credentials(host), checks.host_name(host)]
    devices = [f"{machine.neuron_devices} Neuron device(s)"] * bool(machine.neuron_devices)
    devices += [f"{machine.gpus} GPU(s)"] * bool(machine.gpus)
    text = f"{machine.product_name or 'a machine of unknown type'}, {' and '.join(devices) or 'no accelerator'}"
    return Examination(text, chosen, found, tuple(made))


def _choice(chosen: str | None, found: tuple[Finding, ...]) -> Check:
    name, rule = "accelerator", "the devices that are there can be used"
    if chosen is not None:
        return Check(name, "ok", f"cluster.accelerator=auto takes {chosen}", rule)
    why = "; ".join(f"{each.accelerator}: {'; '.join(each.reasons)}" for each in found if not each.usable)
    return Check(name, "failed", f"Neuron devices that nothing here can drive. {why}", rule)


def _python(python: tuple[int, int, int]) -> Check:
    found = ".".join(map(str, python))
    rule = f"{FIRST_PYTHON[0]}.{FIRST_PYTHON[1]} or newer"
    if python[:2] >= FIRST_PYTHON:
        return Check("python", "ok", found, rule)
    return Check("python", "failed", found, rule, "make the environment with a newer one")


def _required(host: Host, package: str, oldest: tuple[int, int]) -> Check:
    version = host.version(package)
    rule = f"{oldest[0]}.{oldest[1]} or newer"
    if version is None:
        return Check(package, "failed", "not installed", rule, "install raynium with its dependencies")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) >= oldest:
        return Check(package, "ok", version, rule)
    return Check(package, "failed", version, rule, f"upgrade {package}")


def _other_packages(host: Host) -> Check:
    there = [f"{package} {version}" for package in SHOWN if (version := host.version(package)) is not None]
    return Check("other packages", "ok", ", ".join(there) or "none")


def _placeholders(host: Host) -> list[Check]:
    """On any machine: they never do anything but stand in the way of the real ones."""
    fake = [name for name, version in PLACEHOLDERS.items() if host.version(name) == version]
    if not fake:
        return []
    remedy = f"pip uninstall {' '.join(fake)}; the real ones are in {AWS_REPOSITORY}"
    found = f"{', '.join(fake)} are placeholders from the public package index, which only raise an error"
    return [Check("placeholders", "failed", found, "packages that do something", remedy)]


def _silent_cpu(host: Host) -> list[Check]:
    """torch-xla without libneuronxla, or told so by PJRT_DEVICE, trains on the CPU and does not say a word."""
    if host.version("torch-xla") is None:
        return []
    name, rule = "silent CPU fallback", "torch-xla finds the Neuron devices"
    if (device := host.environment.get("PJRT_DEVICE", "NEURON").upper()) != "NEURON":
        return [Check(name, "failed", f"PJRT_DEVICE={device}", rule, "unset PJRT_DEVICE")]
    if host.version("libneuronxla") in (None, PLACEHOLDERS["libneuronxla"]):
        found = "torch-xla without a real libneuronxla takes the CPU without a word"
        return [Check(name, "failed", found, rule, f"install raynium[neuron-xla] from {AWS_REPOSITORY}")]
    return [Check(name, "ok", "torch-xla with libneuronxla", rule)]


def _shared_memory(host: Host) -> Check:
    name, rule = "shared memory", "room for two snapshots of every rank; `raynium preflight` knows how much"
    free = host.free_bytes("/dev/shm")
    if free is None:
        return Check(name, "skipped", "unknown", rule)
    found = f"{free / checks.GIB:.2f} GiB free in /dev/shm"
    if free > DOCKER_SHARED_MEMORY_GIB * checks.GIB:
        return Check(name, "ok", found, rule)
    return Check(name, "warning", found, rule, "start the container with --shm-size, or remount /dev/shm")


def _s3_credentials(host: Host) -> Check:
    """Where credentials would come from. Never what they are."""
    name, rule = "S3 credentials", "needed for s3:// roots only"
    there = [variable for variable in CREDENTIAL_VARIABLES if host.environment.get(variable)]
    home = host.environment.get("HOME", "")
    file = host.environment.get("AWS_SHARED_CREDENTIALS_FILE", f"{home}/.aws/credentials")
    if host.read(file) is not None:
        there.append("a credentials file")
    if there:
        return Check(name, "ok", ", ".join(there), rule)
    if host.machine.instance is not None:
        return Check(name, "ok", "none here; an instance profile may give some", rule)
    return Check(name, "skipped", "none", rule)
