"""Our Ray Train backend: one node agent per node, and a name for each life of the worker group. Sets environment only.

An agent that dies is replaced alone, in its seat of the worker group and of its placement group: what Ray Train does
for a backend that has replica groups. The other agents keep their ranks' template, snapshots and uploads.

An exception in `on_start` would leave the worker group and its placement group behind, holding the cores for ever
(Ray 2.60); so it cleans up itself and raises the one error that Ray Train retries.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup

from raynium.storage.arrow import arrow_place
from raynium.storage.store import Store

# `worker.run_agent` reads both in each worker; as in AgentInfo.
ATTEMPT_VARIABLE = "RAYNIUM_ATTEMPT"
INCARNATION_VARIABLE = "RAYNIUM_INCARNATION"


def trainer_name(number: int) -> str:
    """Of a driver's Ray Train controllers, from 0 on. Sorts before the names of later ones, and of all their attempts:
    whoever has only the two names, as a coordinator that was started again, knows which is the newer.
    """
    return f"{number:06d}"


@dataclass
class NodeAgentConfig(BackendConfig):
    """Backend of the workers that run node agents. coordinator: of the run, a Ray actor. trainer: see above."""

    coordinator: Any
    trainer: str

    @property
    def backend_cls(self) -> type["NodeAgentBackend"]:
        return NodeAgentBackend


class NodeAgentBackend(Backend):
    """Checks the placement and names the attempt. One per controller."""

    has_replica_groups = True

    def __init__(self) -> None:
        self._attempts = 0
        self._attempt = ""
        # Seat → how many agents had it before, in this attempt.
        self._incarnations: Counter[int] = Counter()

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, NodeAgentConfig)
        if isinstance(worker_group, ReplicaGroup):
            (seat,) = _seats(worker_group)
            self._incarnations[seat] += 1
            placed = {seat: self._incarnations[seat]}
            ray.get(backend_config.coordinator.agents_placed.remote(self._attempt, placed))
            worker_group.execute(_set_environment, self._environment(self._incarnations[seat]))
            return
        node_ids = worker_group.execute(_node_id)
        crowded = [node_id for node_id, count in Counter(node_ids).items() if count > 1]
        if crowded:
            worker_group._clear_state()
            raise ray.train.WorkerGroupError(
                f"Ray placed {len(node_ids)} node agents on {len(set(node_ids))} node(s); the rule is one per node. "
                f"Set cluster.nodes to the number of nodes that have cluster.ranks_per_node free cores",
                worker_failures={},
            )
        self._attempts += 1
        self._attempt = f"{backend_config.trainer}-{self._attempts:06d}"
        self._incarnations.clear()
        # This counts those whose agents never join, too.
        ray.get(backend_config.coordinator.agents_placed.remote(self._attempt))
        worker_group.execute(_set_environment, self._environment(0))

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Of an agent that has died the others hear before Ray looks for a place for the next one."""
        assert isinstance(backend_config, NodeAgentConfig)
        if isinstance(worker_group, ReplicaGroup):
            lost = {seat: self._incarnations[seat] for seat in _seats(worker_group)}
            backend_config.coordinator.agents_lost.remote(self._attempt, lost)

    def _environment(self, incarnation: int) -> dict[str, str]:
        return {ATTEMPT_VARIABLE: self._attempt, INCARNATION_VARIABLE: str(incarnation)}


def _seats(group: ReplicaGroup) -> list[int]:
    return [each.distributed_context.world_rank for each in group.get_workers() if each.distributed_context is not None]


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def ray_storage(store: Store) -> dict[str, Any]:
    """Where Ray Train keeps its own small state: beside the run, on the same file system."""
    path, file_system = arrow_place(store.child("ray"))
    return {"storage_path": path} | ({"storage_filesystem": file_system} if file_system is not None else {})
