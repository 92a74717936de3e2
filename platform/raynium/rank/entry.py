"""The first code of a forked rank: environment, output and parent-death, before torch sees anything.

Kept apart from `rank/build.py` so that unpickling the process's target imports nothing.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from raynium.rank.group import RENDEZVOUS_VARIABLE

if TYPE_CHECKING:
    from raynium.train.link import AgentLink
    from raynium.train.loop import Outcome

    # What a rank runs once it is set up, given the plan as JSON and the link.
    Program = Callable[[str, AgentLink], Outcome]

    # What a spare does with a plan before it is needed.
    Rehearsal = Callable[[str], None]

# From linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15

# The template's variable that names torch.compile's backend, if its ranks will compile; see `rank/template.py`.
COMPILE_BACKEND_VARIABLE = "RAYNIUM_TEMPLATE_COMPILE_BACKEND"

# At this one a rank writes the stacks of all its threads to its agent; `node/looking.py` sends it.
STACKS_SIGNAL = signal.SIGUSR2


# A spare's first word.
SPARE_IS_READY = b"ready"


def train_plan(plan_json: str, link: "AgentLink") -> "Outcome":
    """The program of every rank; tests give others."""
    from raynium.rank.build import run
    from raynium.rank.plan import RankPlan

    return run(RankPlan.from_json(plan_json), link)


def ends_at_once() -> None:
    """For a fork by which its agent sees that the template is there."""


def main(
    environment: dict[str, str],
    plan_json: str,
    connection: Connection,
    output: Connection,
    stacks: Connection,
    program: "Program",
    rendezvous: socket.socket | None,
) -> None:
    """Runs one rank in a fresh fork of the template. Exits non-zero when it did not end as it should.

    environment: every variable the rank needs, set before any device library is imported.
    connection: to the node agent, messages of `train/link.py`. output: becomes this process's stdout and stderr.
    stacks: what its threads do is written there at STACKS_SIGNAL.
    rendezvous: where it is to listen, if it is rank 0.
    """
    _set_up(environment, output, stacks)
    _run(environment, plan_json, connection, program, None if rendezvous is None else rendezvous.detach())


def spare(
    environment: dict[str, str],
    plan_json: str,
    connection: Connection,
    output: Connection,
    stacks: Connection,
    program: "Program",
    rehearsal: "Rehearsal",
) -> None:
    """A fresh fork of the template that waits to be a rank of the next generation. As `main`, save:

    environment, plan_json: of the rank that has its place now, to rehearse with. connection: it says `SPARE_IS_READY`
    there, and is given the next generation's environment and plan, and the socket to listen on if it is to be rank 0.
    """
    _set_up(environment, output, stacks)
    name_this_process(f"spare-{environment['RANK']}")
    rehearsal(plan_json)
    connection.send_bytes(SPARE_IS_READY)
    try:
        environment, plan_json, listens = connection.recv()
        descriptor = reduction.recv_handle(connection) if listens else None
    except EOFError:
        # The run has ended without it.
        return
    os.environ.update(environment)
    _run(environment, plan_json, connection, program, descriptor)


def rehearse_plan(plan_json: str) -> None:
    """The rehearsal of every spare; tests give others."""
    from raynium.rank.plan import RankPlan
    from raynium.rank.rehearsal import rehearse

    rehearse(RankPlan.from_json(plan_json))


def _set_up(environment: dict[str, str], output: Connection, stacks: Connection) -> None:
    os.environ.update(environment)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    # A kill loses no line, and a crash in native code leaves Python's stack among the last lines.
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    faulthandler.enable()
    # Whoever does not read must not stop a rank.
    os.set_blocking(stacks.fileno(), False)
    faulthandler.register(STACKS_SIGNAL, file=stacks.fileno(), all_threads=True)
    die_with_the_agent()
    # A group of its own: a compiler that this rank starts ends with it, and Ctrl-C in a terminal is for the agent
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)


def _run(
    environment: dict[str, str], plan_json: str, connection: Connection, program: "Program", rendezvous: int | None
) -> None:
    """rendezvous: the number of the socket."""
    if rendezvous is not None:
        os.environ[RENDEZVOUS_VARIABLE] = str(rendezvous)
    name_this_process(f"rank-{environment['RANK']}")

    from raynium.errors import CheckpointMismatch, ConfigError, DataError, SnapshotMemoryShort
    from raynium.rank.collectives import collectives
    from raynium.train.audit import NotRepeatable
    from raynium.train.guard import Spike, TooManyBadSteps
    from raynium.train.link import AgentLink

    link = AgentLink(connection, reports_steps=environment["RANK"] == "0", collectives=collectives)
    try:
        outcome = program(plan_json, link)
    except Exception as error:
        undo = error.step if isinstance(error, Spike) else None
        if undo is None:
            traceback.print_exc()
        happens_again = isinstance(
            error,
            CheckpointMismatch | ConfigError | DataError | SnapshotMemoryShort | NotRepeatable | TooManyBadSteps,
        )
        link.failed(error, retry=not happens_again, undo=undo)
        link.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a collective's background thread may still wait for a peer.
        os._exit(1)
    link.outcome(outcome.step, outcome.reason, outcome.why)
    link.close()


def die_with_the_agent() -> None:
    """When the agent is killed the template ends, and the kernel then kills this process, whatever it is doing.

    The template ends when the last holder of its alive pipe does; a fork inherits one and must give it back. The
    attribute is multiprocessing's own (3.11 to 3.14); the test that kills an agent fails if it moves.
    """
    os.close(forkserver._forkserver._forkserver_alive_fd)  # pyright: ignore[reportAttributeAccessIssue]
    forkserver._forkserver._forkserver_alive_fd = None  # pyright: ignore[reportAttributeAccessIssue]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def name_this_process(name: str) -> None:
    """What `ps -o comm`, top and py-spy show: up to 15 characters. Else all forks of the template look alike."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
