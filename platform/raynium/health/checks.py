"""What must be true of a node before ranks are started on it: one small function each, over the seam of `host.py`.

A check fails on evidence only. Where a tool is missing it says so and does not guess, so that a container without
`neuron-ls` still trains. Floors of speed are in `trial_checks.py`. Only hardware can show that the Neuron tools answer
as they are documented; the answers that the tests replay were written after AWS's documentation (neuron-ls of 2.33).
"""

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raynium.accelerators.cores import VISIBLE_CORES, parse_cores
from raynium.accelerators.detect import findings
from raynium.accelerators.neuron import DEFAULT_LNC, EFA_FOLDER, LNC
from raynium.config.images import IMAGE_SLOTS
from raynium.errors import LaunchError
from raynium.hardware.catalog import Instance
from raynium.health.host import Check, Host
from raynium.health.releases import RUNTIME_FOLDER, loaded_driver, release_check

TOOLS_FOLDER = "/opt/aws/neuron/bin"
NEURON_LS = (f"{TOOLS_FOLDER}/neuron-ls", "-j")
# neuron-ls opens every device; it answers in a second or two where the driver is well.
TOOL_SECONDS = 20.0

GIB = 2**30
# Below the first a node fails, below the second one with Neuron devices is warned of. Our own judgement, no published
# figures. TorchNeuron keeps its debug output in /tmp/neuron_backend and has filled root
# disks with it (community notes on the beta); AWS's tutorials ask for a 512 GB disk.
MIN_FREE_DISK_GIB = 2.0
LOW_FREE_DISK_GIB = 20.0
# The Neuron runtime's bootstrap refuses longer ones (AWS Neuron docs, runtime FAQ).
MAX_HOST_NAME_CHARS = 63
# 32 ranks of one Trainium node reached the usual limit of 1,024 (aws-neuron-sdk issue 713); AWS sets 65,535.
# Without Neuron it is gloo's or NCCL's connections, a few a peer (our own judgement).
OPEN_FILES_ON_NEURON = 65_535
OPEN_FILES_PER_RANK = 16
# S3 itself refuses requests that are 15 minutes off; logs of nodes are hard to match before.
MAX_CLOCK_SECONDS = 5.0


@dataclass(frozen=True)
class NodeNeeds:
    """What a run will ask of each node.

    accelerator: settled, so never "auto". ranks: of one node. shared_memory_bytes: an estimate. disk_folders: that
    caches, spools and logs go to. instance_type: of the config. own_pids: processes of ours that may hold cores.
    images, copies: of each rank that shared memory holds; of those of another node.
    """

    accelerator: str
    nodes: int
    ranks: int
    shared_memory_bytes: int
    disk_folders: tuple[str, ...]
    instance_type: str | None = None
    own_pids: frozenset[int] = field(default_factory=frozenset)
    images: int = IMAGE_SLOTS
    copies: int = 0

    @property
    def on_neuron(self) -> bool:
        return self.accelerator in ("neuron", "neuron_xla")


def host_checks(host: Host, needs: NodeNeeds) -> list[Check]:
    """Everything about a node that shows without starting a rank, in the order of the checks below. Seconds."""
    checks = [accelerator(host, needs), instance_type(host, needs)]
    if needs.on_neuron:
        devices = neuron_devices(host)
        checks += [driver(host), runtime_libraries(host), release_check(host)]
        checks += [neuron_cores(host, needs, devices), foreign_processes(host, needs, devices)]
    if needs.accelerator == "cuda":
        checks.append(gpu_count(host, needs))
    if needs.accelerator != "cpu":
        checks += [efa_cards(host, needs), locked_memory(host), huge_pages(host), metadata_service(host)]
    checks += [open_files(host, needs), free_disk(host, needs), shared_memory(host, needs), host_name(host)]
    return checks


# ---- the machine and its devices ------------------------------------------------------------------------------------


def accelerator(host: Host, needs: NodeNeeds) -> Check:
    """Packages and devices fit each other, and are those that the config names."""
    finding = next(each for each in findings(host.machine) if each.accelerator == needs.accelerator)
    rule = f"{needs.accelerator} can be used here"
    status = "ok" if finding.usable else "failed"
    return Check("accelerator", status, "; ".join(finding.reasons), rule, "" if finding.usable else "`raynium doctor`")


def instance_type(host: Host, needs: NodeNeeds) -> Check:
    """The node is what cluster.instance_type says. On EC2's Nitro machines the product name is the instance type."""
    name = "instance type"
    found = host.machine.product_name
    if needs.instance_type is None:
        return Check(name, "skipped", found or "unknown", "cluster.instance_type names none")
    rule = f"cluster.instance_type is {needs.instance_type}"
    if found is None:
        return Check(name, "warning", "unknown", rule)
    if found == needs.instance_type:
        return Check(name, "ok", found, rule)
    if host.machine.instance is None:
        return Check(name, "warning", f"{found}, no type of the catalogue", rule)
    remedy = "give the node type that `ray up` starts, or correct cluster.instance_type"
    return Check(name, "failed", found, rule, remedy)


def driver(host: Host) -> Check:
    """The loaded driver is the installed one. modinfo reads the disk and cannot know: after an update whose reload
    failed, the old one still runs.
    """
    name = "neuron driver"
    rule = "the loaded version is the installed one"
    loaded = loaded_driver(host, timeout_seconds=TOOL_SECONDS)
    if loaded is None:
        return Check(name, "warning", "its version shows in neither /sys/module/neuron nor the kernel's log", rule)
    modinfo = host.run("modinfo", "-F", "version", "neuron", timeout_seconds=TOOL_SECONDS)
    if modinfo is None or modinfo.code != 0:
        return Check(name, "ok", f"{loaded} is loaded", "modinfo does not say what is installed")
    installed = modinfo.output.strip()
    if installed == loaded:
        return Check(name, "ok", loaded, rule)
    remedy = "end what uses the devices, then `sudo rmmod neuron && sudo modprobe neuron`, or reboot"
    return Check(name, "warning", f"{loaded} is loaded, {installed} installed", rule, remedy)


def runtime_libraries(host: Host) -> Check:
    """libnrt, which runs what was compiled, and libnccom, its collectives."""
    name = "neuron runtime"
    rule = f"libnrt and libnccom in {RUNTIME_FOLDER}"
    there = host.names(RUNTIME_FOLDER)
    missing = [each for each in ("libnrt", "libnccom") if not any(name.startswith(f"{each}.so") for name in there)]
    if not missing:
        return Check(
            name, "ok", ", ".join(each for each in there if each.startswith(("libnrt.so", "libnccom.so"))), rule
        )
    remedy = "install aws-neuronx-runtime-lib and aws-neuronx-collectives, unless they are somewhere else on purpose"
    return Check(name, "warning", f"no {' and no '.join(missing)}", rule, remedy)


@dataclass(frozen=True)
class NeuronDevices:
    """neuron-ls's answer; without devices, `problem` says why it cannot be used."""

    devices: tuple[dict[str, Any], ...] = ()
    problem: str = ""

    @property
    def num_cores(self) -> int:
        return sum(device["nc_count"] for device in self.devices)


def neuron_devices(host: Host) -> NeuronDevices:
    """Reads `neuron-ls -j` as Neuron 2.33 and earlier answer it; 2.34 is announced to replace it by another format."""
    ran = host.run(*NEURON_LS, timeout_seconds=TOOL_SECONDS)
    if ran is None:
        return NeuronDevices(problem=f"{NEURON_LS[0]} is not installed (aws-neuronx-tools)")
    if ran.code != 0:
        return NeuronDevices(problem=f"neuron-ls ended with {ran.code}: {ran.output.strip()[:200]}")
    try:
        # A warning on stderr may follow the answer.
        devices = json.loads(ran.output[: ran.output.rindex("]") + 1])
        counts = [device["nc_count"] for device in devices]
    except (ValueError, KeyError, TypeError):
        return NeuronDevices(problem="neuron-ls answers in another format than that of Neuron 2.33")
    if not counts:
        return NeuronDevices(problem="neuron-ls lists no device")
    return NeuronDevices(tuple(devices))


def neuron_cores(host: Host, needs: NodeNeeds, listed: NeuronDevices) -> Check:
    """As many chips and logical cores as the instance type has, all with the LNC that the ranks will set."""
    name = "neuron cores"
    machine = host.machine
    if not listed.devices:
        return Check(name, "warning", f"{machine.neuron_devices} device(s); {listed.problem}")
    lncs = sorted({device.get("logical_neuroncore_config", 1) for device in listed.devices})
    shown = f"{len(listed.devices)} chip(s), {listed.num_cores} cores at LNC {'/'.join(map(str, lncs))}"
    instance = machine.instance
    if instance is None:
        return Check(name, "ok", shown, "no type of the catalogue to compare with")
    lnc = 1 if instance.chip == "trainium1" else int(host.environment.get(LNC, DEFAULT_LNC))
    cores = _cores_at(instance, lnc)
    rule = f"{instance.name} has {instance.chips} chip(s), {cores} cores at LNC {lnc}"
    if lncs != [lnc]:
        remedy = f"set {LNC}={lnc} for the whole node, or the same other value for the node and the job"
        return Check(name, "failed", shown, rule, remedy)
    if (len(listed.devices), listed.num_cores) != (instance.chips, cores):
        return Check(name, "failed", shown, rule, "reload the driver or reboot; if chips are still missing, replace it")
    return Check(name, "ok", shown, rule)


def _cores_at(instance: Instance, lnc: int) -> int:
    """The catalogue counts logical cores at the default LNC."""
    return instance.cores if instance.chip == "trainium1" else instance.cores * int(DEFAULT_LNC) // lnc


def foreign_processes(host: Host, needs: NodeNeeds, listed: NeuronDevices) -> Check:
    """Nobody else holds this job's cores. neuron-ls lists processes by chip: on a chip that the job shares, it may be
    the other job's, so there it is a warning.
    """
    name = "foreign processes"
    rule = "no other process on the cores of this job"
    if not listed.devices:
        return Check(name, "skipped", listed.problem, rule)
    granted = host.environment.get(VISIBLE_CORES)
    try:
        mine = set(parse_cores(granted)) if granted else set(range(listed.num_cores))
    except LaunchError as error:
        return Check(name, "failed", str(error), rule)
    surely, perhaps = [], []
    for number, device in enumerate(listed.devices):
        cores = set(_core_ids(device, number))
        for process in device.get("neuron_processes", []):
            if process["pid"] in needs.own_pids or not cores & mine:
                continue
            text = f"pid {process['pid']} ({process.get('command', '?')}) on chip {device.get('neuron_device', number)}"
            (surely if cores <= mine else perhaps).append(text)
    if surely:
        return Check(name, "failed", ", ".join(surely), rule, "end it, or wait for it")
    if perhaps:
        return Check(name, "warning", f"{', '.join(perhaps)}, which this job has in part", rule)
    return Check(name, "ok", "none", rule)


def _core_ids(device: dict[str, Any], number: int) -> list[int]:
    """Cores are numbered through over the chips; older neuron-ls does not list them."""
    count = device["nc_count"]
    return device.get("neuroncore_ids") or list(range(number * count, (number + 1) * count))


def gpu_count(host: Host, needs: NodeNeeds) -> Check:
    gpus = host.machine.gpus
    rule = f"{needs.ranks} rank(s), one GPU each"
    if gpus >= needs.ranks:
        return Check("GPUs", "ok", str(gpus), rule)
    return Check("GPUs", "failed", str(gpus), rule, "lower cluster.ranks_per_node, or look at the driver (nvidia-smi)")


# ---- the network between nodes ------------------------------------------------------------------------------------


def efa_cards(host: Host, needs: NodeNeeds) -> Check:
    """Every EFA card of the type has an interface: each that lacks one costs its share of the bandwidth."""
    name = "EFA cards"
    cards = host.names(str(EFA_FOLDER))
    instance = host.machine.instance
    expected = instance.efa_interfaces if instance is not None else None
    if needs.nodes == 1:
        return Check(name, "skipped", str(len(cards)), "one node needs none")
    if instance is None or expected is None:
        return Check(name, "skipped", str(len(cards)), "no count of the catalogue to compare with")
    rule = f"{instance.name} has {expected}"
    remedy = (
        "start nodes from a file of `raynium cluster render`, which asks for an interface on every card; a container "
        "must be given /dev/infiniband"
    )
    if len(cards) != expected:
        # A type whose bandwidth nobody has published may have been bought without any.
        status = "failed" if instance.efa_gbps else "warning"
        return Check(name, status, str(len(cards)), rule, remedy)
    if not cards:
        return Check(name, "ok", "0", rule)
    asked = host.run("fi_info", "-p", "efa", timeout_seconds=TOOL_SECONDS)
    asked = asked or host.run("/opt/amazon/efa/bin/fi_info", "-p", "efa", timeout_seconds=TOOL_SECONDS)
    if asked is not None and asked.code != 0:
        broken = f"{len(cards)}, but fi_info ended with {asked.code}: {asked.output.strip()[:200]}"
        return Check(
            name, "failed", broken, rule, "install libfabric with AWS's EFA installer, on the host and in the image"
        )
    return Check(name, "ok", str(len(cards)), rule)


def locked_memory(host: Host) -> Check:
    """EFA registers memory with the card, which keeps it from being swapped."""
    name = "locked memory"
    rule = "unlimited where there are EFA cards"
    match = re.search(r"Max locked memory\s+(\S+)", host.read("/proc/self/limits") or "")
    limit = match[1] if match else "unknown"
    if not host.names(str(EFA_FOLDER)):
        return Check(name, "skipped", f"{limit}; no EFA card", rule)
    if limit in ("unlimited", "unknown"):
        return Check(name, "ok" if match else "skipped", limit, rule)
    remedy = (
        "`ulimit -l unlimited` before `ray start`, or memlock in /etc/security/limits.conf; --ulimit of a container"
    )
    return Check(name, "warning", f"{int(limit) / 2**20:.0f} MiB", rule, remedy)


def open_files(host: Host, needs: NodeNeeds) -> Check:
    """Every rank connects to every other one of its groups, and each connection is a file."""
    name = "open files"
    least = OPEN_FILES_ON_NEURON if needs.on_neuron else OPEN_FILES_PER_RANK * needs.ranks * needs.nodes
    rule = f"{least:,} a process, or more"
    match = re.search(r"Max open files\s+(\S+)", host.read("/proc/self/limits") or "")
    if match is None:
        return Check(name, "skipped", "unknown", rule)
    if match[1] == "unlimited" or int(match[1]) >= least:
        return Check(name, "ok", match[1], rule)
    remedy = f"`ulimit -n {least}` before `ray start`, or nofile in /etc/security/limits.conf; --ulimit of a container"
    return Check(name, "warning", match[1], rule, remedy)


def huge_pages(host: Host) -> Check:
    """libfabric takes its buffers for EFA from the kernel's huge pages, which the EFA installer sets aside. Without any
    it takes ordinary ones, of which a card can register only so many (libfabric issue 9739).
    """
    name, rule = "huge pages", "some free where there are EFA cards"
    if not host.names(str(EFA_FOLDER)):
        return Check(name, "skipped", "no EFA card", rule)
    counts = dict(re.findall(r"^(HugePages_Total|HugePages_Free):\s+(\d+)", host.read("/proc/meminfo") or "", re.M))
    if len(counts) != 2:
        return Check(name, "skipped", "unknown", rule)
    found = f"{counts['HugePages_Free']} of {counts['HugePages_Total']} free"
    if int(counts["HugePages_Free"]):
        return Check(name, "ok", found, rule)
    remedy = "run AWS's EFA installer on the host, which sets some aside; a container shares the host's"
    return Check(name, "warning", found, rule, remedy)


def metadata_service(host: Host) -> Check:
    """An instance profile's credentials, which reading and writing S3 needs, come through EC2's metadata service."""
    name, rule = "instance metadata", "version 2 answers, version 1 does not"
    service = host.metadata_service()
    if service is None:
        return Check(name, "skipped", "not an EC2 instance", rule)
    change = "aws ec2 modify-instance-metadata-options --instance-id i-… --http-endpoint enabled"
    if not service.gives_token:
        answers = "only version 1 answers" if service.answers_without_token else "it does not answer"
        remedy = f"{change} --http-tokens required; with --http-put-response-hop-limit 2 if this is a container"
        return Check(name, "warning", answers, rule, remedy)
    found = f"credentials of role {service.role}" if service.role else "no instance profile: it gives no credentials"
    if service.answers_without_token:
        return Check(name, "warning", f"version 1 answers too; {found}", rule, f"{change} --http-tokens required")
    return Check(name, "ok", found, rule)


def host_name(host: Host) -> Check:
    name = "host name"
    found = (host.read("/proc/sys/kernel/hostname") or "").strip()
    rule = f"at most {MAX_HOST_NAME_CHARS} characters"
    if not found:
        return Check(name, "skipped", "unknown", rule)
    if len(found) <= MAX_HOST_NAME_CHARS:
        return Check(name, "ok", found, rule)
    return Check(name, "failed", f"{found}, {len(found)} characters", rule, "`sudo hostnamectl set-hostname SHORTER`")


# ---- memory and disks ----------------------------------------------------------------------------------------------


def free_disk(host: Host, needs: NodeNeeds) -> Check:
    """Room for caches, metric spools and logs."""
    name = "free disk"
    free = {folder: found for folder in needs.disk_folders if (found := host.free_bytes(folder)) is not None}
    if not free:
        return Check(name, "skipped", "unknown")
    folder = min(free, key=lambda each: free[each])
    gib = free[folder] / GIB
    found = f"{gib:.1f} GiB at {folder}"
    remedy = "empty it, take a larger root disk, or set TMPDIR and the caches' folders to a disk of the instance"
    if gib < MIN_FREE_DISK_GIB:
        return Check(name, "failed", found, f"{MIN_FREE_DISK_GIB:g} GiB", remedy)
    if needs.on_neuron and gib < LOW_FREE_DISK_GIB:
        return Check(name, "warning", found, f"{LOW_FREE_DISK_GIB:g} GiB for compiled graphs", remedy)
    return Check(name, "ok", found, f"{MIN_FREE_DISK_GIB:g} GiB")


def shared_memory(host: Host, needs: NodeNeeds) -> Check:
    """/dev/shm holds the images of every rank of the node, and the copies of another node's."""
    name = "shared memory"
    free = host.free_bytes("/dev/shm")
    need = needs.shared_memory_bytes
    copies = f" and {needs.copies} copies of as many of another node's" if needs.copies else ""
    rule = f"{needs.images} snapshots of {needs.ranks} rank(s){copies}, {need / GIB:.2f} GiB (estimate)"
    if free is None:
        return Check(name, "skipped", "unknown", rule)
    found = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free >= need:
        return Check(name, "ok", found, rule)
    remedy = (
        f"`sudo mount -o remount,size={-(-need // GIB) + 1}G /dev/shm` (a container: --shm-size), more nodes, or a "
        "machine with more memory"
    )
    if needs.copies:
        remedy += "; or no copies (fault.buddy_copies)"
    return Check(name, "failed", found, rule, remedy)


def compile_cache(folder: str) -> Check:
    """A cache folder takes a file and gives it back. It writes, so it is not part of `host_checks`."""
    name, rule = "compile cache", "a folder that ranks can write"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
            probe.flush()
            probe.seek(0)
            whole = probe.read() == b"probe"
    except OSError as error:
        whole, folder = False, f"{folder}: {error.strerror}"
    remedy = "" if whole else "give this user the folder, or set the cache's variable to another one"
    return Check(name, "ok" if whole else "failed", folder, rule, remedy)
