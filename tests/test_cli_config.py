"""`raynium config`, `init` and `presets`, and what a shell completes."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Ended, run_command

from raynium.config.load import load_config, preset_names
from raynium.config.reference import reference_markdown

pytestmark = pytest.mark.quick


@pytest.fixture
def raynium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    monkeypatch.chdir(tmp_path)
    return partial(run_command, monkeypatch=monkeypatch, capsys=capsys)


def test_config_prints_the_reference_of_a_field_a_section_or_all(raynium: Callable[..., Ended]) -> None:
    assert raynium("config", "train.steps").out.startswith(
        "train.steps (default null): a whole number of at least 1, or null, in s"
    )
    assert "train.micro_batch_size (default 1)" in raynium("config", "train").out
    assert "sample.temperature (default 0.8)" in raynium("config").out
    assert raynium("config", "--markdown").out == reference_markdown()
    ended = raynium("config", "train.stepz")
    assert (ended.code, ended.err) == (2, "error: train.stepz is not a field: did you mean train.steps?\n")


def test_config_diff_shows_what_a_file_changes(raynium: Callable[..., Ended]) -> None:
    Path("mine.yaml").write_text("extends: quickstart\nrun: {name: mine}\noptimizer: {eps: 1e-6}\n")
    lines = raynium("config", "--diff", "mine.yaml").out.splitlines()
    assert "optimizer.eps: 1e-06  (default 1e-08)" in lines and "run.name: mine  (required)" in lines
    assert raynium("config", "--diff", "nothing.yaml").code == 2
    assert raynium("config", "run", "--diff", "mine.yaml").out == "run.name: mine  (required)\n"
    assert raynium("config", "optimizer.eps", "--diff", "mine.yaml").out == "optimizer.eps: 1e-06  (default 1e-08)\n"
    assert raynium("config", "parallel", "--diff", "mine.yaml").out == "parallel is as by default\n"
    ended = raynium("config", "optimiser", "--diff", "mine.yaml")
    assert (ended.code, ended.err) == (2, "error: optimiser is not a field: did you mean optimizer?\n")


def test_what_somebody_gave_is_cut_in_a_message(raynium: Callable[..., Ended]) -> None:
    word = "x" * 50_000
    Path("long.yaml").write_text(word)
    Path("longer.yaml").write_text(f"extends: {word}")
    values = [word, f"run.name={word}", f"train.steps={word}", f"{word}=1", f"model.preset={word}", f"extends={word}"]
    values += [f"cluster.accelerator={word}", f"sample.prompts={word}"]
    ends = [
        raynium("config", "--diff", "long.yaml"),
        raynium("config", "--diff", "longer.yaml"),
        raynium("train", word),
    ]
    for ended in [*ends, *(raynium("train", "quickstart", value) for value in values)]:
        assert ended.code == 2 and "error: " in ended.err and len(ended.err) < 2000, ended.err[:3000]


def test_extends_is_refused_as_an_override(raynium: Callable[..., Ended]) -> None:
    ended = raynium("train", "quickstart", "extends=llama3-8b")
    rule = "extends is not for an override: it stands in a job file, as `extends: llama3-8b`"
    assert (ended.code, ended.err) == (2, f"error: {rule}\n")


def test_init_writes_a_file_that_loads_and_never_over_another(
    raynium: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = raynium("init", "mine", "--preset", "llama3-1b", "data.source=my-text")
    assert (ended.code, ended.out) == (0, "wrote mine.yaml; edit it, then: raynium train mine.yaml\n")
    assert load_config("mine.yaml") == load_config("llama3-1b", ["run.name=mine", "data.source=my-text"])
    before = Path("mine.yaml").read_bytes()
    ended = raynium("init", "mine")
    assert ended.code == 2 and "mine.yaml exists and is left as it is" in ended.err
    assert Path("mine.yaml").read_bytes() == before
    assert raynium("init", "mine", "--preset", "nothing").code == 2
    monkeypatch.chdir("/proc")
    assert "folder.yaml cannot be written" in raynium("init", "folder").err


def test_presets_lists_each_with_what_it_is(raynium: Callable[..., Ended]) -> None:
    lines = raynium("presets").out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert any(line.startswith("llama3-1b       Llama 3.2 1B, trained from nothing") for line in lines)


# ------------------------------------------------------------------------------------------------- completion


def complete(*words: str, cwd: Path) -> list[str]:
    """What bash is offered for the last of these words."""
    done = subprocess.run(
        [sys.executable, "-m", "raynium.cli.app"],
        env=os.environ
        | {"_RAYNIUM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)},
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["raynium", "pres"], ["presets"]),
        (["raynium", "train", "llama"], ["llama3-1b", "llama3-70b", "llama3-8b", "llama3-8b-lora"]),
        (["raynium", "train", "mi"], ["mine.yaml"]),
        (["raynium", "train", "quickstart", "train.st"], ["train.steps="]),
        (["raynium", "train", "quickstart", "train.steps=3", "model.pr"], ["model.preset="]),
        (["raynium", "preflight", "quickstart", "engine.kind=n"], ["engine.kind=native", "engine.kind=nxd"]),
        # As bash splits it
        (["raynium", "submit", "quickstart", "run.name", "=", "a", "engine.kind", "=", "na"], ["native"]),
        (["raynium", "submit", "quickstart", "model.preset", "=", "qw"], ["qwen3-8b", "qwen3-8b-sft"]),
        (["raynium", "submit", "quickstart", "engine.kind", "="], ["native", "nxd"]),
        (["raynium", "config", "model.rope_s"], [f"model.rope_scaling{end}" for end in ("", *(
            f".{name}" for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")))]),
        (["raynium", "init", "mine", "--preset", "qu"], ["quickstart"]),
        (["raynium", "config", "--diff", "qu"], ["quickstart"]),
    ],
)  # fmt: skip
def test_a_shell_is_offered_commands_presets_files_fields_and_values(
    tmp_path: Path, words: list[str], offered: list[str]
) -> None:
    (tmp_path / "mine.yaml").touch()
    assert complete(*words, cwd=tmp_path) == offered
