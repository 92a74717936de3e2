"""Where a cluster of ours lies, what becomes of a start that fails, and a head that is gone."""

import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

from raynium.errors import ClusterLost, LaunchError
from raynium.launch import head as head_module
from raynium.launch.head import ClusterWatch
from raynium.launch.ray_environment import session_parent
from raynium.node.scratch import SOCKET_PATH_BYTES, sockets_parent
from raynium.storage.own_folder import temporary_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """temporary(folder) -> what TMPDIR names from now on."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)

    def set_to(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        return folder

    return set_to


# After verl#1120 and ray#7724: job folders of Slurm.
LONG = "slurm_jobdir_1355700_" * 4
LONGEST_SOCKET = "ray/session_2026-11-29_03-10-48_123456_1234567/sockets/plasma_store"


def test_a_tmpdir_that_is_too_long_for_sockets_is_replaced(tmp_path: Path, temporary: Any) -> None:
    temporary(tmp_path / LONG)
    assert session_parent() == sockets_parent() == Path("/tmp")
    with temporary_folder("ray", session_parent()) as folder:
        assert len(f"{folder}/{LONGEST_SOCKET}") <= SOCKET_PATH_BYTES


def test_a_tmpdir_that_is_short_enough_stays(temporary: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        temporary(Path(short))
        assert session_parent() == sockets_parent() == Path(short)


def test_where_no_folder_will_do_a_line_says_so(
    tmp_path: Path, temporary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary(tmp_path / LONG)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(LaunchError, match=r"^RAY_TMPDIR is /.*, and Ray's sockets need a path of at most \d\d byt"):
        session_parent()
    monkeypatch.setenv("RAY_TMPDIR", "/no/such")
    with pytest.raises(LaunchError, match=r"^/no/such is no folder that can be written.*: set RAY_TMPDIR to one of"):
        session_parent()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert session_parent() == Path("/tmp")
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(LaunchError, match=r"^/tmp is no folder that can be written.*: set TMPDIR to one of yours with"):
        session_parent()


START = """
import logging, subprocess, sys
logging.basicConfig(level=logging.WARNING)
from raynium.launch import connect
from raynium.errors import LaunchError
tries, started = [], []
def init(**arguments):
    started.append(subprocess.Popen(["sleep", "60"]))
    tries.append(arguments["_temp_dir"])
    if len(tries) <= int(sys.argv[1]):
        raise Exception(sys.argv[2])
connect.ray.init = init
try:
    connect._start({"_temp_dir": "/tmp/there"})
except LaunchError as error:
    print(error)
killed = [each.wait(5) for each in started[:-1]]
print(len(tries), [*killed, None])
started[-1].kill()
"""
SLOW = "The current node timed out during startup. This could happen because the GCS has become overloaded."


@pytest.mark.parametrize(
    ("failures", "words", "told"),
    [
        (2, SLOW, ["3 [-9, -9, None]"]),
        (3, SLOW, ["a Ray cluster cannot be started on this machine: Exception: The current node timed out", "3 ["]),
        (
            1,
            "AF_UNIX path length cannot exceed 107 bytes",
            ["cannot be started on this machine: Exception: AF_UNIX", "1 ["],
        ),
    ],
)
def test_a_start_that_takes_too_long_is_tried_again_and_leaves_nothing(
    failures: int, words: str, told: list[str]
) -> None:
    command = [sys.executable, "-c", START, str(failures), words]
    done = subprocess.run(command, capture_output=True, text=True, process_group=0, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == len(told), done.stdout + done.stderr
    assert all(words in line for words, line in zip(told, lines, strict=True)), lines
    assert done.stderr.count("tried again") == (2 if words == SLOW else 0)


def test_what_ray_prints_of_its_processes_is_logged_and_not_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import ray._private.worker

    import raynium.launch.connect  # noqa: F401

    with caplog.at_level(logging.INFO):
        ray._private.worker.print_to_stdstream(
            {"lines": ["A worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False
        )
    assert capsys.readouterr().out == "" and "A worker died" in caplog.text


@pytest.mark.parametrize(("what", "limit"), [("head", "HEAD_LOST_SECONDS"), ("node of this", "NODE_LOST_SECONDS")])
def test_a_part_of_ray_that_is_gone_for_a_while_is_lost_and_one_that_comes_back_is_not(
    monkeypatch: pytest.MonkeyPatch, what: str, limit: str
) -> None:
    monkeypatch.setattr(head_module, "LOOK_SECONDS", 0.01)
    server, other = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    lost, stays = (f"127.0.0.1:{each.getsockname()[1]}" for each in (server, other))
    addresses = {"head": lost, "raylet": stays} if what == "head" else {"head": stays, "raylet": lost}
    with other, ClusterWatch(**addresses) as watch:
        time.sleep(0.1)
        watch.check()
        server.close()
        wait_for(lambda: watch._failing[lost][1] == "Connection refused" if lost in watch._failing else False)
        watch.check()
        monkeypatch.setattr(head_module, limit, 0.2)
        time.sleep(0.3)
        with pytest.raises(
            ClusterLost, match=rf"the {what}.*, {lost}, has not answered for \d s \(Connection refused\)"
        ):
            watch.check()
        with socket.create_server(("127.0.0.1", int(lost.rpartition(":")[2]))):
            time.sleep(0.2)
            watch.check()


def test_a_machine_that_is_too_busy_to_look_or_to_answer_itself_has_lost_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "NODE_LOST_SECONDS", 0.0)
    monkeypatch.setattr(head_module, "HEAD_LOST_SECONDS", 0.0)
    looks: list[str] = []

    def late(address: tuple[str, int], seconds: float) -> None:
        looks.append(address[0])
        raise TimeoutError("timed out")

    with ClusterWatch(head="127.0.0.1:1", raylet="127.0.0.1:2") as watch:
        time.sleep(0.05)
        watch.check()
    monkeypatch.setattr(head_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(head_module.socket, "create_connection", late)
    with ClusterWatch(head="127.0.0.1:1", raylet="127.0.0.1:2") as watch:
        wait_for(lambda: len(looks) > 4)
        with pytest.raises(ClusterLost, match=r"the head of the Ray cluster.*\(timed out\)"):
            watch.check()
        assert list(watch._failing) == ["127.0.0.1:1"]


NO_HOME = """
import os, pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
del os.environ["HOME"]
from raynium.launch.ray_environment import set_ray_environment
set_ray_environment(starts_cluster=True)
import ray.train
assert os.environ["HOME"] == f"{os.environ['TMPDIR']}/raynium-{os.getuid()}", os.environ["HOME"]
"""


def test_a_uid_that_no_user_has_and_no_home_folder_can_start_ray(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
