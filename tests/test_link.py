"""A rank's line to its agent, over a real pipe between two processes: the messages are an interface of both."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from raynium.train.link import AGENT_LOST_EXIT_CODE, MemoryLink

pytestmark = pytest.mark.quick

PROLOGUE = """
import signal, sys, time
from multiprocessing.connection import Connection
from raynium.train.link import AgentLink
signal.alarm(60)  # a test that fails must not hang
link = AgentLink(Connection(int(sys.argv[1])), reports_steps=sys.argv[2] == "0")
"""


class Rank:
    """A process that runs `PROLOGUE` and a script, as rank 0 or another; this test is its agent."""

    def __init__(self, script: str, rank: int):
        self.connection, theirs = Pipe(duplex=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + script, str(theirs.fileno()), str(rank)],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()

    def receive(self) -> dict[str, Any]:
        return json.loads(self.connection.recv_bytes())

    def receive_all(self) -> list[dict[str, Any]]:
        messages = []
        try:
            while True:
                messages.append(self.receive())
        except EOFError:
            return messages

    def send(self, kind: str, **fields: Any) -> None:
        self.connection.send_bytes(json.dumps({"kind": kind} | fields).encode())

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def start() -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def start_rank(script: str, *, rank: int = 0) -> Rank:
        ranks.append(Rank(script, rank))
        return ranks[-1]

    yield start_rank
    for each in ranks:
        each.process.kill()
        each.process.communicate()
        each.connection.close()


CONVERSATION = """
link.phase("start", 0)
link.step(7, {"train/loss": 2.5})
link.compiled(7, graphs=2, seconds=1.5, surprises=["forward was compiled again"])
while not link.has_free_image(): time.sleep(0.001)
slot = link.wait_free_image()
link.image(slot, '{"step": 7}', '{"replicas": 7}', upload=True)
link.failed(ValueError("no"), retry=True)
link.outcome(7, "stopped")
link.close()
"""


def test_the_messages_are_as_documented(start: Callable[..., Rank]) -> None:
    rank = start(CONVERSATION)
    rank.send("ImageFree", slot=1)
    assert rank.receive_all() == [
        {"kind": "Phase", "name": "start", "step": 0},
        {"kind": "Stepped", "step": 7, "metrics": {"train/loss": 2.5}},
        {"kind": "Compiled", "step": 7, "graphs": 2, "seconds": 1.5, "surprises": ["forward was compiled again"]},
        {"kind": "ImageWritten", "slot": 1, "info": '{"step": 7}', "replicas": '{"replicas": 7}', "upload": True},
        {"kind": "Failed", "error": "ValueError", "cause": "ValueError: no", "retry": True, "undo": None},
        {"kind": "Ended", "step": 7, "reason": "stopped", "why": None},
    ]
    assert rank.end() == (0, "")


def test_other_ranks_report_a_step_as_a_heartbeat_without_numbers(start: Callable[..., Rank]) -> None:
    rank = start(CONVERSATION, rank=1)
    rank.send("ImageFree", slot=0)
    messages = rank.receive_all()
    assert messages[1] == {"kind": "Phase", "name": "fetch", "step": 8}
    assert len(messages) == 6


def test_a_stop_arrives(start: Callable[..., Rank]) -> None:
    rank = start(
        'link.phase("asked" if link.stop_requested() else "not asked", 0)\n'
        "while not link.stop_requested(): time.sleep(0.001)\n"
        'link.outcome(1, "stopped")\nlink.close()'
    )
    assert rank.receive()["name"] == "not asked"
    rank.send("Stop")
    assert rank.receive()["reason"] == "stopped"
    assert rank.end() == (0, "")


def test_an_image_is_written_only_once_the_agent_says_that_it_is_free(start: Callable[..., Rank]) -> None:
    rank = start(
        "for number in range(4):\n"
        "    link.phase('save', number)\n"
        "    link.image(link.wait_free_image(), str(number), '', upload=True)\n"
        "link.close()"
    )
    assert rank.receive()["name"] == "save"
    for number, slot in enumerate((0, 1, 1)):
        assert rank.receive() == {"kind": "Phase", "name": "upload", "step": number}, "what it waits for"
        assert not rank.connection.poll(0.2)
        rank.send("ImageFree", slot=slot)
        image = rank.receive()
        assert (image["info"], image["slot"]) == (str(number), slot)
        assert rank.receive() == {"kind": "Phase", "name": "save", "step": number + 1}
    assert rank.receive()["name"] == "upload"
    rank.send("ImageFree", slot=0)
    assert rank.receive()["slot"] == 0
    assert rank.end() == (0, "")


def test_behind_a_compilation_the_phase_goes_on_that_it_fell_into(start: Callable[..., Rank]) -> None:
    rank = start(
        "link.phase('step', 3)\n"
        "link.compiling(True); link.compiling(True); link.compiling(False)\n"
        "link.step(3, {})\n"
        "link.compiling(True); link.compiling(False)\n"
        "link.close()"
    )
    told = [(each["kind"], each.get("name"), each["step"]) for each in rank.receive_all()]
    phases = [("step", 3), ("compile", 3), ("compile", 3), ("step", 3)]
    behind = [("Stepped", None, 3), ("Phase", "compile", 4), ("Phase", "fetch", 4)]
    assert told == [("Phase", *each) for each in phases] + behind
    assert rank.end() == (0, "")


def test_images_are_written_in_the_order_in_which_they_were_offered(start: Callable[..., Rank]) -> None:
    """Not the lower number first: that may be the one which another rank's end makes worth keeping."""
    rank = start(
        "while len(link._free_images) < 2: time.sleep(0.001)\n"
        "for number in range(2): link.image(link.wait_free_image(), str(number), '', upload=False)\n"
        "link.close()"
    )
    for slot in (1, 0):
        rank.send("ImageFree", slot=slot)
    assert [each["slot"] for each in rank.receive_all()] == [1, 0]
    assert rank.end() == (0, "")


def test_an_agent_that_does_not_read_never_stops_training(start: Callable[..., Rank]) -> None:
    count = 20_000  # 1 MB: many times what a pipe holds
    rank = start(
        f"for step in range({count}): link.step(step, {{'train/loss': 1.0}})\n"
        'print("trained", flush=True)\n'
        "link.close()"
    )
    assert rank.process.stdout is not None
    assert rank.process.stdout.readline() == "trained\n"
    assert [each["step"] for each in rank.receive_all()] == list(range(count))
    assert rank.end() == (0, "")


@pytest.mark.parametrize(
    "script",
    ["time.sleep(100)", "while True: link.phase('step', 1)", "link.wait_free_image()"],
    ids=["training", "sending", "waiting"],
)
def test_a_rank_whose_agent_is_gone_ends_at_once(start: Callable[..., Rank], script: str) -> None:
    rank = start('link.phase("up", 0)\n' + script)
    rank.receive()
    rank.connection.close()
    assert rank.end() == (AGENT_LOST_EXIT_CODE, "")


def test_an_agent_that_can_only_be_written_to_no_more_is_gone_too(start: Callable[..., Rank]) -> None:
    rank = start('link.phase("up", 0)\nwhile True: link.phase("step", 1)')
    rank.receive()
    with socket.socket(fileno=os.dup(rank.connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RD)  # the rank meets a broken pipe before its receiver meets an end
    assert rank.end() == (AGENT_LOST_EXIT_CODE, "")


def test_the_fake_keeps_all_that_was_reported_of_a_step() -> None:
    link = MemoryLink(stop_at=2)
    assert not link.stop_requested()
    link.step(2, {"train/loss": 1.0})
    link.step(2, {"checkpoint/save_seconds": 0.1})
    assert link.steps == {2: {"train/loss": 1.0, "checkpoint/save_seconds": 0.1}}
    assert link.stop_requested()
