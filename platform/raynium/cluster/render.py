"""`ray up` files and IAM policies as text: one template each, filled from the hardware catalogue and a site."""

import difflib
import re
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from raynium.cluster.site import Site
from raynium.errors import ConfigError
from raynium.hardware.catalog import CPU_INSTANCES, INSTANCES, CpuInstance, Instance, Market

_UBUNTU = "resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
# What EC2 itself looks up in AWS's public parameters when an instance starts. The head runs the workers' image, so that
# Python, torch and Ray are the same everywhere.
# Trainium1: the last image with torch 2.9 on torch-xla; no longer renewed since Neuron SDK 2.31. Read 2026-11-23.
# Trainium2: the TorchNeuron image of Neuron SDK 2.33, its parameter by AWS's rule <framework>-<version>/<os>, not seen
# listed anywhere. A parameter that does not exist is refused by EC2 before anything starts: see the runbook, step 3.
_IMAGES = {
    "trainium1": "resolve:ssm:/aws/service/neuron/dlami/pytorch-2.9/ubuntu-24.04/latest/image_id",
    "trainium2": "resolve:ssm:/aws/service/neuron/dlami/torch-neuronx-2.14.0/ubuntu-24.04/latest/image_id",
}
IMAGE = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:/?[A-Za-z0-9._/-]+")
RESERVATION = re.compile(r"cr-[0-9a-f]{8,17}")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The nodes that train. market "capacity-block" needs `reservation`; such nodes are paid for, and all start.

    image: an AMI id or resolve:ssm:PARAMETER in place of the type's own.
    """

    instance_type: str
    max_workers: int = 2
    min_workers: int = 0
    market: Market = "on-demand"
    reservation: str | None = None
    image: str | None = None


def render_cluster(site: Site, workers: Workers) -> str:
    """The text of a `ray up` file. Raises ConfigError with every problem of `workers`."""
    if problems := _problems(workers):
        raise ConfigError(problems)
    instance = _node_type(workers.instance_type)
    image = workers.image or (_IMAGES[instance.chip] if isinstance(instance, Instance) else _UBUNTU)
    block = workers.market == "capacity-block"
    template = Template((files("raynium.cluster") / "template.yaml").read_text(encoding="utf-8"))
    return template.substitute(
        site.model_dump(),
        title=_title(instance, workers),
        arguments=_arguments(workers),
        max_workers=workers.max_workers,
        min_workers=workers.max_workers if block else workers.min_workers,
        head_image=image,
        image=image,
        instance_type=instance.name,
        resources=_resources(instance),
        placement=_placement(site, workers),
        market=_market(workers),
        network_interfaces=_network_interfaces(site, instance),
        node_kind="neuron" if isinstance(instance, Instance) else "cpu",
    )


def _node_type(name: str) -> Instance | CpuInstance:
    return INSTANCES[name] if name in INSTANCES else CPU_INSTANCES[name]


def _renderable() -> list[str]:
    """Types a file can be rendered for: Trainium that EC2 offers under its name, and plain hosts."""
    return [each.name for each in INSTANCES.values() if each.chip in _IMAGES] + list(CPU_INSTANCES)


def _problems(workers: Workers) -> list[str]:
    """All that speaks against rendering, one message each."""
    names = _renderable()
    if workers.instance_type not in names:
        near = difflib.get_close_matches(workers.instance_type, names, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        return [f"no cluster file can be rendered for instance type {workers.instance_type!r}: {hint}"]
    instance = _node_type(workers.instance_type)
    problems = []
    markets = instance.markets if isinstance(instance, Instance) else ("on-demand", "spot")
    if workers.market not in (markets or ()):
        offered = ", ".join(markets or ())
        problems.append(f"market is {workers.market!r}, but EC2 sells {instance.name} as {offered}: take one of them")
    if not 1 <= workers.max_workers <= 1000:
        problems.append(f"max_workers is {workers.max_workers}; it must be 1 to 1000")
    if not 0 <= workers.min_workers <= workers.max_workers:
        problems.append(f"min_workers is {workers.min_workers}; it must be 0 to max_workers, {workers.max_workers}")
    block = workers.market == "capacity-block"
    if block and not (workers.reservation and RESERVATION.fullmatch(workers.reservation)):
        problems.append(
            f"reservation is {workers.reservation!r}; a Capacity Block is started by the id of its reservation, like "
            "cr-0123456789abcdef0 (aws ec2 describe-capacity-reservations)"
        )
    if block and workers.min_workers:
        problems.append(f"min_workers is {workers.min_workers}; all nodes of a Capacity Block start: leave it out")
    if workers.reservation and not block:
        problems.append(f"reservation is {workers.reservation!r}, which only market capacity-block uses: leave it out")
    if workers.image is not None and not IMAGE.fullmatch(workers.image):
        problems.append(f"image is {workers.image!r}; it must be an id, ami-…, or resolve:ssm: and a parameter's name")
    return problems


# ------------------------------------------------------------------------------------------------- parts of the file


def _title(instance: Instance | CpuInstance, workers: Workers) -> str:
    how = {"on-demand": "on demand", "spot": "spot", "capacity-block": "from a Capacity Block"}[workers.market]
    if isinstance(instance, CpuInstance):
        return f"A CPU head and up to {workers.max_workers} × {instance.name} {how}: {instance.vcpus} CPU ranks each."
    cores = f"{instance.cores} {'logical ' if instance.chip != 'trainium1' else ''}NeuronCores"
    return f"A CPU head and up to {workers.max_workers} × {instance.name} {how}: {cores} each."


def _arguments(workers: Workers) -> str:
    """The command line that renders these workers again."""
    words = [workers.instance_type]
    for option, value, default in (
        ("max-workers", workers.max_workers, 2),
        ("min-workers", workers.min_workers, 0),
        ("market", workers.market, "on-demand"),
        ("reservation", workers.reservation, None),
        ("image", workers.image, None),
    ):
        if value != default:
            words += [f"--{option}", str(value)]
    return " ".join(words)


def _resources(instance: Instance | CpuInstance) -> str:
    parts = {"CPU": instance.vcpus}
    if isinstance(instance, Instance):
        # The second is what Ray itself adds to Neuron nodes that it knows.
        parts |= {"neuron_cores": instance.cores, '"accelerator_type:aws-neuron-core"': 1}
    return ", ".join(f"{name}: {count}" for name, count in parts.items())


def _placement(site: Site, workers: Workers) -> str:
    # Instances of a Capacity Block stand together as it is, in one UltraCluster.
    if workers.market == "capacity-block":
        return ""
    return f"      Placement: {{GroupName: {site.cluster_name}}}\n"


def _market(workers: Workers) -> str:
    if workers.market == "on-demand":
        return ""
    if workers.market == "spot":
        # A placement group takes no spot instance that would stop or hibernate.
        options = "{SpotInstanceType: one-time, InstanceInterruptionBehavior: terminate}"
        return f"      InstanceMarketOptions: {{MarketType: spot, SpotOptions: {options}}}\n"
    target = f"{{CapacityReservationTarget: {{CapacityReservationId: {workers.reservation}}}}}"
    return (
        "      InstanceMarketOptions: {MarketType: capacity-block}\n"
        f"      CapacityReservationSpecification: {target}\n"
    )


def _network_interfaces(site: Site, instance: Instance | CpuInstance) -> str:
    """One interface per network card with EFA; the first also carries IP, the others only EFA and take no address.

    Device index: 0 on card 0, 1 on every other, as Neuron's guide for multi-node Trn1 has it. With several interfaces
    EC2 gives no public address; with one it must be told so.
    """
    num_efa = (instance.efa_interfaces or 0) if isinstance(instance, Instance) else 0
    where = f"SubnetId: {site.subnet}, Groups: [{site.security_group}], DeleteOnTermination: true"
    lines = []
    for card in range(max(1, num_efa)):
        place = f"NetworkCardIndex: {card}, DeviceIndex: {min(card, 1)}"
        kind = "interface" if num_efa == 0 else "efa" if card == 0 else "efa-only"
        private = ", AssociatePublicIpAddress: false" if num_efa <= 1 else ""
        lines.append(f"        - {{{place}, InterfaceType: {kind}, {where}{private}}}")
    return "\n".join(lines)
