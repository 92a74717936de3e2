"""Folders of a process's own: private, and given back also by processes that had no time to."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raynium.cli.app import app
from raynium.storage import own_folder as module
from raynium.storage.own_folder import drop_folder, own_folder, remove_left, shared_folder, temporary_folder

pytestmark = pytest.mark.quick

KILLED = """
import os, signal, sys
from pathlib import Path
from raynium.storage.own_folder import own_folder
(own_folder(Path(sys.argv[1]), "dead") / "image").write_bytes(b"x")
os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by_a_killed_process(parent: Path) -> Path:
    subprocess.run([sys.executable, "-c", KILLED, str(parent)], check=False)
    (folder,) = parent.glob("raynium-*dead-*")
    assert (folder / "image").is_file()
    return folder


def test_what_a_killed_process_left_goes_with_the_next_one_and_what_lives_stays(tmp_path: Path) -> None:
    first = own_folder(tmp_path, "first")
    dead = left_by_a_killed_process(tmp_path)
    assert first.is_dir(), "another process has looked"
    elses = [tmp_path / "raynium-somebody-else", tmp_path / f"raynium-{os.getuid()}"]
    for each in elses:
        each.mkdir()
    second = own_folder(tmp_path, "second")
    assert sorted(tmp_path.iterdir()) == sorted([first, second, *elses]) and not dead.exists()
    assert first.stat().st_mode & 0o777 == 0o700
    drop_folder(first)
    drop_folder(second)
    assert sorted(tmp_path.iterdir()) == sorted(elses)


SHARED = """
import os, signal, sys
from pathlib import Path
from raynium.storage.own_folder import shared_folder
(shared_folder(Path(sys.argv[1]), "run") / "range").write_bytes(b"x")
print("there", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_shared_folder_lasts_until_all_that_asked_for_it_are_dead_and_another_one_is_made(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
    for number, process in enumerate(both):
        shared_folder(tmp_path, f"other-{number}")
        assert (tmp_path / "run/range").exists()
        process.communicate("")
    another = shared_folder(tmp_path, "another")
    assert shared_folder(tmp_path, "another") == another and not (tmp_path / "run").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["another", "other-0", "other-1"], "ours live"


def test_a_folder_of_another_user_and_a_link_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = left_by_a_killed_process(tmp_path)
    uid = os.getuid()
    named_as_ours = theirs.rename(tmp_path / f"raynium-{uid + 1}.images")
    (tmp_path / f"raynium-{uid}.link").symlink_to(named_as_ours)
    assert remove_left(tmp_path) == []
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert remove_left(tmp_path) == [] and named_as_ours.is_dir()


def test_a_folder_that_is_taken_for_a_dead_ones_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that comes in between."""
    real, made = tempfile.mkdtemp, list[str]()

    def make(prefix: str, dir: Path) -> str:
        made.append(real(prefix=prefix, dir=dir))
        if len(made) == 1:
            assert remove_left(tmp_path) == [Path(made[0])]
        return made[-1]

    monkeypatch.setattr(module.tempfile, "mkdtemp", make)
    with temporary_folder("here", tmp_path) as folder:
        assert [str(folder)] == made[1:] and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_system_knows_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with temporary_folder("first", tmp_path) as first, temporary_folder("second", tmp_path):
        assert first.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_removes_what_killed_processes_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Those of tests that run beside this one are theirs (`test_orphans.py`).
    monkeypatch.setattr("raynium.node.scratch.end_orphans", lambda: ["process 5 (a compiler) is killed"])
    with temporary_folder("lives") as lives:
        dead = left_by_a_killed_process(tmp_path)
        assert "killed" not in CliRunner().invoke(app, ["doctor"]).output and dead.is_dir()
        told = CliRunner().invoke(app, ["doctor", "--clean"]).output
        # It looks into /tmp as well, where tests beside this one may have left some.
        assert told.startswith("process 5 (a compiler) is killed\nremoved ") and f"\nremoved {dead}\n" in told
        assert not dead.exists() and lives.is_dir()
