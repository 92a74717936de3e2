"""Our Ray Train backend on Ray's own worker group, whose workers are made up."""

from collections.abc import Callable
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from raynium.launch.backend import NodeAgentBackend, NodeAgentConfig


class PlacedGroup(WorkerGroup):
    """Its workers stand on these nodes. Nothing runs."""

    def __init__(self, node_ids: list[str]):
        self.node_ids = node_ids
        self._worker_group_state: Any = "workers and their placement group"
        self._world_rank_to_ongoing_poll: dict[int, Any] = {}

    def execute(self, fn: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        assert fn.__name__ == "_node_id"
        return self.node_ids


def test_two_agents_on_one_node_are_refused_and_leave_no_workers_behind() -> None:
    group = PlacedGroup(["a", "b", "a"])
    with pytest.raises(ray.train.WorkerGroupError, match=r"3 node agents on 2 node.*one per node. Set cluster\.nodes"):
        NodeAgentBackend().on_start(group, NodeAgentConfig(coordinator=None))
    assert group._worker_group_state is None
