"""Our Ray Train backend on Ray's own worker group, whose workers are made up."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from raynium.launch.backend import (
    ATTEMPT_VARIABLE,
    INCARNATION_VARIABLE,
    NodeAgentBackend,
    NodeAgentConfig,
    trainer_name,
)


class PlacedGroup(WorkerGroup):
    """Its workers stand on these nodes. Nothing runs."""

    def __init__(self, node_ids: list[str]):
        self.node_ids = node_ids
        self.environment: dict[str, str] = {}
        self._worker_group_state: Any = "workers and their placement group"
        self._world_rank_to_ongoing_poll: dict[int, Any] = {}

    def execute(self, fn: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        if fn.__name__ == "_node_id":
            return self.node_ids
        self.environment = arguments[0]
        return []


class PlacedSeat(ReplicaGroup):
    """One worker of it. Nothing runs."""

    def __init__(self, seat: int):
        self.environment: dict[str, str] = {}
        self._workers: Any = [SimpleNamespace(distributed_context=SimpleNamespace(world_rank=seat))]

    def execute(self, fn: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        self.environment = arguments[0]
        return []


def test_two_agents_on_one_node_are_refused_and_leave_no_workers_behind() -> None:
    group = PlacedGroup(["a", "b", "a"])
    with pytest.raises(ray.train.WorkerGroupError, match=r"3 node agents on 2 node.*one per node. Set cluster\.nodes"):
        NodeAgentBackend().on_start(group, NodeAgentConfig(None, trainer_name(0)))
    assert group._worker_group_state is None


def test_each_agent_has_a_name_that_sorts_after_those_of_all_that_were_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    told: list[tuple[Any, ...]] = []

    class Coordinator:
        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: told.append((method, *arguments)))

    def begin(backend: NodeAgentBackend, config: NodeAgentConfig) -> str:
        group = PlacedGroup(["n0", "n1"])
        backend.on_start(group, config)
        assert group.environment[INCARNATION_VARIABLE] == "0"
        return group.environment[ATTEMPT_VARIABLE]

    config = NodeAgentConfig(Coordinator(), trainer_name(9))
    backend = NodeAgentBackend()
    first = begin(backend, config)
    for incarnation in (1, 2):
        backend.on_shutdown(PlacedSeat(1), config)
        seat = PlacedSeat(1)
        backend.on_start(seat, config)
        assert seat.environment == {ATTEMPT_VARIABLE: first, INCARNATION_VARIABLE: str(incarnation)}
    second = begin(backend, config)
    backend.on_shutdown(PlacedSeat(1), config)
    third = begin(NodeAgentBackend(), NodeAgentConfig(Coordinator(), trainer_name(10)))
    assert trainer_name(9) < first < second < trainer_name(10) < third
    assert told == [
        ("agents_placed", first),
        ("agents_lost", first, {1: 0}),
        ("agents_placed", first, {1: 1}),
        ("agents_lost", first, {1: 1}),
        ("agents_placed", first, {1: 2}),
        ("agents_placed", second),
        ("agents_lost", second, {1: 0}),
        ("agents_placed", third),
    ]
