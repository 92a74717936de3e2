"""`raynium preflight` by itself: what is refused before a cluster is started, what is said, and what is left behind."""

from dataclasses import replace
from pathlib import Path

import pytest

from raynium.config.load import load_config
from raynium.errors import LaunchError
from raynium.launch.nodes import NodeUse, patient, shortage
from raynium.launch.run_preflight import leaving_no_folder, run_preflight


def refusal(*overrides: str) -> str:
    told: list[str] = []
    with pytest.raises(LaunchError) as caught:
        run_preflight(load_config("quickstart", list(overrides)), address=None, tell=told.append)
    assert told == [], "refused before anything is started"
    return str(caught.value)


def test_what_this_machine_can_never_run_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        "cluster.nodes is 2" in (text := refusal("cluster.nodes=2", "train.global_batch_size=16"))
        and "--address" in text
    )
    assert "cluster.accelerator is 'neuron', which this machine cannot use" in refusal("cluster.accelerator=neuron")
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_was_made_for_the_check_goes_again_and_no_other(tmp_path: Path) -> None:
    new, used, old = tmp_path / "new", tmp_path / "used", tmp_path / "old"
    old.mkdir()
    for root in (new, used, old):
        with leaving_no_folder(str(root)):
            root.mkdir(exist_ok=True)
            if root == used:
                (root / "run").mkdir()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["old", "used"]
    with leaving_no_folder("s3://bucket/runs"):
        pass
    with leaving_no_folder(str(new)):
        pass  # nobody made it


def test_who_waits_for_nodes_is_told_what_is_missing_and_again_when_that_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 1.0, 21.0, 22.0, 42.0, 63.0, 84.0])
    found = iter(["waiting for 3", "waiting for 3", None, "waiting for 1"])
    monkeypatch.setattr("raynium.launch.nodes.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("raynium.launch.nodes.waiting_message", lambda config, besides: next(found))
    answers, told = iter([True, True, False, True, True, True]), []
    wait = patient(load_config("quickstart", ["cluster.nodes=3"]), go_on=lambda: next(answers), tell=told.append)
    assert (wait(), told) == (True, [])
    assert (wait(), wait()) == (True, False) and told == ["waiting for 3"]
    assert (wait(), wait(), wait()) == (True, True, True) and told == ["waiting for 3", "waiting for 1"]


def node(host: str, total: float, free: float, held: dict[str, float] | None = None, name: str = "CPU") -> NodeUse:
    return NodeUse(host, {name: total}, {name: free}, {who: {name: amount} for who, amount in (held or {}).items()})


@pytest.mark.parametrize(
    ("asked", "num_nodes", "nodes", "message"),
    [
        ({"CPU": 3}, 1, [node("a", 3, 2, {"run tiny": 1})], "waiting for 3 CPU: 2 of 3 free, 1 held by run tiny"),
        ({"CPU": 3}, 1, [node("a", 3, 1)], "waiting for 3 CPU: 1 of 3 free, 2 held by others"),
        ({"CPU": 3}, 1, [node("a", 3, 3)], None),
        (
            {"CPU": 2},
            2,
            [node("a", 2, 2), node("b", 4, 1, {"run x": 2, "run y": 1})],
            "waiting for 2 nodes with 2 CPU: 1 of 2 have them free; b: 1 of 4 free, 2 held by run x, 1 held by run y",
        ),
        (
            {"CPU": 1, "neuron_cores": 4},
            1,
            [NodeUse("a", {"CPU": 8, "neuron_cores": 2}, {"CPU": 8, "neuron_cores": 2}, {})],
            "waiting for 1 CPU and 4 neuron_cores: 2 of 2 neuron_cores free. Only 0 of the cluster's nodes have as "
            "much at all: another must come, or set cluster.nodes and cluster.ranks_per_node to what there is",
        ),
        (
            {"CPU": 1},
            2,
            [node("a", 2, 2), replace(node("b", 2, 2), left_out=True)],
            "waiting for 2 nodes with 1 CPU: 1 of 2 have them free; b: left out as a bad one. Only 1 of the cluster's "
            "nodes has as much at all: another must come, or set cluster.nodes and cluster.ranks_per_node to what "
            "there is",
        ),
    ],
)
def test_a_wait_names_what_is_free_and_who_holds_the_rest(
    asked: dict[str, float], num_nodes: int, nodes: list[NodeUse], message: str | None
) -> None:
    assert shortage(asked, num_nodes, nodes) == message
