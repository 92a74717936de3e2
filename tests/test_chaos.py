"""`raynium chaos`: its schedule, what a fault cost, what it hits of a run's processes, and ten faults in a real run."""

import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_documents, job_text
from waiting import wait_for

from raynium.chaos.cut_proxy import CutProxy
from raynium.chaos.kinds import KINDS, MEMORY_REFUSALS, NEEDS, kinds_for
from raynium.chaos.loopback import LoopbackCluster
from raynium.chaos.processes import RunProcesses
from raynium.chaos.scene import NotThere, Scene
from raynium.chaos.schedule import beside_audits, refuse_crowd, schedule
from raynium.chaos.sessions import start_ray
from raynium.chaos.soak import soak
from raynium.chaos.steps import Cost, Step, Steps, cost
from raynium.config.load import parse_config
from raynium.errors import ConfigError, LaunchError, StoreError
from raynium.rank.armed import CHAOS_VARIABLE, armed_memory
from raynium.storage.backend import KeyMissing
from raynium.storage.process import is_halted, pid_started
from raynium.storage.store import Store

NAMES = [kind.name for kind in KINDS]


# ---- the schedule ---------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**40), faults=st.integers(1, 400), kinds=st.integers(1, len(NAMES)))
def test_every_kind_comes_as_often_as_any_other_or_once_more(seed: int, faults: int, kinds: int) -> None:
    planned = schedule(NAMES[:kinds], faults=faults, steps=10_000, seed=seed)
    assert [fault.number for fault in planned] == list(range(1, faults + 1))
    times = Counter(fault.kind for fault in planned)
    assert {times[name] for name in NAMES[:kinds]} <= {faults // kinds, -(-faults // kinds)}


@given(seed=st.integers(0, 2**40), faults=st.integers(1, 400), steps=st.integers(1, 100_000))
def test_faults_come_in_the_order_of_their_steps_and_leave_the_last_ones_in_peace(
    seed: int, faults: int, steps: int
) -> None:
    at = [fault.step for fault in schedule(NAMES, faults=faults, steps=steps, seed=seed)]
    assert at == sorted(at) and at[0] >= 1
    assert at[-1] <= 1 + steps * faults / (faults + 1)


def test_in_200_faults_every_kind_comes_at_least_three_times() -> None:
    times = Counter(fault.kind for fault in schedule(NAMES, faults=200, steps=2000, seed=1))
    assert set(times) == set(NAMES) and min(times.values()) >= 3


@given(seed=st.integers(0, 2**40), faults=st.integers(1, 100), first=st.integers(1, 1500))
def test_a_kind_that_must_come_late_changes_places_with_another(seed: int, faults: int, first: int) -> None:
    planned = schedule(NAMES, faults=faults, steps=1000, seed=seed, not_before={"spike": first})
    assert all(fault.step >= first for fault in planned if fault.kind == "spike")
    usual = schedule(NAMES, faults=faults, steps=1000, seed=seed)
    left_out = len(usual) - len(planned)
    late = sum(fault.step >= first for fault in usual)
    spikes = sum(fault.kind == "spike" for fault in usual)
    assert left_out == max(0, spikes - late)
    assert {(fault.number, fault.step, fault.seed) for fault in planned} <= {
        (fault.number, fault.step, fault.seed) for fault in usual
    }


@given(seed=st.integers(0, 2**40), every_steps=st.integers(2, 20))
def test_bits_are_flipped_in_audited_steps_and_gradients_spoilt_in_others(seed: int, every_steps: int) -> None:
    planned = schedule(NAMES, faults=20, steps=420, seed=seed)
    moved = beside_audits(planned, every_steps=every_steps, flips="flipped-bit", spoils=["spike", "not-finite"])
    assert [each.number for each in moved] == [each.number for each in planned]
    for before, after in zip(planned, moved, strict=True):
        assert 0 <= after.step - before.step < every_steps and after.step <= 420
        if after.kind == "flipped-bit":
            assert after.step % every_steps == 0
        elif after.kind in ("spike", "not-finite"):
            assert after.step % every_steps and after.step - before.step <= 1
        else:
            assert after == before


def test_a_seed_is_a_schedule_and_another_seed_another() -> None:
    def planned(seed: int) -> list[tuple[int, str, int]]:
        return [(each.step, each.kind, each.seed) for each in schedule(NAMES, faults=20, steps=500, seed=seed)]

    assert planned(1) == planned(1) and planned(1) != planned(2)


def test_a_run_too_short_to_heal_between_its_faults_is_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"10 faults in train.steps = 200 .* Set train.steps=440 or more"):
        refuse_crowd(faults=10, steps=200, checkpoint_every=10)
    refuse_crowd(faults=10, steps=440, checkpoint_every=10)


# ---- what a fault cost ----------------------------------------------------------------------------------------------


def taken(*steps: tuple[int, float, int]) -> Steps:
    """Of (step, Unix time, process)."""
    return Steps(Path("/nowhere"), [Step(step, unix, process, "0x1p0") for step, unix, process in steps])


def test_a_fault_costs_the_time_until_a_step_that_no_life_had_taken_before_and_the_steps_done_again() -> None:
    steps = taken((1, 1.0, 7), (2, 2.0, 7), (3, 3.0, 7))
    killed_at = 3.5

    def paid() -> Cost | None:
        return cost(steps, struck_unix=killed_at, over_unix=killed_at, ends_ranks=True, before=3)

    assert paid() is None
    # The old rank 0 had a step under way.
    steps.taken.append(Step(4, 3.75, 7, "0x1p0"))
    assert paid() is None
    steps.taken += [Step(3, 9.0, 8, "0x1p0"), Step(4, 10.0, 8, "0x1p0")]
    assert paid() is None
    steps.taken.append(Step(5, 11.0, 8, "0x1p0"))
    assert paid() == Cost(seconds=11.0 - 3.75 - 1.0, steps=2)


def test_a_fault_that_lasts_costs_the_longest_time_without_a_step_until_it_is_over_and_may_cost_nothing() -> None:
    steps = taken((1, 1.0, 7), (2, 2.0, 7), (3, 3.0, 7), (4, 8.0, 7))
    assert cost(steps, struck_unix=2.5, over_unix=7.0, ends_ranks=False, before=2) == Cost(4.0, 0)
    assert cost(steps, struck_unix=2.5, over_unix=2.5, ends_ranks=False, before=2) == Cost(0.0, 0)
    held = Steps(Path("/nowhere"), [*steps.taken[:3], Step(4, 8.0, 7, "0x1p0", held=3.0)])
    assert cost(held, struck_unix=2.5, over_unix=7.0, ends_ranks=False, before=2) == Cost(1.0, 0)
    through = taken(*((step, float(step), 7) for step in range(1, 9)))
    assert cost(through, struck_unix=2.5, over_unix=7.0, ends_ranks=False, before=2) == Cost(0.0, 0)


def test_steps_are_read_on_and_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "steps")
    steps.look()
    assert steps.newest == 0
    (tmp_path / "steps").write_text("1 10.5 7 0x1p0 0.0\n2 11")
    steps.look()
    assert steps.newest == 1 and steps.losses() == {1: {"0x1p0"}}
    with (tmp_path / "steps").open("a") as file:
        file.write(".5 7 0x1p1 0.25\n1 12.5 8 0x1.8p0 0.0\n")
    steps.look()
    assert steps.newest == 2 and steps.losses() == {1: {"0x1p0", "0x1.8p0"}, 2: {"0x1p1"}}
    assert steps.usual_seconds() == 0.75


# ---- the kinds ------------------------------------------------------------------------------------------------------


def kind(name: str):
    (found,) = (each for each in KINDS if each.name == name)
    return found


def test_what_needs_s3_or_a_database_of_its_own_is_left_out_where_there_is_none() -> None:
    can, cannot = kinds_for(["folder", "sqlite", "silence", "leaps", "audits", "nodes", "spares"])
    s3 = ["store-refuses", "store-delays", "store-cuts", "store-silent"]
    assert [each.name for each in cannot] == [*s3, "server-away"]
    assert {each.name for each in can} == set(NAMES) - {each.name for each in cannot}
    nodes = ["lose-node", "lose-spare", "slow-node", "cut-node", "drain-node", "lose-head"]
    without = ["stop-uploader", "folder-away", "mlflow-away", "spike", "flipped-bit", *nodes]
    assert [each.name for each in kinds_for(["s3", "server"])[1]] == without
    assert {each.needs for each in KINDS} - {""} == set(NEEDS)


def test_a_run_without_ranks_has_nothing_to_hit() -> None:
    scene = Scene(RunProcesses(os.getpid(), {}), "sqlite:////nowhere.db", Path("/nowhere"))
    others = {"kill-driver", "folder-away", "mlflow-away", "server-away", "not-finite", "spike", "flipped-bit"}
    others |= {each.name for each in KINDS if each.needs in ("nodes", "spares")}
    for name in (each for each in NAMES if each not in others and not each.startswith("store")):
        with pytest.raises(NotThere, match="the run has no"):
            kind(name).strike(scene, Random(1))


# A driver, an agent, the process that it forks from, and two ranks and an uploader that name themselves.
FAMILY = """
import os, time
from raynium.rank.entry import name_this_process
if os.fork() == 0:
    if os.fork() == 0:
        for name in ("rank-0", "rank-1", "uploader"):
            if os.fork() == 0:
                name_this_process(name)
                break
time.sleep(600)
"""


@pytest.fixture
def family():
    driver = subprocess.Popen([sys.executable, "-c", FAMILY], start_new_session=True)
    try:
        wait_for(lambda: len(RunProcesses.of(driver.pid).ranks()) == 2 and RunProcesses.of(driver.pid).uploaders())
        yield driver
    finally:
        for pid in (*RunProcesses.of(driver.pid).others, driver.pid):
            os.kill(pid, signal.SIGKILL)
        driver.wait()


def test_a_run_s_processes_are_found_in_its_driver_s_session_and_hit(
    family: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = RunProcesses.of(family.pid)
    assert [each.name for each in found.ranks()] == ["rank-0", "rank-1"]
    (agent,) = found.agents()
    assert agent.parent == family.pid
    scene = Scene(found, "sqlite:////nowhere.db", tmp_path)

    slow = kind("slow-rank").strike(scene, Random(1))
    (halted,) = wait_for(lambda: [each for each in found.ranks() if is_halted(each.pid)])
    assert f"{halted.name} (process {halted.pid}) stands still" in slow.what and slow.seconds > 0
    slow.end()
    wait_for(lambda: not is_halted(halted.pid))

    full = kind("disk-full").strike(scene, Random(1))
    limits = [resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] for pid in (family.pid, agent.pid)]
    assert limits == [0, 0]
    full.end()
    assert resource.prlimit(agent.pid, resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY

    killed = kind("kill-rank").strike(scene, Random(1))
    assert killed.ends_ranks and "is killed" in killed.what
    wait_for(lambda: len(RunProcesses.of(family.pid).ranks()) == 1)

    stopped = kind("stop-uploader").strike(scene, Random(1))
    assert stopped.seconds == 0 and "is stopped for good" in stopped.what
    wait_for(lambda: all(is_halted(each.pid) for each in found.uploaders()))

    assert armed_memory()
    monkeypatch.setenv(CHAOS_VARIABLE, str(tmp_path))
    assert armed_memory()
    memory = kind("memory-full").strike(scene, Random(1))
    assert memory.ends_ranks and not memory.has_shown()
    assert [armed_memory() for _ in range(MEMORY_REFUSALS)] == [False] * MEMORY_REFUSALS
    assert memory.has_shown()
    memory.end()
    assert armed_memory()
    wait_for(lambda: not pid_started(agent.pid))


def test_mlflow_s_database_is_locked_and_free_again(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with sqlite3.connect(tmp_path / "mlflow.db") as made:
        made.execute("CREATE TABLE points (value)")
    away = kind("mlflow-away").strike(Scene(RunProcesses(1, {}), uri, tmp_path), Random(1))
    other = sqlite3.connect(tmp_path / "mlflow.db", timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM points")
    # As `soak` does it.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(away.end).result()
    assert other.execute("SELECT * FROM points").fetchall() == []


def test_a_store_in_a_folder_refuses_everything_while_a_file_is_in_its_place_and_is_then_as_before(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "run")
    store.write_new("checkpoints/before", b"1")
    scene = Scene(RunProcesses(1, {}), "sqlite:////nowhere.db", tmp_path, run_folder=store.local_path)
    away = kind("folder-away").strike(scene, Random(1))
    calls = (
        lambda: store.read("checkpoints/before"),
        lambda: store.list(),
        lambda: store.replace("checkpoints/before", b"2"),
        lambda: store.write_new("new", b"2"),
        lambda: store.delete("checkpoints/before"),
        lambda: store.size("checkpoints/before"),
    )
    for call in calls:
        with pytest.raises(StoreError) as refused:
            call()
        assert not isinstance(refused.value, KeyMissing)
    away.end()
    assert store.list().sizes == {"checkpoints/before": 1} and [each.name for each in tmp_path.iterdir()] == ["run"]
    scene = Scene(RunProcesses(1, {}), "", tmp_path, run_folder=tmp_path / "not-there")
    with pytest.raises(OSError, match="cannot change places"):
        kind("folder-away").strike(scene, Random(1))


@pytest.mark.slow
def test_an_mlflow_server_is_out_of_reach_and_back(mlflow_server: Any, tmp_path: Path) -> None:
    with CutProxy(mlflow_server.uri) as proxy:
        scene = Scene(RunProcesses(1, {}), mlflow_server.uri, tmp_path, mlflow_proxy=proxy)

        def answer() -> bytes:
            with urllib.request.urlopen(f"{proxy.uri}/health", timeout=10) as response:
                return response.read()

        assert answer() == b"OK"
        # A connection that is open is broken too.
        with socket.create_connection(("127.0.0.1", urlsplit(proxy.uri).port or 0), timeout=10) as waiting:
            waiting.sendall(b"GET ")
            wait_for(lambda: proxy._open)
            away = kind("server-away").strike(scene, Random(1))
            with pytest.raises(ConnectionError):
                waiting.recv(1)
                waiting.sendall(b"/")
                waiting.recv(1)
        with pytest.raises(OSError):
            answer()
        away.end()
        assert answer() == b"OK"


# ---- a cluster of several nodes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster.accelerator": "cuda"}, r"cluster.accelerator is cuda and the run takes 2 nodes: .* Set cluster.acc"),
        ({"cluster.min_nodes": 1}, r"cluster.min_nodes is 1 of 2: .* Leave cluster.min_nodes out"),
    ],
)
def test_nodes_that_cannot_be_played_here_are_refused_with_what_to_set(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = parse_config(job_text({"cluster.nodes": 2, "train.steps": 100, **changes}, root=tmp_path))
    with pytest.raises(ConfigError, match=words):
        soak(config, faults=1, seed=1, folder=tmp_path, tell=print)


@pytest.mark.slow
def test_a_ray_node_that_does_not_start_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"did not start a Ray node. It said:\n(.|\n)*--no-such-option"):
        start_ray(["--no-such-option"], os.environ, tmp_path / "log")


def test_a_node_that_cannot_be_drained_or_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain processes in the places of Ray nodes; one has the word of a raylet's command line."""
    cluster = LoopbackCluster(tmp_path, os.environ, nodes=2, cpus=1)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    for host, words in zip(cluster.hosts, ([], ["--node_id=ab"]), strict=True):
        cluster.nodes[host] = subprocess.Popen([*sleep, *words], start_new_session=True)
    monkeypatch.setattr("raynium.chaos.loopback.DRAIN_SECONDS", 0.01)
    try:
        with pytest.raises(LaunchError, match=r"the Ray node at 127\.0\.0\.3 has no raylet"):
            cluster.drain_node("127.0.0.3", seconds=1)
        with pytest.raises(LaunchError, match=r"drain-node .*--node-id=ab .*did not end within 0.01 s"):
            cluster.drain_node("127.0.0.4", seconds=1)
        with monkeypatch.context() as patch, pytest.raises(LaunchError, match="do not end, -1 s after SIGKILL"):
            patch.setattr("raynium.chaos.sessions.KILLED_SECONDS", -1.0)
            cluster.kill()
    finally:
        cluster.__exit__()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_on_nodes_that_are_cut_off_and_drained_ends_as_the_one_without(tmp_path: Path) -> None:
    changes = {
        "run.name": "nodes",
        "cluster.nodes": 2,
        "cluster.ranks_per_node": 1,
        "cluster.spares": 1,
        "fault.buddy_copies": True,
        # While a node is cut off the others get on.
        "train.steps": 100,
        "checkpoint.every_steps": 5,
        "evaluate.every_steps": 100,
        "fault.hang_seconds": 10.0,
    }
    output = chaos_output(tmp_path, changes, faults=2, seed=3436)
    # Nodes and heads that die have tests of their own.
    for kind_of_it in ("cut-node", "drain-node"):
        assert f": {kind_of_it}: " in output


# ---- a real run -----------------------------------------------------------------------------------------------------


def chaos_output(folder: Path, changes: dict[str, Any], *, faults: int, seed: int) -> str:
    """Of a `raynium chaos` that has passed."""
    build_documents(folder)
    (folder / "job.yaml").write_text(job_text(changes, root=folder))
    command = [sys.executable, "-m", "raynium.cli.app", "chaos", str(folder / "job.yaml")]
    command += [f"--faults={faults}", f"--seed={seed}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("it stood still for") == faults
    assert "are bit-equal" in done.stdout and "nobody typed anything" in done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_under_ten_faults_ends_as_the_one_without(tmp_path: Path) -> None:
    changes = {
        "run.name": "soak",
        "train.steps": 220,
        "checkpoint.every_steps": 5,
        "evaluate.every_steps": 100,
        "evaluate.max_documents": 2,
        "fault.hang_seconds": 10.0,
        "fault.upload_silence_seconds": 5.0,
    }
    # Of this seed are four processes that die, two that stand still, a disk, a database and two bad steps.
    output = chaos_output(tmp_path, changes, faults=10, seed=241)
    for kind_of_it in ("kill-driver", "kill-agent", "disk-full", "mlflow-away", "spike", "not-finite"):
        assert f": {kind_of_it}: " in output
