"""What a killed agent's ranks have started is ended by whoever comes next; what a living one's have started is not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raynium.node import orphans
from raynium.node.orphans import agent_mark, end_orphans

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are found in /proc")

TESTS = Path(__file__).parent
AGENT = """
import sys
sys.path.insert(0, sys.argv[1])
import _rank_programs
from raynium.node import orphans
orphans.AGENT_VARIABLE = sys.argv[2]
from raynium.node.ranks import RankGroup
group = RankGroup({0: {"RANK": "0"}}, "{}", program=_rank_programs.compile_for_long)
while True:
    for rank, line in group.poll(1)[1]:
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()
"""


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of these tests alone: agents of other tests, which run beside them, would end our orphans."""
    name = f"RAYNIUM_AGENT_OF_{os.getpid()}"
    monkeypatch.setattr(orphans, "AGENT_VARIABLE", name)
    return name


class Agent:
    """A node agent with one rank, whose compiler runs."""

    def __init__(self, variable: str) -> None:
        command = [sys.executable, "-c", AGENT, str(TESTS), variable]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.compiler, self.helper = map(int, self.process.stdout.readline().split())

    def kill(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture
def make_agent(variable: str) -> Iterator[Callable[[], Agent]]:
    made: list[Agent] = []

    def make() -> Agent:
        made.append(Agent(variable))
        return made[-1]

    yield make
    for agent in made:
        agent.kill()
        for pid in (agent.compiler, agent.helper):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_only_the_compilers_of_a_dead_agent_are_ended_with_their_helpers(
    make_agent: Callable[[], Agent], caplog: pytest.LogCaptureFixture
) -> None:
    dead, living = make_agent(), make_agent()
    dead.kill()
    assert is_running(dead.compiler) and is_running(dead.helper), "nothing is left behind: this tests nothing"
    (line,) = [line for line in end_orphans() if str(dead.compiler) in line]
    assert f"process {dead.compiler} (sh -c env -i sleep 300" in line and line in caplog.text
    for pid in (dead.compiler, dead.helper):
        wait_for_end(pid)
    assert is_running(living.compiler) and is_running(living.helper)


def test_an_orphan_in_a_group_that_somebody_living_leads_dies_alone(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "LEADER_SECONDS", 0.1)
    namespace = agent_mark()[variable].split("/")[0]
    marked = os.environ | {variable: f"{namespace}/{os.getpid()}/1"}  # our pid, but another start: long dead
    with subprocess.Popen(["sleep", "300"], process_group=0) as leader:
        with subprocess.Popen(["sleep", "300"], process_group=leader.pid, env=marked) as orphan:
            wait_for_environment(orphan.pid)
            end_orphans()
            assert orphan.wait(60) == -signal.SIGKILL
        assert leader.poll() is None
        leader.kill()


def test_a_process_of_another_container_is_left_alone(variable: str) -> None:
    marked = os.environ | {variable: "pid:[1]/1/1"}
    with subprocess.Popen(["sleep", "300"], env=marked) as foreign:
        wait_for_environment(foreign.pid)
        assert not [line for line in end_orphans() if f"process {foreign.pid} " in line]
        assert foreign.poll() is None
        foreign.kill()


def wait_for_environment(pid: int) -> None:
    """Popen returns once the program is another; the kernel shows no environment of it for a moment longer."""
    deadline = time.monotonic() + 60
    while not Path(f"/proc/{pid}/environ").read_bytes():
        assert time.monotonic() < deadline, f"{pid} has no environment"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for a zombie too: in a container nobody may collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
