"""The nodes of a Ray cluster as a run sees them: what it asks of one, which have it, and what is missing."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import ray
from ray._private.state import available_resources_per_node

from raynium.config.schema import Config

NODE_ID_LABEL = "ray.io/node-id"
CORE_RESOURCES = ("CPU", "GPU", "neuron_cores")
WAITING_SECONDS = 20.0  # how long Ray may look for nodes before the user is told what is missing


def node_resources(config: Config) -> dict[str, float]:
    """What one node agent asks of Ray: all cores that its ranks will use."""
    ranks = config.cluster.ranks_per_node
    match config.cluster.accelerator:
        case "cpu":
            return {"CPU": ranks}
        case "cuda":
            return {"CPU": 1, "GPU": ranks}
        case "neuron" | "neuron_xla":
            return {"CPU": 1, "neuron_cores": ranks}
        case "auto":
            raise AssertionError("launch/settle.py settles it")


def fitting_nodes(resources: Mapping[str, float]) -> list[str]:
    """Ids of the living nodes that have these resources in all, free or not."""
    return [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in resources.items())
    ]


def free_nodes(resources: Mapping[str, float], *, besides: Collection[str]) -> list[str]:
    """Ids of those `fitting_nodes` that have these resources free at this moment, without asking Ray for any: a request
    that waits makes an autoscaler buy nodes.
    """
    free = available_resources_per_node()
    return [
        node_id
        for node_id in fitting_nodes(resources)
        if node_id not in besides
        and all(free.get(node_id, {}).get(name, 0) >= amount for name, amount in resources.items())
    ]


def label_selector(excluded: Sequence[str]) -> dict[str, str]:
    """What a placement asks of its nodes, so that it avoids some. Nodes that do not exist yet pass."""
    return {NODE_ID_LABEL: f"!in({','.join(sorted(excluded))})"} if excluded else {}


def patient(config: Config, *, go_on: Callable[[], bool], tell: Callable[[str], None]) -> Callable[[], bool]:
    """`go_on`, for a wait for nodes: it also tells, once, when they do not come, what they are waited for."""
    began = time.monotonic()
    told = False

    def wait() -> bool:
        nonlocal told
        if time.monotonic() - began > WAITING_SECONDS and not told:
            told = True
            tell(waiting_message(config))
        return go_on()

    return wait


def waiting_message(config: Config) -> str:
    """What was asked of Ray, and what the cluster has."""
    nodes = [
        ", ".join(f"{value:g} {key}" for key, value in sorted(node["Resources"].items()) if key in CORE_RESOURCES)
        for node in ray.nodes()
        if node["Alive"]
    ]
    asked = ", ".join(f"{value:g} {key}" for key, value in node_resources(config).items())
    return (
        f"waiting for {config.cluster.nodes} node(s) with {asked} free each; the cluster has {len(nodes)}: "
        f"({'), ('.join(nodes)}). It goes on when they are there: the autoscaler adds them, or another job ends"
    )
