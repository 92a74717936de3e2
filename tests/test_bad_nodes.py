"""Nodes that a verdict has named, as drivers of other runs and later ones see them."""

from pathlib import Path

import pytest

from raynium.health.faults import Action, Fault
from raynium.run.bad_nodes import BadNode, forget, left_out, remember, remembered
from raynium.run.protocol import NodeFault
from raynium.storage.store import Store

pytestmark = pytest.mark.quick


def found(host: str, node_id: str, action: Action = "replace") -> NodeFault:
    return NodeFault(3, 0, host, node_id, Fault("hbm-uncorrectable", "its memory is broken", action, "node"))


def test_a_node_is_remembered_for_a_day_by_all_runs_of_a_root_and_then_forgotten(tmp_path: Path) -> None:
    root = Store(tmp_path)
    remember(root, found("10.0.0.1", "a"), run="first", now_unix=1000.0)
    remember(root, found("10.0.0.2", "b"), run="second", now_unix=500.0)
    remember(root, found("10.0.0.1", "a"), run="third", now_unix=2000.0)
    bad = remembered(Store(tmp_path), now_unix=3000.0, seconds=86_400.0)
    assert [(each.host, each.run, each.unix) for each in bad] == [
        ("10.0.0.2", "second", 500.0),
        ("10.0.0.1", "third", 2000.0),
    ]
    assert bad[0].text.startswith("node 0 (10.0.0.2): its memory is broken: replace this instance")
    assert [each.host for each in remembered(root, now_unix=3000.0, seconds=2000.0)] == ["10.0.0.1"]
    assert [path.name for path in (tmp_path / "bad+nodes").iterdir()] == ["10.0.0.1.json"]
    assert remembered(root, now_unix=4000.0, seconds=2000.0) == []


def test_what_a_run_named_can_be_taken_back(tmp_path: Path) -> None:
    root = Store(tmp_path)
    remember(root, found("10.0.0.1", "a"), run="soak", now_unix=1000.0)
    remember(root, found("10.0.0.2", "b"), run="other", now_unix=1000.0)
    forget(root, run="soak")
    assert [each.host for each in remembered(root, now_unix=1000.0, seconds=1.0)] == ["10.0.0.2"]
    forget(Store(tmp_path / "new"), run="soak")


def bad(host: str, node_id: str, action: str, unix: float = 1.0) -> BadNode:
    return BadNode(host, node_id, action, "text", "run", unix)


def test_a_node_to_be_replaced_is_known_by_its_address_and_one_to_be_rebooted_until_its_ray_is_new() -> None:
    nodes = {"new": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
    replaced, rebooted = bad("10.0.0.1", "old", "replace"), bad("10.0.0.2", "before", "reboot")
    assert left_out([replaced, rebooted], nodes, needed=1) == ({"new": replaced}, 0)
    still = bad("10.0.0.2", "b", "reboot")
    assert left_out([replaced, still], nodes, needed=1) == ({"new": replaced, "b": still}, 0)


def test_a_run_that_needs_bad_nodes_takes_those_that_were_named_first() -> None:
    nodes = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
    older, newer = bad("10.0.0.1", "a", "replace", 1.0), bad("10.0.0.2", "b", "replace", 2.0)
    assert left_out([older, newer], nodes, needed=2) == ({"b": newer}, 1)
    assert left_out([older, newer], nodes, needed=3) == ({}, 2)
    assert left_out([older, newer], nodes, needed=5) == ({}, 2)
    assert left_out([], nodes, needed=1) == ({}, 0)


def test_a_life_that_is_over_is_no_node_that_a_run_could_take() -> None:
    """Ray shows a node that has died for a while beside the one that its instance has become."""
    nodes = {"a": "10.0.0.1", "b": "10.0.0.2", "b again": "10.0.0.2"}
    older, newer = bad("10.0.0.2", "b", "replace", 1.0), bad("10.0.0.1", "a", "replace", 2.0)
    assert left_out([older, newer], nodes, needed=2) == ({}, 2)
    assert left_out([older, newer], nodes, needed=1) == ({"a": newer}, 1)
    assert left_out([older, newer], nodes, needed=0) == ({"a": newer, "b": older, "b again": older}, 0)
