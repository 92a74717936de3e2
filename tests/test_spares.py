"""The processes that wait to be ranks of the next generation: which become ranks, and what becomes of the others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from waiting import wait_for

from raynium.node.ranks import RankGroup
from raynium.node.spares import Spares
from raynium.train.link import Stop

TESTS = Path(__file__).parent


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`_rank_programs`, where forked ranks find it too: they get our path."""
    monkeypatch.syspath_prepend(str(TESTS))
    import _rank_programs

    return _rank_programs


def environments(generation: str) -> dict[int, dict[str, str]]:
    return {rank: {"RANK": str(rank), "GENERATION": generation} for rank in range(2)}


Begin = Callable[..., tuple[RankGroup, Spares]]


@pytest.fixture
def begin(programs: ModuleType) -> Iterator[Begin]:
    """Ranks of a first generation, and spares for the next one; what lives at the end is ended."""
    begun: list[tuple[RankGroup, Spares]] = []

    def start(rehearsal: Any = programs.rehearse_nothing) -> tuple[RankGroup, Spares]:
        group = RankGroup(environments("first"), "the first plan", program=programs.tell_place)
        begun.append((group, Spares(group, rehearsal=rehearsal)))
        return begun[-1]

    yield start
    for group, spares in begun:
        group.kill()
        group.close()
        spares.close()


def places(group: RankGroup) -> list[Any]:
    """What `tell_place` says of each rank, which then ends."""
    lines: list[tuple[int, str]] = []
    while len(lines) < len(group.ranks):
        lines += group.poll(1.0)[1]
    group.broadcast(Stop())
    while group.alive():
        group.poll(1.0)
    return [json.loads(line) for _, line in sorted(lines)]


def test_a_spare_becomes_the_rank_that_it_is_ordered_to_be(begin: Begin, programs: ModuleType) -> None:
    first, spares = begin()
    wait_for(spares.are_ready)
    pids = spares.pids()
    assert [psutil.Process(pid).name() for pid in pids] == ["spare-0", "spare-1"]
    with socket.create_server(("127.0.0.1", 0)) as rendezvous:
        address = list(rendezvous.getsockname())
        second = RankGroup(
            environments("second"), "the second plan", program=programs.tell_place, rendezvous=rendezvous,
            take_spare=spares.take,
        )  # fmt: skip
    told = places(second)
    assert [each["pid"] for each in told] == pids and [each["name"] for each in told] == ["rank-0", "rank-1"]
    assert [(each["generation"], each["plan"]) for each in told] == [("second", "the second plan")] * 2
    assert [each["listens"] for each in told] == [address, None]
    assert all(each.exit().cause is None for each in second.ranks.values())
    second.close()
    assert [each["generation"] for each in places(first)] == ["first", "first"]


def test_spares_that_died_or_are_not_ready_or_do_not_run_are_ended_and_ranks_forked(
    begin: Begin, programs: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for harm in ("fails", "is not ready", "is stopped"):
        rehearsal = {"fails": programs.rehearse_and_fail, "is not ready": programs.rehearse_for_ever}
        _, spares = begin(rehearsal.get(harm, programs.rehearse_nothing))
        pids = spares.pids()
        if harm == "fails":
            wait_for(lambda pids=pids: not any(psutil.pid_exists(pid) for pid in pids))
        elif harm == "is stopped":
            wait_for(spares.are_ready)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
                wait_for(lambda pid=pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        second = RankGroup(environments(harm), "", program=programs.tell_place, take_spare=spares.take)
        told = places(second)
        second.close()
        assert [each["generation"] for each in told] == [harm, harm]
        assert not {each["pid"] for each in told} & set(pids)
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert "the spare of rank 0 has died" in caplog.text and "RuntimeError: no rehearsal" in caplog.text
    assert "the spare of rank 1 has not rehearsed to the end, or is stopped" in caplog.text


def test_spares_leave_no_descriptor_and_no_process(programs: ModuleType) -> None:
    before = None
    for _ in range(3):
        group = RankGroup(environments("first"), "", program=programs.tell_place)
        spares = Spares(group, rehearsal=programs.rehearse_nothing)
        wait_for(spares.are_ready)
        pids = spares.pids()
        # One is taken, the other is not.
        second = RankGroup({0: environments("second")[0]}, "", program=programs.tell_place, take_spare=spares.take)
        spares.close()
        for each in (group, second):
            each.kill()
            each.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        # The first one has started the template.
        before = before or len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) == before


AGENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import _rank_programs as programs
from raynium.node.ranks import RankGroup
from raynium.node.spares import Spares
group = RankGroup({0: {"RANK": "0", "GENERATION": "first"}}, "", program=programs.tell_place)
spares = Spares(group, rehearsal=programs.rehearse_nothing)
while not spares.are_ready():
    time.sleep(0.01)
print(group.ranks[0].process.pid, *spares.pids(), flush=True)
time.sleep(600)
"""


def test_spares_die_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(TESTS)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    pids = [int(pid) for pid in agent.stdout.readline().split()]
    agent.kill()
    agent.communicate()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a spare has outlived its agent"
        time.sleep(0.02)
    assert len(pids) == 2
