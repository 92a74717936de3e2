"""The presets: resolved text as golden files, rules of the intended hardware, true dimensions.

Refresh the golden files after a wanted change, and read the diff:
    RAYNIUM_REFRESH_GOLDEN=1 python -m pytest tests/test_config_presets.py
"""

import os
from pathlib import Path

import pytest

from raynium.config.load import dump_yaml, load_config, parse_config, preset_names
from raynium.config.paths import resolve
from raynium.models.flops import parameter_count
from raynium.planning.rules import check

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
PRESETS = preset_names(ROOT)


def test_these_are_the_presets():
    assert PRESETS == [
        "dpo-quickstart",
        "llama3-1b",
        "llama3-70b",
        "llama3-8b",
        "llama3-8b-lora",
        "quickstart",
        "qwen3-8b",
        "qwen3-8b-sft",
        "sft-quickstart",
    ]
    assert sorted(path.stem for path in GOLDEN.glob("*.yaml")) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_preset_is_the_golden_file(preset, monkeypatch):
    monkeypatch.setenv("RAYNIUM_HOME", "/raynium-home")
    resolved = resolve(load_config(preset, base_folder=ROOT))
    golden = GOLDEN / f"{preset}.yaml"
    if os.environ.get("RAYNIUM_REFRESH_GOLDEN"):
        golden.write_text(dump_yaml(resolved))
    assert dump_yaml(resolved) == golden.read_text()
    assert parse_config(golden.read_text()) == resolved


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_passes_the_rules_of_its_hardware(preset):
    config = load_config(preset, base_folder=ROOT)
    assert check(config) == []
    assert config.run.name == preset
    assert (config.cluster.instance_type is None) == preset.endswith("quickstart")


@pytest.mark.parametrize(
    ("preset", "published"),
    # Safetensors totals of the Hugging Face model pages: meta-llama/Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B and
    # Qwen/Qwen3-8B-Base.
    [
        ("llama3-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_the_parameter_count_is_the_published_one(preset, published):
    assert parameter_count(load_config(preset, base_folder=ROOT).model).total == published
