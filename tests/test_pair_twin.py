"""DPO and ORPO on the twin of TorchNeuron: what the CPU learns, and no shape that comes late."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_pairs import pairs_store
from twin_runs import run_agent

from raynium.config.load import parse_config
from raynium.data.store import DocumentStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return pairs_store(tmp_path_factory.mktemp("pairs"))


def play(store: DocumentStore, folder: Path, environment: dict[str, str], **changes: Any) -> dict[str, Any]:
    values = {
        "run": {"name": "pairs", "root": str(folder)},
        "cluster": {"accelerator": "neuron", "ranks_per_node": 2},
        "model": {
            **{"vocab_size": 400, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2},
            **{"head_dim": 16, "ffn_size": 32, "max_seq_len": 32},
        },
        "data": {"path": str(store.path), "seq_len": 32},
        "engine": {"dtype": "float32"},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "train": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 3, "max_documents": 3},
    }
    return run_agent(parse_config(json.dumps(values), changes), folder / "run", store.path, environment)


def numbers(found: dict[str, Any], name: str) -> list[float]:
    return [metrics[name] for _, metrics in found["points"] if name in metrics]


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def of_task(
    request: pytest.FixtureRequest, store: DocumentStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """A task, and its run on the CPU."""
    on_cpu = {"task": request.param, "cluster.accelerator": "cpu"}
    return request.param, play(store, tmp_path_factory.mktemp("cpu"), {}, **on_cpu)


@pytest.mark.parametrize(
    "layout",
    [
        {"engine.compile": "block"},
        {"engine.compile": "block", "parallel.tensor": 2},
    ],
    ids=["two data ranks", "a tensor group"],
)
def test_pairs_teach_the_twin_what_they_teach_the_cpu_and_every_shape_is_seen_early(
    of_task: tuple[str, dict[str, Any]],
    layout: dict[str, Any],
    site: dict[str, str],
    store: DocumentStore,
    tmp_path: Path,
) -> None:
    task, expected = of_task
    twin = play(store, tmp_path / "twin", site, task=task, **layout)
    for name in ("train/loss", "eval/loss", "rewards/margins", "eval/rewards_margins"):
        assert numbers(twin, name) == pytest.approx(numbers(expected, name), rel=1e-4, abs=1e-6), name
    assert numbers(twin, "device/fallback_operators") == [0, 0], "float64 or a missing operation in the step"
    first, last = numbers(twin, "compile/graphs")
    assert first == last > 0, "every shape had been seen at the first evaluation"
    assert "compiled again" not in "\n".join(twin["log"])
