"""`raynium preflight` by itself: what is refused before a cluster is started, what is said, and what is left behind."""

from pathlib import Path

import pytest

from raynium.config.load import load_config
from raynium.errors import LaunchError
from raynium.launch.nodes import patient
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


def test_who_waits_for_nodes_is_told_once_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 21.0, 22.0])
    monkeypatch.setattr("raynium.launch.nodes.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("raynium.launch.nodes.waiting_message", lambda config: f"waiting for {config.cluster.nodes}")
    answers, told = iter([True, True, False]), []
    wait = patient(load_config("quickstart", ["cluster.nodes=3"]), go_on=lambda: next(answers), tell=told.append)
    assert (wait(), told) == (True, [])
    assert (wait(), wait()) == (True, False) and told == ["waiting for 3"]
