"""The nodes of a Ray cluster as a run sees them: what it asks of one, which have it, and what is missing."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import (  # pyright: ignore[reportAttributeAccessIssue]
    ActorTableData,  # pyright: ignore[reportAttributeAccessIssue]
    PlacementGroupTableData,  # pyright: ignore[reportAttributeAccessIssue]
)
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raynium.config.schema import Config
from raynium.errors import some

NODE_ID_LABEL = "ray.io/node-id"
CORE_RESOURCES = ("CPU", "GPU", "neuron_cores")
# How long Ray may look for nodes before the user is told what is missing, and how often what changed.
WAITING_SECONDS = 20.0
# In Ray's key-value store: job id → run name.
JOB_NAMES = "raynium-runs"


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


def node_hosts() -> dict[str, str]:
    """Id → address of the living nodes."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


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


def draining_nodes() -> dict[str, float | None]:
    """Id → until when (Unix time), if that was said, of the nodes that somebody has drained (`ray drain-node`)."""
    return {node_id: deadline / 1000 or None for node_id, deadline in state.get_draining_nodes().items()}


def name_job(run_name: str) -> None:
    """Says whose this driver's resources are, to others that wait for them."""
    _internal_kv_put(ray.get_runtime_context().get_job_id(), run_name, namespace=JOB_NAMES)


def raylet_address() -> str:
    """Of this node, host:port."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


class Waiting:
    """A wait for nodes: tells, after a while, why they do not come, and again when that has changed."""

    def __init__(self, config: Config, tell: Callable[[str], None], *, besides: Collection[str] = ()):
        """tell: a line for the user's terminal. besides: ids of nodes that the run does without, as of each look."""
        self._config = config
        self._tell, self._besides = tell, besides
        self._told: str | None = None
        self._next = time.monotonic() + WAITING_SECONDS

    def look(self, *, waits: bool = True) -> None:
        """waits: whether nodes are waited for at this moment."""
        now = time.monotonic()
        if not waits:
            self._next = now + WAITING_SECONDS
            return
        if now < self._next:
            return
        self._next = now + WAITING_SECONDS
        message = waiting_message(self._config, besides=self._besides)
        if message is not None and message != self._told:
            self._told = message
            self._tell(message)


def patient(
    config: Config, *, go_on: Callable[[], bool], tell: Callable[[str], None], besides: Collection[str] = ()
) -> Callable[[], bool]:
    """`go_on`, for a wait for nodes: it also tells, if they do not come, what they are waited for."""
    waiting = Waiting(config, tell, besides=besides)

    def wait() -> bool:
        waiting.look()
        return go_on()

    return wait


@dataclass(frozen=True)
class NodeUse:
    """A living node: of each resource what it has, and what is free or this driver's own. held: by whom, how much.

    left_out: the run does without it.
    """

    host: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    held: Mapping[str, Mapping[str, float]]
    left_out: bool = False

    def has_free(self, asked: Mapping[str, float]) -> bool:
        return not self.left_out and all(self.free.get(name, 0) >= amount for name, amount in asked.items())

    def shortage(self, asked: Mapping[str, float]) -> str:
        """`2 of 3 free, 1 held by run tiny`, of each resource that is short; its name only where several are asked."""
        if self.left_out:
            return "left out as a bad one"
        parts = []
        for name, amount in asked.items():
            free, total = self.free.get(name, 0), self.total.get(name, 0)
            if free >= amount:
                continue
            holders = {who: held[name] for who, held in self.held.items() if held.get(name)}
            if rest := total - free - sum(holders.values()):
                holders["others"] = rest
            unit = f" {name}" if len(asked) > 1 else ""
            parts += [
                f"{free:g} of {total:g}{unit} free",
                *(f"{held:g} held by {who}" for who, held in holders.items()),
            ]
        return ", ".join(parts)


def waiting_message(config: Config, *, besides: Collection[str] = ()) -> str | None:
    """What is free of what the run asks for, and who holds the rest; None: there is enough, and agents are starting.

    besides: ids of nodes that the run does without.
    """
    return shortage(node_resources(config), config.cluster.seats, _node_uses(besides))


def shortage(asked: Mapping[str, float], num_nodes: int, nodes: Sequence[NodeUse]) -> str | None:
    """Why not `num_nodes` of these nodes have free what is asked of each; None: they have."""
    short = [node for node in nodes if not node.has_free(asked)]
    if len(nodes) - len(short) >= num_nodes:
        return None
    amounts = " and ".join(f"{amount:g} {name}" for name, amount in asked.items())
    fitting = sum(
        not node.left_out and all(node.total.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes
    )
    if len(nodes) == 1 and num_nodes == 1:
        message = f"waiting for {amounts}: {nodes[0].shortage(asked)}"
    else:
        on = f"waiting for {num_nodes} node{'s' if num_nodes > 1 else ''} with {amounts}"
        found = [f"{node.host}: {node.shortage(asked)}" for node in short]
        message = f"{on}: {len(nodes) - len(short)} of {len(nodes)} have them free"
        message += f"; {some(found, mark='; ')}" if found else ""
    if fitting < num_nodes:
        message += f". Only {fitting} of the cluster's nodes {'has' if fitting == 1 else 'have'} as much at all: "
        message += "another must come, or set cluster.nodes and cluster.ranks_per_node to what there is"
    return message


def own_nodes() -> set[str]:
    """Ids of the nodes that this driver cannot live without: its own, and the cluster's head."""
    heads = {node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]}
    return heads | {ray.get_runtime_context().get_node_id()}


def users_of(node_id: str) -> list[str]:
    """Who else holds something of a node."""
    hosts = node_hosts()
    return sorted({who for node in _node_uses() if node.host == hosts.get(node_id) for who in node.held})


def release_nodes() -> None:
    """Gives back what this driver's placement groups hold: of a controller that was killed, Ray keeps it for ever.

    Ray Train leaves that to an actor which asks the dashboard, and where there is none it never learns of the death.
    """
    mine = ray.get_runtime_context().get_job_id()
    for group in _placement_groups():
        if group.creator_job_id.hex() == mine and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def end_controllers() -> None:
    """Of this driver's Ray Train that live: one may wait for ever for a node. `fit()` raises then."""
    mine = ray.get_runtime_context().get_job_id()
    for text in state._connect_and_get_accessor().get_actor_table(None, None):
        actor = ActorTableData.FromString(text)
        is_controller = actor.class_name == "TrainController" and actor.job_id.hex() == mine
        if is_controller and actor.state == ActorTableData.ALIVE:
            global_worker.core_worker.kill_actor(  # pyright: ignore[reportAttributeAccessIssue]
                ray.ActorID(actor.actor_id), True
            )


def _placement_groups() -> list[Any]:
    table = state._connect_and_get_accessor().get_placement_group_table()
    return [PlacementGroupTableData.FromString(text) for text in table]


def _node_uses(besides: Collection[str] = ()) -> list[NodeUse]:
    mine = ray.get_runtime_context().get_job_id()
    held: dict[str, dict[str, dict[str, float]]] = {}
    own: dict[str, dict[str, float]] = {}
    for group in _placement_groups():
        if group.state != PlacementGroupTableData.CREATED:
            continue
        job_id = group.creator_job_id.hex()
        name = _internal_kv_get(job_id, namespace=JOB_NAMES)
        who = f"run {name.decode()}" if name else f"Ray job {job_id}"
        for bundle in group.bundles:
            node_id = bundle.node_id.hex()
            amounts = (
                own.setdefault(node_id, {}) if job_id == mine else held.setdefault(node_id, {}).setdefault(who, {})
            )
            for resource, amount in bundle.unit_resources.items():
                amounts[resource] = amounts.get(resource, 0) + amount
    free = available_resources_per_node()
    return [
        NodeUse(
            node["NodeManagerAddress"],
            node["Resources"],
            {
                resource: free.get(node["NodeID"], {}).get(resource, 0) + own.get(node["NodeID"], {}).get(resource, 0)
                for resource in node["Resources"]
            },
            held.get(node["NodeID"], {}),
            left_out=node["NodeID"] in besides,
        )
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(resource) for resource in CORE_RESOURCES)
    ]
