"""On how many nodes a run starts, and when it takes more: the decisions. Ray's part is in `test_nodes_ray.py`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import pytest
from tiny import job_text

from raynium.config.load import parse_config
from raynium.launch import seats as seats_module
from raynium.launch.seats import Seats

CHANGES = {"cluster.nodes": 4, "cluster.spares": 1, "cluster.min_nodes": 1, "fault.replace_seconds": 10.0}
CONFIG = parse_config(job_text(CHANGES | {"cluster.ranks_per_node": 1, "train.global_batch_size": 8}))


@dataclass
class Cluster:
    """Nodes that have room, a clock, and what Ray was asked for and has not been told to forget."""

    room: int = 0
    seconds: float = 0.0
    asked: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    count: int = 0

    def ask(self, resources: Mapping[str, float], number: int, besides: Collection[str]) -> "Group":
        self.count += 1
        self.asked[self.count] = number, tuple(besides)
        return Group(self, self.count, number)


@dataclass
class Group:
    cluster: Cluster
    key: int
    number: int

    def wait(self, seconds: float) -> bool:
        if self.key not in self.cluster.asked:
            raise RuntimeError("Ray knows of no such placement group")
        self.cluster.seconds += seconds
        return self.cluster.room >= self.number


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(seats_module, "_ask", found.ask)
    monkeypatch.setattr(seats_module, "remove_placement_group", lambda group: found.asked.pop(group.key, None))
    monkeypatch.setattr(seats_module, "free_nodes", lambda resources, besides: ["node"] * found.room)
    monkeypatch.setattr(seats_module, "patient", lambda config, go_on, tell, besides: go_on)
    monkeypatch.setattr(seats_module.time, "monotonic", lambda: found.seconds)
    return found


def test_a_run_waits_for_all_its_nodes_and_then_starts_on_the_most_that_share_the_batch(cluster: Cluster) -> None:
    told: list[str] = []
    seats = Seats(CONFIG, tell=told.append)

    def comes() -> bool:
        assert list(cluster.asked.values()) == [(5, ("bad",))], "an autoscaler sees all that is wanted"
        cluster.room = 3
        return True

    seats.wait(besides=["bad"], go_on=comes)
    assert (seats.number, seats.nodes, cluster.seconds) == (3, 2, 10.0) and not cluster.asked
    assert (seats.config.cluster.nodes, seats.config.cluster.spares) == (2, 1)
    assert told == [
        "the run starts on 2 of 4 nodes (cluster.min_nodes 1): no more have come within 10 s (fault.replace_seconds)"
    ]

    # One more than the three has room: four train, and no fifth is waited for.
    cluster.room = 0
    assert not seats.may_grow(besides=["a", "b"]) and list(cluster.asked.values()) == [(2, ("a", "b"))]
    cluster.room = 1
    assert seats.may_grow(besides=["a", "b"]) and not cluster.asked
    began, cluster.room = cluster.seconds, 3

    def goes() -> bool:
        cluster.room = 4
        return True

    seats.wait(besides=[], go_on=goes)
    assert (seats.number, seats.nodes, cluster.seconds - began) == (4, 4, 1.0)
    assert told[1:] == ["the run starts on 4 of 4 nodes (cluster.min_nodes 1): there are no more yet"]
    assert not seats.may_grow(besides=[]), "a run that lacks spares only goes on"


@pytest.mark.parametrize("released", [True, False])
def test_a_run_on_fewer_nodes_that_starts_again_still_grows(cluster: Cluster, released: bool) -> None:
    """released: Ray Train's controller died, and the driver gave back all that was held; else a bad node was left."""
    seats = Seats(CONFIG, tell=lambda text: None)
    cluster.room = 1
    seats.wait(besides=[], go_on=lambda: True)
    cluster.room = 0
    assert not seats.may_grow(besides=["a"]) and list(cluster.asked.values()) == [(4, ("a",))]
    if released:
        cluster.asked.clear()
    cluster.room = 2
    seats.wait(besides=["bad"], go_on=lambda: True)
    assert seats.nodes == 2 and not cluster.asked, "nothing is asked for twice"
    cluster.room = 0
    assert not seats.may_grow(besides=["b"]) and list(cluster.asked.values()) == [(3, ("b",))]
    cluster.room = 2
    assert seats.may_grow(besides=["b"]) and not cluster.asked


def test_a_run_whose_nodes_come_or_that_is_stopped_waits_no_longer(cluster: Cluster) -> None:
    seats = Seats(CONFIG, tell=pytest.fail)
    seats.wait(besides=[], go_on=lambda: False)
    assert (seats.number, seats.nodes, cluster.seconds) == (5, 4, 1.0) and not cluster.asked
    cluster.room = 5
    seats.wait(besides=[], go_on=pytest.fail)
    assert (seats.number, seats.nodes, seats.may_grow(besides=[])) == (5, 4, False)
    waits = Seats(
        CONFIG.model_copy(update={"cluster": CONFIG.cluster.model_copy(update={"min_nodes": None})}), tell=pytest.fail
    )
    cluster.room = 0
    waits.wait(besides=[], go_on=pytest.fail)
    assert (waits.number, waits.nodes) == (5, 4), "Ray Train waits for them"
