"""What Ray Train runs on each node: the node agent, and how it reaches the coordinator."""

import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import ray
import ray.exceptions
import ray.train

from raynium.accelerators.detect import detect
from raynium.config.schema import Config
from raynium.health.metadata_service import this_instance
from raynium.launch.backend import ATTEMPT_VARIABLE, INCARNATION_VARIABLE
from raynium.node.agent import Node, NodeAgent
from raynium.node.node_log import log_to_file
from raynium.node.node_zero import refuse_displaced
from raynium.node.ranks import drop_sockets
from raynium.node.readmission import Readmission
from raynium.run.fence import Fence, FenceWatch
from raynium.run.protocol import (
    AgentEvent,
    AgentInfo,
    Commit,
    GoHome,
    MaySend,
    News,
    NodeEnded,
    Order,
    Said,
    StandBy,
    Verdict,
)
from raynium.storage.store import Store

# A driver that is killed leaves an agent that Ray has yet to end, while the next driver's may start beside it: they may
# not both send metrics from one folder.
AGENT_BEFORE_SECONDS = 60.0

# Of a node (`ray start --labels`, `ray up`, KubeRay). Ray has no word of its own for the second.
ZONE_LABEL = "ray.io/availability-zone"
PLACEMENT_GROUP_LABEL = "placement-group"

# For the store to say whether this node was found bad.
MARK_SECONDS = 30.0


@dataclass(frozen=True)
class RayCoordinator:
    """The coordinator as node agents reach it: a Ray actor. See `protocol.Coordinator`."""

    actor: Any

    def join(self, agent: AgentInfo) -> "Future[Order | StandBy | GoHome]":
        return self.actor.join.remote(agent).future()

    def watch(self, agent: AgentInfo, order: Order, *, stop_known: bool) -> "Future[Verdict]":
        return self.actor.watch.remote(agent, order, stop_known=stop_known).future()

    def exited(self, agent: AgentInfo, order: Order, ended: NodeEnded) -> "Future[None]":
        return self.actor.exited.remote(agent, order, ended).future()

    def commits(self, sent: Commit | None) -> "Future[list[Commit] | None]":
        return self.actor.commits.remote(sent).future()

    def tell(self, event: AgentEvent) -> "Future[News]":
        return self.actor.tell.remote(event).future()


def run_agent(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each node. Referenced by name: it lives in the package, not in a job script."""
    from raynium.data.access import fetch_stores
    from raynium.tracking.sender import MlflowTracker

    config = Config.model_validate(settings["config"])
    fence = Fence(Store(settings["run_url"]), settings["claim_number"])
    context = ray.train.get_context()
    scratch = settings["scratch"]
    # Of an agent that replaces another, Ray Train counts the node anew.
    seat = context.get_world_rank()
    host, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    log_to_file(settings["run_url"], seat)
    coordinator = RayCoordinator(settings["coordinator"])
    who = MaySend(os.environ[ATTEMPT_VARIABLE], seat, int(os.environ[INCARNATION_VARIABLE]))

    def may_send() -> None:
        fence.check()
        refuse_displaced(coordinator, who)

    # Of text, though its annotation has lists.
    labels = cast(dict[str, str], ray.get_runtime_context().get_node_labels())
    # Each time that it is asked.
    root = Store(settings["run_url"].rpartition("/")[0], limit_seconds=MARK_SECONDS)
    readmission = Readmission(config, root, host=host, node_id=node_id, tell=lambda text: coordinator.tell(Said(text)))
    agent = NodeAgent(
        config=config,
        run_url=settings["run_url"],
        node=Node(
            attempt=who.attempt,
            seat=seat,
            nodes=settings["nodes"],
            host=host,
            incarnation=who.incarnation,
            node_id=node_id,
            zone=labels.get(ZONE_LABEL, ""),
            placement_group=labels.get(PLACEMENT_GROUP_LABEL, ""),
            # Where nobody answers, asking takes two seconds.
            instance=None if config.fault.bad_instance == "keep" else this_instance(),
        ),
        accelerator=detect(config.cluster.accelerator),
        coordinator=coordinator,
        open_tracker=lambda: MlflowTracker(
            # Nodes of one machine, which tests have, share no disk either.
            f"{scratch}/spool/{host}/{settings['mlflow_run_id']}",
            uri=settings["mlflow_uri"],
            run_id=settings["mlflow_run_id"],
            may_send=may_send,
            away=lambda text: coordinator.tell(Said(text, "mlflow", host)),
            wait_seconds=AGENT_BEFORE_SECONDS,
        ),
        data_places=lambda: fetch_stores(config.data, f"{scratch}/data"),
        secret=settings["secret"],
        wait_for_admission=readmission.wait,
    )
    try:
        # One node's ranks are enough: without them the others' end too. Which node has rank 0 changes.
        with FenceWatch(fence, agent.taken_over, is_its_turn=lambda: agent.node_rank == 0):
            agent.run()
    except Exception as error:
        # Ray Train starts the agents again, and shows the cause to nobody.
        words = " ".join(str(error).split())
        coordinator.tell(Said(f"node {seat}: the agent failed: {type(error).__name__}: {words}"))
        raise
    finally:
        # Ray ends this process as it likes, without what Python does at its end.
        drop_sockets()
