"""The rank processes of one node: forked from a warm template, watched, and taken down together.

The template is `multiprocessing`'s forkserver with torch preloaded. Nothing that owns a device, a thread or a socket
exists in it; the device library is imported in the fork, after its environment is set. No ray in here: a rank must
not pay for its import, and the tests of this file need no cluster.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TextIO, cast

from raynium.node.orphans import agent_mark
from raynium.node.scratch import sockets_parent
from raynium.rank import entry as rank_entry
from raynium.run.protocol import Outcome, RankExit
from raynium.storage.own_folder import drop_folder, own_folder
from raynium.train.link import AgentMessage, Ended, Failed, RankMessage, from_bytes, to_bytes

logger = logging.getLogger(__name__)

# All that a rank would load, so that one started again imports nothing. It starts no thread and opens no device.
PRELOADED_MODULES = (
    "raynium.rank.collectives",
    "raynium.rank.entry",
    "raynium.rank.template",
    "raynium.storage.file_store",
    # The first step's `numpy.unique` and FSDP's profiler marks import these; one that torch lacks is passed over.
    "numpy.ma",
    "torch.profiler._cupti_monitor",
)
PRELOADED_FOR_S3 = ("raynium.storage.s3_store",)

# Read when the template starts. AUTOLOAD: torch would open torch_neuronx's device at import. The BLAS libraries would
# start their thread pools at import, and threads do not survive a fork. glibc asks for huge pages: the first step of a
# new process touches most of its memory, and each page of 4 KiB costs a fault (`platform/DECISIONS.md`).
TEMPLATE_ENVIRONMENT = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# Of a dead rank's output, for the user's terminal; and a progress bar may write for weeks without ending a line.
LAST_LINES = 20
LONGEST_LINE_BYTES = 1 << 16


@dataclass
class RankProcess:
    """One rank as its agent sees it. connection: messages both ways (train/link.py). output: its stdout and stderr.

    stacks: what its threads do, once it is asked (node/looking.py).
    """

    rank: int
    process: ForkServerProcess
    connection: Connection
    output: Connection
    stacks: Connection
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    partial_line: bytes = b""
    outcome: Ended | None = None
    failure: Failed | None = None

    def exit(self) -> RankExit:
        """Valid once the process has ended and its connections are drained."""
        exit_code = self.process.exitcode
        assert exit_code is not None
        lines = tuple(self.last_lines)
        if exit_code == 0 and self.outcome is not None:
            ended = self.outcome
            return RankExit(self.rank, 0, None, retry=False, outcome=Outcome(ended.step, ended.reason, ended.why))
        if self.failure is not None:
            return RankExit(
                self.rank,
                exit_code,
                self.failure.cause,
                self.failure.retry,
                error=self.failure.error,
                last_lines=lines,
                undo=self.failure.undo,
            )
        if exit_code < 0:
            name = _signal_name(-exit_code)
            hint = " (out of memory? look for 'oom-kill' in the kernel's log)" if name == "SIGKILL" else ""
            return RankExit(self.rank, exit_code, f"killed by {name}{hint}", retry=True, last_lines=lines)
        return RankExit(self.rank, exit_code, f"exit code {exit_code} without a reason", retry=True, last_lines=lines)

    def close(self) -> None:
        """It has ended, or has not said anything yet and is ended now."""
        self.process.kill()
        self.process.join()
        for each in (self.connection, self.output, self.stacks, self.process):
            each.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # Python names the first and the last real-time signal only.
        return f"signal {number}"


# What follows changes the whole process: its `__main__` and its environment.
_STARTING = threading.RLock()


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """multiprocessing re-imports the parent's `__main__` in each child: here Ray's worker script, which imports ray."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    main.__spec__ = None
    if "__file__" in hidden:
        del main.__file__
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


@dataclass
class _Template:
    """What this process's template is started with, and the one that takes its place if it dies."""

    modules: list[str]
    environment: dict[str, str]


_template = _Template([*PRELOADED_MODULES], TEMPLATE_ENVIRONMENT)


def start_template(*, run_url: str, compile_backend: str | None) -> None:
    """Starts the warm template of this process; returns at once, the imports go on in the background.

    run_url: the store that its ranks may read. compile_backend: what they will give torch.compile; None: they compile
    nothing. A template that runs already stays as it is.
    """
    with _STARTING:
        on_s3 = run_url.startswith("s3://")
        _template.modules = [*PRELOADED_MODULES, *(PRELOADED_FOR_S3 if on_s3 else ())]
        compiles = {} if compile_backend is None else {rank_entry.COMPILE_BACKEND_VARIABLE: compile_backend}
        _template.environment = TEMPLATE_ENVIRONMENT | compiles
        _ensure_template()


def _ensure_template() -> None:
    with _STARTING, _main_module_hidden():
        # The template listens in a socket's file. multiprocessing's own folder for it may have too long a path, and
        # stays when this process is killed.
        if "tempdir" not in _process_config():
            _process_config()["tempdir"] = str(own_folder(sockets_parent(), "ranks"))
            multiprocessing.util.Finalize(None, drop_sockets, exitpriority=-100)
        multiprocessing.set_forkserver_preload(_template.modules)
        before = {name: os.environ.get(name) for name in _template.environment}
        os.environ.update(_template.environment)
        try:
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def drop_sockets() -> None:
    """Removes where the template listens: this process starts no rank any more."""
    if (folder := _process_config().pop("tempdir", None)) is not None:
        drop_folder(Path(folder))


def _process_config() -> dict[str, str]:
    return multiprocessing.current_process()._config  # pyright: ignore[reportAttributeAccessIssue]


class _Unflushed:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def _streams_unflushed() -> Iterator[None]:
    """multiprocessing flushes both before it starts a process: on a full disk that raises, and would end the agent with
    its ranks' snapshots. A fork of the template has nothing of what is buffered here.
    """
    out, err = (cast(TextIO, _Unflushed(stream)) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def start_process(process: ForkServerProcess) -> None:
    """Forks a process from the template, any thread; OSError or EOFError where this node lacks what that takes.

    A template that fails to fork ends, with all that it forked. What it is asked next fails, and a new one is asked.
    """
    with _STARTING, _main_module_hidden(), _streams_unflushed():
        _ensure_template()
        try:
            process.start()
        except (ConnectionError, EOFError) as error:
            logger.warning("the process that ranks are forked from has died (%s): another is started", error or "EOF")
            _end_template()
            _ensure_template()
            process.start()


def wait_for_template() -> None:
    """Returns once the template has imported all that it is to, and forks. OSError or EOFError as `start_process`."""
    process = multiprocessing.get_context("forkserver").Process(target=rank_entry.ends_at_once)
    start_process(process)
    process.join()
    process.close()


def _end_template() -> None:
    """Until the template is dead; `ensure_running` reaps it. The attribute is multiprocessing's own (3.11 to 3.14)."""
    pid = forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def fork_rank(
    rank: int, entry: Callable[..., None], environment: dict[str, str], plan_json: str, *more: Any
) -> RankProcess:
    """Forks a process that begins with `rank_entry.main` or `spare`; more: what that takes after its pipes."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=True)
    output_reader, output_writer = context.Pipe(duplex=False)
    stacks_reader, stacks_writer = context.Pipe(duplex=False)
    process = context.Process(
        target=entry,
        args=(environment | agent_mark(), plan_json, theirs, output_writer, stacks_writer, *more),
        name=f"rank-{rank:05d}",
        daemon=True,
    )
    start_process(process)
    theirs.close()
    output_writer.close()
    stacks_writer.close()
    return RankProcess(rank, process, ours, output_reader, stacks_reader)


# rank, its environment and plan, and where it is to listen → a process that has become this rank, or None.
TakeSpare = Callable[[int, dict[str, str], str, socket.socket | None], RankProcess | None]


class RankGroup:
    """The ranks of one generation on this node.

    One thread calls `poll()` in a loop, which moves and returns messages and output; any thread may `ring()` to end it.
    """

    def __init__(
        self,
        environments: dict[int, dict[str, str]],
        plan_json: str,
        *,
        program: "rank_entry.Program" = rank_entry.train_plan,
        rendezvous: socket.socket | None = None,
        take_spare: TakeSpare | None = None,
    ):
        """environments: rank → all its variables; plan_json: a `RankPlan`, the same for all ranks. rendezvous: where
        rank 0 will listen, if it is in this group; the caller closes it, since peers of a dead rank 0 would else wait.
        take_spare: see node/spares.py; a rank for which it has none is forked.
        """
        self.environments, self.plan_json, self.program = environments, plan_json, program
        self.ranks: dict[int, RankProcess] = {}
        for rank, environment in environments.items():
            listens = rendezvous if rank == 0 else None
            spare = take_spare(rank, environment, plan_json, listens) if take_spare is not None else None
            self.ranks[rank] = spare or fork_rank(rank, rank_entry.main, environment, plan_json, program, listens)
        self._bell_reader, self._bell_writer = multiprocessing.Pipe(duplex=False)
        self._open: dict[Any, RankProcess] = {}
        for each in self.ranks.values():
            self._open[each.connection] = each
            self._open[each.output] = each

    def poll(self, timeout_seconds: float) -> tuple[list[tuple[int, RankMessage]], list[tuple[int, str]]]:
        """Waits for news: (rank, message) pairs and (rank, output line) pairs, each in the order they arrived."""
        messages: list[tuple[int, RankMessage]] = []
        lines: list[tuple[int, str]] = []
        watched: list[Any] = [self._bell_reader, *self._open, *(each.process.sentinel for each in self.alive())]
        for ready in multiprocessing.connection.wait(watched, timeout_seconds):
            each = self._open.get(ready)
            if ready is self._bell_reader:
                self._bell_reader.recv_bytes()
            elif each is None:
                # A sentinel: somebody ended, seen through `ended()`.
                continue
            elif ready is each.connection:
                self._receive(each, messages)
            else:
                self._read_output(each, lines)
        return messages, lines

    def ring(self) -> None:
        """Ends a `poll()` that waits; safe from any thread, also when the group is already closed."""
        with contextlib.suppress(OSError):
            self._bell_writer.send_bytes(b"!")

    def alive(self) -> list[RankProcess]:
        return [each for each in self.ranks.values() if each.process.exitcode is None]

    def ended(self) -> list[RankProcess]:
        return [each for each in self.ranks.values() if each.process.exitcode is not None]

    def has_said_all(self, each: RankProcess) -> bool:
        """Whether the last of its messages has been read. It has ended."""
        return each.connection not in self._open

    def send(self, rank: int, message: AgentMessage) -> None:
        """A rank that is already gone is not told: its end is reported through `ended()`."""
        with contextlib.suppress(OSError):
            self.ranks[rank].connection.send_bytes(to_bytes(message))

    def broadcast(self, message: AgentMessage) -> None:
        for rank in self.ranks:
            self.send(rank, message)

    def kill(self) -> None:
        """SIGKILL to all that live, and waits for them: the next generation needs their cores and ports.

        Also to what they, and those that failed, have started: a compiler goes on for hours with a gigabyte of memory.
        """
        for each in self.ranks.values():
            if each.process.exitcode != 0:
                assert each.process.pid is not None
                # It may be that nobody of its group lives, or that it has made none yet.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(each.process.pid, signal.SIGKILL)
                each.process.kill()
        for each in self.ranks.values():
            each.process.join()

    def drain(self) -> tuple[list[tuple[int, RankMessage]], list[tuple[int, str]]]:
        """What ended ranks left in their pipes; a grandchild with one of them holds up nobody. Call after all ended."""
        messages: list[tuple[int, RankMessage]] = []
        lines: list[tuple[int, str]] = []
        deadline = time.monotonic() + 5.0
        while self._open and time.monotonic() < deadline:
            for ready in multiprocessing.connection.wait(list(self._open), 0.2):
                each = self._open.get(ready)
                if each is None:
                    continue
                if ready is each.connection:
                    self._receive(each, messages)
                else:
                    self._read_output(each, lines)
        return messages, lines

    def close(self) -> None:
        for each in self.ranks.values():
            each.close()
        self._bell_reader.close()
        self._bell_writer.close()
        self._open.clear()

    def _receive(self, each: RankProcess, messages: list[tuple[int, RankMessage]]) -> None:
        try:
            message = from_bytes(each.connection.recv_bytes())
        except (EOFError, OSError):
            del self._open[each.connection]
            return
        assert not isinstance(message, AgentMessage), "a rank sends no messages of its agent's"
        if isinstance(message, Ended):
            each.outcome = message
        elif isinstance(message, Failed):
            each.failure = message
        messages.append((each.rank, message))

    def _read_output(self, each: RankProcess, lines: list[tuple[int, str]]) -> None:
        data = os.read(each.output.fileno(), 65536)
        if not data:
            del self._open[each.output]
        *complete, each.partial_line = (each.partial_line + data).split(b"\n")
        if not data and each.partial_line:
            complete, each.partial_line = [each.partial_line], b""
        if len(each.partial_line) > LONGEST_LINE_BYTES:
            complete, each.partial_line = [*complete, each.partial_line], b""
        for raw in complete:
            line = raw.decode(errors="replace").rstrip()
            each.last_lines.append(line)
            lines.append((each.rank, line))
