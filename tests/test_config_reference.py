"""What the schema says of itself: the reference, docs/config.md, what a config changes, and a file to start from."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raynium.config.fields import schema_fields
from raynium.config.load import load_config, parse_config, preset_names
from raynium.config.paths import resolve
from raynium.config.reference import brief, difference_lines, reference, reference_markdown, starting_file
from raynium.config.resume import FIXED, when_resumed
from raynium.errors import ConfigError
from raynium.planning.rules import check

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PRESETS = preset_names(ROOT)
FIELDS = [field for field in schema_fields().values() if not field.is_section]

# Whole numbers that count nothing that has a name.
WITHOUT_UNIT = {"run.seed", "parallel.pipeline"}


@pytest.mark.parametrize("field", schema_fields().values(), ids=lambda field: field.name)
def test_every_field_says_what_it_means(field):
    assert len(field.meaning) >= 10 and field.meaning.endswith("."), field.meaning
    assert "\n" not in field.meaning or field.is_section


def test_every_whole_number_has_a_unit():
    assert {field.name for field in FIELDS if field.type is int and not field.unit} == WITHOUT_UNIT
    assert all(field.unit == "seconds" for field in FIELDS if "seconds" in field.name)


def test_the_page_of_all_fields_is_current():
    written = (ROOT / "docs/config.md").read_text()
    assert written == reference_markdown(), "write it again: raynium config --markdown > docs/config.md"


def test_the_reference_has_every_field_once():
    whole = reference()
    for field in FIELDS:
        if field.name.count(".") == 1:
            assert whole.count(f"\n{field.name} (") == 1, field.name
        assert f"`{field.name}`" in reference_markdown()
    assert max(map(len, whole.splitlines())) <= 100


def test_a_field_is_told_with_unit_default_rule_and_what_a_resume_makes_of_it():
    assert reference("fault.stop_seconds").splitlines() == [
        "fault.stop_seconds (default 900.0): a number above 0, in seconds",
        "    Ranks that have not saved and ended so long after the run was asked to stop are killed.",
        "    When a run goes on: may change.",
    ]
    assert reference("train.steps").startswith(
        "train.steps (default null): a whole number of at least 1, or null, in steps\n"
    )
    assert "default null" in reference("checkpoint.keep_every_steps")
    assert "may not change: " + FIXED["data.seq_len"] in reference("data.seq_len")
    assert when_resumed("model.rope_scaling.factor") == f"may not change: {FIXED['model.rope_scaling']}"
    assert "factor" in reference("model.rope_scaling") and reference("extends").startswith("extends: the job file")


def test_the_head_of_train_says_how_steps_epochs_batch_accumulation_and_logging_relate():
    head = reference("train").partition("train.steps (")[0]
    for word in ("steps × global_batch_size × data.seq_len", "epochs =", "accumulation", "micro_batch_size", "MLflow"):
        assert word in " ".join(head.split()), word


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ConfigError, match=r"train\.stepz is not a field: did you mean train\.steps\?"):
        reference("train.stepz")


# ------------------------------------------------------------------------------------------------- one config


@pytest.mark.parametrize("preset", PRESETS)
def test_what_differs_from_the_defaults_is_short_and_reads_back_as_the_whole(preset):
    config = load_config(preset, base_folder=ROOT)
    assert parse_config(brief(config)) == config
    assert len(brief(config).splitlines()) <= 20
    assert not any(line.startswith("checkpoint.save:") for line in difference_lines(config))


def test_a_difference_stands_beside_its_default():
    lines = difference_lines(load_config("quickstart", ["optimizer.betas=[0.8, 0.9]", "optimizer.clip_norm=1"]))
    assert "optimizer.betas: [0.8, 0.9]  (default [0.9, 0.95])" in lines
    assert "train.steps: 700  (default null)" in lines and "cluster.accelerator: cpu  (default auto)" in lines
    assert not any("clip_norm" in line for line in lines)


def test_the_brief_says_what_steps_and_batches_amount_to():
    assert brief(load_config("llama3-1b")).splitlines()[:2] == [
        "# 50,000 steps × 128 sequences × 4,096 tokens = 26,214,400,000 tokens",
        "# a step's 128 sequences = 4 data-parallel rank(s) × 32 accumulated pass(es) × 1 at a time",
    ]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@example('"', "'a", [])
@given(
    TEXT, st.none() | TEXT, st.lists(TEXT | st.sampled_from(["null", "no", "1e3", "a: b", "#", "'", '"', "\n", ","]))
)
def test_any_brief_reads_back(path, source, prompts):
    overrides = {"data.path": path, "data.source": source, "sample.prompts": prompts, "optimizer.eps": 1e-7}
    config = load_config("quickstart", overrides, base_folder=ROOT)
    assert parse_config(brief(config)) == config


# ------------------------------------------------------------------------------------------------- a file to start from


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_file_is_the_preset_under_another_name_also_with_its_comments_taken_off(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = starting_file("mine", preset, [])
    config = load_config(preset, ["run.name=mine"])
    assert parse_config(text) == config
    head, _, rest = text.partition(f"extends: {preset}\n")
    # A meaning is a sentence; a field that is left as it is looks like a field.
    bare = [line.replace("# ", "", 1) if ": " in line or line.endswith(":") else line for line in rest.splitlines()]
    kept = "\n".join(line for line in bare if line.strip().partition(":")[0].isidentifier())
    assert parse_config(f"extends: {preset}\n{kept}") == config
    assert all(line.startswith("#") for line in head.splitlines()) and len(text.splitlines()) < 70


def test_what_init_is_given_stands_in_the_file():
    text = starting_file("mine", "quickstart", ["data.source=my text", "optimizer.betas=[0.8, 0.9]"])
    assert "  source: my text\n" in text and "  betas: [0.8, 0.9]\n" in text and "  name: mine\n" in text
    assert "#   steps: 700\n" in text
    with pytest.raises(ConfigError, match=r"run\.name is"):
        starting_file("Two Words", "quickstart", [])


def test_the_config_in_docs_data_md_is_one_that_runs() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = resolve(parse_config(block))
    assert check(config) == [] and len(config.data.stores) == 2 and config.data.stages
