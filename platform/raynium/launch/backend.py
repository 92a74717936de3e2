"""Our Ray Train backend: one node agent per node, and a name for each life of the worker group. Sets environment only.

An agent that dies is replaced alone, in its seat of the worker group and of its placement group: what Ray Train does
for a backend that has replica groups. The other agents keep their ranks' template, snapshots and uploads.

An exception in `on_start` would leave the worker group and its placement group behind, holding the cores for ever
(Ray 2.60); so it cleans up itself and raises the one error that Ray Train retries.
"""

import os
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup

from raynium.storage.arrow import arrow_place
from raynium.storage.store import Store

# `driver.run_agent` reads it in each worker.
ATTEMPT_VARIABLE = "RAYNIUM_ATTEMPT"


@dataclass
class NodeAgentConfig(BackendConfig):
    """Backend of the workers that run node agents. coordinator: of the run, a Ray actor."""

    coordinator: Any

    @property
    def backend_cls(self) -> type["NodeAgentBackend"]:
        return NodeAgentBackend


class NodeAgentBackend(Backend):
    """Checks the placement and names the attempt. One per controller."""

    has_replica_groups = True

    def __init__(self) -> None:
        self._attempt = ""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, NodeAgentConfig)
        if isinstance(worker_group, ReplicaGroup):
            placed = backend_config.coordinator.agents_placed.remote(self._attempt, _seats(worker_group))
            ray.get(placed)
            worker_group.execute(_set_environment, {ATTEMPT_VARIABLE: self._attempt})
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
        self._attempt = secrets.token_hex(4)
        # This counts those whose agents never join, too.
        ray.get(backend_config.coordinator.agents_placed.remote(self._attempt))
        worker_group.execute(_set_environment, {ATTEMPT_VARIABLE: self._attempt})

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Of an agent that has died the others hear before Ray looks for a place for the next one."""
        assert isinstance(backend_config, NodeAgentConfig)
        if isinstance(worker_group, ReplicaGroup):
            backend_config.coordinator.agents_lost.remote(self._attempt, _seats(worker_group))


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
