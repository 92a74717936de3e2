"""`raynium train` as a person meets it: its own cluster, runs in S3, Ctrl-C, kill -9, and nothing left behind."""

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow_server import Server
from s3_server import S3Server
from tiny import build_documents, job_text
from waiting import wait_for

from raynium import Run, find_run

# What is waited for in here has limits of its own.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

RAYNIUM = str(Path(sys.executable).parent / "raynium")
CHANGES = {
    "run.name": "here",
    "optimizer.learning_rate": 3e-3,
    "train.steps": 100_000,
    "train.global_batch_size": 8,
    "checkpoint.every_steps": 10,
    "evaluate.every_steps": 200,
    "evaluate.max_documents": 2,
}


# Characters that mean something in a URL, a pattern or a shell, and one that is not ASCII.
ODD = "my runs, ü [a]#b?c%20d"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    odd = tmp_path / ODD
    odd.mkdir()
    build_documents(odd)
    (odd / "job.yaml").write_text(job_text(CHANGES, root=odd))
    return odd


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder: Ray must not leave its token there."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    yield home
    assert not (home / ".ray").exists()


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [RAYNIUM, "train", str(folder / "job.yaml"), *overrides]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, cwd=folder
    )


def wait_for_checkpoint(run: Run, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not any(each.step >= step for each in run.checkpoints()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


def descendants(pid: int) -> set[int]:
    """Every process below this one, now."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return {int(child) for child in children}.union(*(descendants(int(child)) for child in children))


def left(temporary: str) -> set[str]:
    """What runs have left in the temporary folder, beside torch's cache of compiled code."""
    return {name for name in os.listdir(temporary) if not name.startswith("torchinductor_")}


def living(pids: set[int]) -> dict[int, str]:
    """Those that still run, by name; Ray's two node agents wait a minute for a dead head before they end."""
    found = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:60]
    return {
        pid: name for pid, name in found.items() if name and "DashboardAgent" not in name and "EnvAgent" not in name
    }


def test_one_command_trains_and_samples(
    folder: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one test of `make test` that starts a Ray cluster; in a short folder for temporary files of its own."""
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.setenv("TMPDIR", temporary)
    process = start(folder, "train.steps=4", "sample.prompts=[def]", "sample.max_new_tokens=3")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "run here: finished at step 4 of 4" in output and "sampled from the model" in output
    run = find_run("here", str(folder))
    assert [point.step for point in run.metrics("train/loss")] == [1, 2, 3, 4]
    assert [each.step for each in run.checkpoints()] == [4] and run.record().state == "finished"
    longer, _ = start(folder, "train.steps=6").communicate(timeout=240)
    assert "from the checkpoint of step 4" in longer and "run here: finished at step 6 of 6" in longer, longer
    for words in (("runs",), ("status", "here"), ("checkpoints", "ls", "here"), ("checkpoints", "verify", "here")):
        done = subprocess.run([RAYNIUM, *words, "--root", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    run.export(folder / "exported")
    assert (folder / "exported/model.safetensors").is_file()
    assert not list(folder.parent.glob("*%25*")), "a library has taken the folder's name for a URL"
    assert "\x1b[" not in output
    assert left(temporary) == {f"raynium-{os.getuid()}"}, "spools, caches and logs"


@pytest.mark.slow
def test_a_temporary_folder_too_long_for_sockets_is_no_obstacle(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm's job folders are."""
    long = folder / ("slurm_jobdir_1355700_" * 4)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    process = start(folder, "train.steps=4")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "run here: finished at step 4 of 4" in output, output


@pytest.mark.slow
def test_agents_that_cannot_start_end_the_run_with_their_words(folder: Path, home: Path, tmp_path: Path) -> None:
    """In each process that has an agent: no rank of it can be made."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import multiprocessing.forkserver as module\n"
        "def refuse(self): raise OSError('no template today')\n"
        "module.ForkServer.ensure_running = refuse\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        process = start(folder, "fault.max_node_failures_without_progress=1")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "node 0: the agent failed: OSError: no template today" in output
    assert "error: run 'here' failed at step 0: a node agent was lost" in output


@pytest.mark.slow
def test_ranks_of_a_local_run_listen_on_the_loopback_only_and_are_as_nice_as_the_command(
    folder: Path, home: Path
) -> None:
    run = find_run("here", str(folder))
    process = start(folder)
    try:
        wait_for_checkpoint(run, 10, process)
        agents = run.record().agents
        assert agents is not None
        ranks = descendants(agents[0]["pid"])
        forked = [psutil.Process(pid) for pid in ranks]
        assert [each.nice() for each in forked if each.name().startswith("rank-")] == 2 * [os.nice(0)]
        sockets = [each for pid in ranks for each in psutil.Process(pid).net_connections("tcp")]
        heard = [each.laddr[0] for each in sockets if each.status == psutil.CONN_LISTEN]
        assert len(heard) > 1 and all(ipaddress.ip_address(host).is_loopback for host in heard), heard
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)


@pytest.mark.slow
def test_a_killed_controller_leaves_its_nodes_to_the_next_one(folder: Path, home: Path) -> None:
    """Where the run has all cores of its cluster, and there is no dashboard that Ray Train could ask who died."""
    run = find_run("here", str(folder))
    process = start(folder, "train.steps=300")
    wait_for_checkpoint(run, 20, process)
    found = subprocess.run(["pgrep", "-f", "^ray::TrainController"], capture_output=True, text=True).stdout.split()
    (controller,) = set(map(int, found)) & descendants(process.pid)
    os.kill(controller, signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and run.record().generation == 2, output
    assert "Ray Train's controller died" in output and "no step for" not in output


@pytest.mark.slow
def test_a_run_goes_on_without_its_mlflow_which_has_every_point_once_it_is_back(folder: Path, home: Path) -> None:
    """Started again while MLflow is away; ended by a signal, and by `raynium stop`, each with its exit code."""
    server = Server(folder)
    server.start()
    run = find_run("here", str(folder))
    try:
        first = start(folder, f"tracking.uri={server.uri}")
        wait_for_checkpoint(run, 10, first)
        first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=120)
        assert first.returncode == 143 and run.record().stopped_by == "SIGTERM", output
        reached = run.record().step

        server.kill()
        second = start(folder, f"tracking.uri={server.uri}")
        wait_for_checkpoint(run, reached + 20, second)
        server.start()
        wait_for(lambda: [point.step for point in run.metrics("train/loss")][-1] > reached + 20)
        run.stop()
        output, _ = second.communicate(timeout=120)
        assert second.returncode == 3 and "the run starts without its MLflow page" in output, output
        assert [point.step for point in run.metrics("train/loss")] == list(range(1, run.record().step + 1))
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.s3
def test_ctrl_c_to_the_whole_group_saves_and_kill_9_leaves_nothing_behind(
    folder: Path, home: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.setenv("TMPDIR", temporary)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    root = f"{s3_server.create_bucket('runs-of-a-team')}/{ODD}"
    places = (f"run.root={root}", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    run = find_run("here", root)

    first = start(folder, *places)
    wait_for_checkpoint(run, 10, first)
    os.killpg(first.pid, signal.SIGINT)  # what a terminal does
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    stopped = run.record()
    assert f"run here: stopped at step {stopped.step}" in output
    assert run.checkpoints()[-1].step == stopped.step

    second = start(folder, *places)
    wait_for_checkpoint(run, stopped.step + 20, second)
    below = descendants(second.pid)
    kept = left(temporary)
    # Spools and logs; Ray's session; the sockets of the ranks' template.
    assert len(kept) == 3 and {Path(temporary, each).stat().st_mode & 0o777 for each in kept} == {0o700}, kept
    second.kill()
    second.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while living(below):
        assert time.monotonic() < deadline, f"left behind: {living(below)}"
        time.sleep(0.2)

    saved = run.checkpoints()[-1].step
    # Further than it came: each of the four threads that wait for an upload may wait for a commit, two more saves for
    # a thread, and a third one for memory.
    end = saved + 80
    # The template may have taken its sockets' folder with it, if it saw its agent die before it was killed itself.
    assert left(temporary) <= kept
    third = start(folder, *places, f"train.steps={end}")
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 0, output
    assert left(temporary) == {f"raynium-{os.getuid()}"}, "what was killed has left went with the next start"
    assert f"from the checkpoint of step {saved}" in output
    assert f"run here: finished at step {end}" in output
    assert [point.step for point in run.metrics("train/loss")] == list(range(1, end + 1))
    assert run.record().state == "finished" and run.sample("def ", max_new_tokens=3).startswith("def ")

    again = start(folder, *places, f"train.steps={end}")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "has already finished" in output


@pytest.mark.parametrize("kind", ["of its own group", "leader of a session", "last of its group"])
def test_what_a_cluster_is_started_in_is_another_group_where_that_can_be(kind: str) -> None:
    script = (
        "import os, subprocess\n"
        "from raynium.launch.connect import _other_process_group\n"
        "before = os.getpgrp()\n"
        "with _other_process_group():\n"
        "    child = subprocess.Popen(['sleep', '1'])\n"
        "    inside = os.getpgid(child.pid)\n"
        "assert os.getpgrp() == before\n"
        "print('other' if inside != before else 'same')\n"
    )
    command = [sys.executable, "-c", script]
    match kind:
        case "of its own group":
            done = subprocess.run(command, capture_output=True, text=True, process_group=0)
        case "leader of a session":
            done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        case _:  # the shell that leads the group ends at once
            shell = ["sh", "-c", '"$@" & exit 0', "sh", *command]
            done = subprocess.run(shell, capture_output=True, text=True, process_group=0)
    assert done.stdout.strip() == ("same" if kind == "leader of a session" else "other"), done.stderr
