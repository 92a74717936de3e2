"""The command line where locale, home and temporary folder are not what it wishes, or arguments are no UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import job_text

from raynium import find_run
from raynium.tracking.provenance import origin_tags

RAYNIUM = str(Path(sys.executable).parent / "raynium")
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ONE_RANK = {"cluster.ranks_per_node": 1, "train.steps": 2, "evaluate.max_documents": 2}


def raynium(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAYNIUM, *arguments], env=os.environ | ASCII | environment, capture_output=True, encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_in_ascii_on_text_and_names_beyond_it_ends_without_folders_for_what_is_temporary(tmp_path: Path) -> None:
    text = tmp_path / "text"
    (text / "größe").mkdir(parents=True)
    for number in range(40):
        lines = "".join(f"ünïcode {line} × {number} 日本\n" for line in range(40))
        (text / f"größe/é{number}.txt").write_text(lines, encoding="utf-8")
    job = tmp_path / "job.yaml"
    changes = ONE_RANK | {"data.source": str(text), "data.heldout_fraction": 0.2, "sample.prompts": ["é"]}
    job.write_text(job_text(changes, root=tmp_path), encoding="utf-8")
    # Nobody can write into /proc, root neither.
    ended = raynium("train", str(job), HOME="/proc", TMPDIR="/nonexistent")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "note: TMPDIR is /nonexistent, which is no folder that can be written: /tmp is used" in ended.stdout
    assert "step 2/2 · loss" in ended.stdout
    record = find_run("test", str(tmp_path)).record()
    assert record.log_path is not None and "step 2/2 · loss" in Path(record.log_path).read_text(encoding="utf-8")
    assert record.result is not None and record.result["samples"][0].startswith("é")
    status = raynium("status", "test", "--root", str(tmp_path))
    assert status.returncode == 0 and "finished" in status.stdout, status.stderr


def test_what_an_encoding_does_not_have_is_printed_as_a_question_mark() -> None:
    code = r"from raynium.terminal.streams import print_in_any_locale as fit; fit(); print('\xd7 \u2192 \xe9')"
    for encoding, shown in [("ascii", "× → é"), ("iso-8859-1", "× ? é"), ("utf-8", "× → é")]:
        environment = os.environ | ASCII | {"PYTHONIOENCODING": encoding}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert ended.stdout.decode("utf-8" if encoding == "ascii" else encoding) == f"{shown}\n", ended.stderr


def test_a_place_that_the_locale_cannot_name_is_refused_whoever_wrote_it(tmp_path: Path) -> None:
    rule = (
        "which holds bytes that are no UTF-8, or characters that the locale's encoding, ascii, does not have; "
        "LC_ALL=C.UTF-8 is right everywhere"
    )
    job = tmp_path / "job.yaml"
    job.write_text(job_text({"run.root": "/tmp/ü"}), encoding="utf-8")
    for arguments, problem in [
        (("train", str(job)), f"error: run.root is '/tmp/\\xfc', {rule}\n"),
        (("runs", "--root", "/tmp/ü".encode()), f"error: root is '/tmp/\\udcc3\\udcbc', {rule}\n"),
    ]:
        ended = raynium(*arguments)
        assert (ended.returncode, ended.stderr) == (2, problem)
    bucket = job_text({"run.root": "s3://bucket/ü", "data.path": "s3://bucket/ü"})
    job.write_text(bucket, encoding="utf-8")
    # A place in S3 is not named in the locale's encoding; what is wrong is told of another field.
    ended = raynium("train", str(job), "run.name=data", AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert ended.stderr.startswith("error: run.name is 'data'"), ended.stderr


def test_a_folder_that_is_no_utf8_is_refused_as_the_place_of_runs(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"\xff")
    os.mkdir(folder)
    ended = subprocess.run(
        [RAYNIUM, "train", "quickstart"],
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
    )
    assert ended.returncode == 2 and r"\udcff/runs', which holds bytes that are no UTF-8" in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((b"quickstart", b"\xff=3"), r"error: \udcff is not a field (override): "),
        (
            (b"quickstart", b"run.name=\xff"),
            r"error: run.name is '\udcff' (override run.name), which is not valid text",
        ),
        ((b"/tmp/\xff.yaml",), r"error: there is no job file '/tmp/\udcff.yaml'"),
    ],
)
def test_arguments_that_are_no_utf8_are_one_line(arguments: tuple[bytes, ...], problem: str) -> None:
    ended = raynium("train", *arguments, LC_ALL="C.UTF-8", PYTHONUTF8="1")
    assert ended.returncode == 2 and ended.stderr.startswith(problem), ended.stderr


def test_a_command_with_bytes_that_are_no_utf8_can_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["raynium", "train", "/tmp/\udcff.yaml"])
    monkeypatch.setenv("LOGNAME", "m\udcfcller")
    tags = origin_tags(tmp_path)
    assert tags["mlflow.source.name"] == r"raynium train '/tmp/\udcff.yaml'" and tags["mlflow.user"] == r"m\udcfcller"
