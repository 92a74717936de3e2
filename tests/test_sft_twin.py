"""Fine-tuning on the twin of TorchNeuron: what the CPU learns from the same chats, and no shape that comes late."""

from pathlib import Path
from typing import Any

import pytest
from test_records import chats_store
from test_sft_runs import JOB
from twin_runs import run_agent

from raynium.config.load import parse_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats_store(tmp_path_factory.mktemp("chats")).path


def play(documents: Path, folder: Path, environment: dict[str, str], **changes: Any) -> dict[str, list[float]]:
    """Its metrics, by name."""
    short = {"train.steps": 6, "checkpoint.every_steps": 3, "evaluate.every_steps": 3}
    found = run_agent(parse_config(JOB, short | changes), folder, documents, environment)
    assert "compiled again" not in "\n".join(found["log"])
    names = {name for _, metrics in found["points"] for name in metrics}
    return {name: [metrics[name] for _, metrics in found["points"] if name in metrics] for name in names}


@pytest.mark.parametrize("adapter", [{}, {"adapter.rank": 4, "adapter.dropout": 0.2, "optimizer.learning_rate": 0.03}])
def test_chats_teach_the_twin_what_they_teach_the_cpu_and_every_shape_is_seen_early(
    adapter: dict[str, Any], site: dict[str, str], documents: Path, tmp_path: Path
) -> None:
    expected = play(documents, tmp_path / "cpu", {}, **adapter)
    compiled = {"cluster.accelerator": "neuron", "engine.compile": "block"}
    twin = play(documents, tmp_path / "twin", site, **compiled | adapter)
    for name in ("train/loss", "eval/loss", "eval/perplexity"):
        assert twin[name] == pytest.approx(expected[name], rel=1e-5), name
    assert twin["device/fallback_operators"] == [0, 0], "an operation that Neuron lacks"
    first, last = twin["compile/graphs"]
    assert first == last > 0, "every shape had been seen at the first evaluation"
