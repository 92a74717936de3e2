"""The rank processes of a node: how they are set up and heard, how each end is told, and who outlives whom."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raynium.node.ranks import LAST_LINES, LONGEST_LINE_BYTES, RankGroup, start_template
from raynium.run.protocol import Outcome, RankExit
from raynium.train import link

TESTS = Path(__file__).parent


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`_rank_programs`, where forked ranks find it too: they get our path."""
    monkeypatch.syspath_prepend(str(TESTS))
    import _rank_programs

    return _rank_programs


@dataclass
class Ended:
    """A group after its end. Lines and messages are (rank, …) in the order they came."""

    exits: list[RankExit]
    lines: list[tuple[int, str]]
    messages: list[tuple[int, dict[str, Any]]]


def play(
    program: Callable[..., Any],
    plan: dict[str, Any] | None = None,
    *,
    ranks: int = 1,
    meanwhile: Callable[[RankGroup, list[tuple[int, dict[str, Any]]]], None] = lambda group, messages: None,
) -> Ended:
    """Runs a group to its end, as an agent does. meanwhile: called with what was heard so far."""
    environments = {rank: {"RANK": str(rank), "OF_THIS_RANK": f"value {rank}"} for rank in range(ranks)}
    group = RankGroup(environments, json.dumps(plan or {}), program=program)
    ended = Ended([], [], [])
    while group.alive():
        messages, lines = group.poll(0.1)
        ended.messages += messages
        ended.lines += lines
        meanwhile(group, ended.messages)
    group.kill()
    messages, lines = group.drain()
    ended.messages += messages
    ended.lines += lines
    ended.exits = [each.exit() for each in group.ranks.values()]
    group.close()
    return ended


def test_ranks_are_heard_and_their_lines_told_apart(programs: ModuleType) -> None:
    ended = play(programs.finish, {"step": 7}, ranks=2)
    outcome = Outcome(7, "finished")
    assert ended.exits == [RankExit(rank, 0, None, retry=False, outcome=outcome) for rank in range(2)]
    for rank in range(2):
        assert [line for of, line in ended.lines if of == rank] == ["to stdout", "to stderr", "ünfinished"]
        assert [type(each) for of, each in ended.messages if of == rank] == [link.Phase, link.Ended]


def test_output_without_an_end_of_line_comes_in_pieces(programs: ModuleType) -> None:
    ended = play(programs.never_end_a_line)
    assert sum(len(line) + 1 for _, line in ended.lines) >= 4000 * 99
    assert max(len(line) for _, line in ended.lines) <= 2 * LONGEST_LINE_BYTES


def test_a_rank_has_its_environment_and_torch_but_neither_ray_nor_mlflow(
    programs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["RANK", "OF_THIS_RANK", "TORCH_DEVICE_BACKEND_AUTOLOAD"]
    ended = play(programs.look_around, {"names": names}, ranks=2)
    for rank, line in ended.lines:
        assert json.loads(line) == {
            "environment": dict(zip(names, [str(rank), f"value {rank}", "0"], strict=True)),
            "loaded": ["raynium.rank.build", "torch"],
            "main": "__main__",
        }
    assert len(ended.lines) == 2
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in os.environ, "the template's variables are not ours"


def test_a_template_that_is_dying_is_replaced(
    programs: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_template(run_url="/nowhere", compile_backend=None)
    template = forkserver._forkserver
    os.kill(template._forkserver_pid, signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as client:  # as a process that has no open file left for its request does
        client.connect(template._forkserver_address)
    first = template._forkserver_pid
    read_answer = forkserver.read_signed

    def go_on_and_read(descriptor: int) -> int:  # once it has the request of our rank before it too
        os.kill(first, signal.SIGCONT)
        monkeypatch.setattr(forkserver, "read_signed", read_answer)
        return read_answer(descriptor)

    monkeypatch.setattr(forkserver, "read_signed", go_on_and_read)
    ended = play(programs.finish, {"step": 7}, ranks=2)
    assert [each.exit_code for each in ended.exits] == [0, 0]
    assert "has died" in caplog.text and template._forkserver_pid != first


def test_ranks_are_forked_though_the_log_lies_on_a_full_disk(
    programs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """multiprocessing flushes what is buffered there before it starts a process."""
    with open("/dev/full", "w") as full:
        full.write("a line that does not fit")
        monkeypatch.setattr(sys, "stderr", full)
        assert play(programs.finish, {"step": 7}).exits[0].exit_code == 0
        assert sys.stderr is full
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_threads_that_start_processes_leave_our_environment_alone() -> None:
    before, main = dict(os.environ), dict(vars(sys.modules["__main__"]))
    with ThreadPoolExecutor(8) as threads:
        start = functools.partial(start_template, run_url="/nowhere", compile_backend=None)
        for started in [threads.submit(start) for _ in range(2000)]:
            started.result()
    assert dict(os.environ) == before and vars(sys.modules["__main__"]) == main


def test_a_stop_reaches_all_ranks(programs: ModuleType) -> None:
    def stop_when_up(group: RankGroup, messages: list[tuple[int, dict[str, Any]]]) -> None:
        if len(messages) == 2:  # both are up
            group.broadcast(link.Stop())

    ended = play(programs.stop_when_told, ranks=2, meanwhile=stop_when_up)
    assert [each.outcome and each.outcome.reason for each in ended.exits] == ["stopped", "stopped"]


@pytest.mark.parametrize(
    ("program", "exit_code", "cause", "retry", "last_line"),
    [
        ("out_of_memory", -9, "killed by SIGKILL (out of memory? look for 'oom-kill' in the", True, "last words"),
        ("real_time_signal", -(signal.SIGRTMIN + 6), f"killed by signal {signal.SIGRTMIN + 6}", True, None),
        ("crash", -11, "killed by SIGSEGV", True, "in crash"),
        ("bad_data", 1, "DataError: no documents", False, "raynium.errors.DataError: no documents"),
        ("broken_network", 1, "RuntimeError: connection reset by peer", True, "RuntimeError: connection reset by peer"),
    ],
)
def test_the_cause_of_an_end_and_whether_to_try_again(
    programs: ModuleType, program: str, exit_code: int, cause: str, retry: bool, last_line: str | None
) -> None:
    (found,) = play(getattr(programs, program)).exits
    assert (found.exit_code, found.retry, found.outcome) == (exit_code, retry, None)
    assert found.cause is not None and found.cause.startswith(cause)
    if last_line is not None:
        assert any(line.endswith(last_line) for line in found.last_lines), found.last_lines
    assert len(found.last_lines) <= LAST_LINES


@pytest.mark.parametrize("code", [0, 7])
def test_an_end_without_a_word_is_a_failure(programs: ModuleType, code: int) -> None:
    (found,) = play(programs.leave, {"code": code}).exits
    assert (found.exit_code, found.cause, found.retry) == (code, f"exit code {code} without a reason", True)


def test_killing_a_group_ends_ranks_that_are_stuck(programs: ModuleType) -> None:
    group = RankGroup({rank: {"RANK": str(rank)} for rank in range(2)}, "{}", program=programs.hold_the_gil)
    lines: list[tuple[int, str]] = []
    while len(lines) < 2:
        lines += group.poll(1)[1]
    group.kill()
    assert [each.process.exitcode for each in group.ranks.values()] == [-9, -9]
    group.send(0, link.Stop())  # to a rank that is gone: nothing to tell, nothing to fail
    group.drain()
    group.close()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_compiler_that_a_rank_started_ends_with_it(programs: ModuleType, hangs: bool) -> None:
    group = RankGroup({0: {"RANK": "0"}}, json.dumps({"hangs": hangs}), program=programs.fail_while_compiling)
    lines: list[tuple[int, str]] = []
    while not lines or (group.alive() and not hangs):
        lines += group.poll(1)[1]
    compiler = int(lines[0][1])
    assert is_running(compiler)
    group.kill()
    group.drain()
    group.close()
    deadline = time.monotonic() + 30
    while is_running(compiler):
        assert time.monotonic() < deadline, "it has outlived its rank"
        time.sleep(0.01)


AGENT = """
import sys
sys.stdout.write(f"imported as {__name__}\\n")
sys.stdout.flush()
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import _rank_programs
    from raynium.node.ranks import RankGroup
    group = RankGroup({rank: {"RANK": str(rank)} for rank in range(2)}, "{}", program=_rank_programs.hold_the_gil)
    while True:
        for rank, line in group.poll(1)[1]:
            sys.stdout.write(f"rank {line}\\n")
            sys.stdout.flush()
"""


def test_a_killed_agent_takes_stuck_ranks_along_and_its_main_module_was_imported_once(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"  # Ray's worker script, say, which imports ray
    script.write_text(AGENT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    agent = subprocess.Popen(
        [sys.executable, str(script), str(TESTS)], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids: list[int] = []
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "imported as __main__\n"
        lines = [agent.stdout.readline() for _ in range(2)]
        assert all(line.startswith("rank ") for line in lines), lines
        pids = [int(line.split()[1]) for line in lines]
        agent.kill()
        agent.wait()
        deadline = time.monotonic() + 30
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() < deadline, "a rank has outlived its agent"
            time.sleep(0.01)
        assert agent.stdout.read() == ""
    finally:
        agent.kill()
        agent.communicate()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """False for a zombie too: in a container nobody may collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
