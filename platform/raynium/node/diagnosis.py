"""Why ranks of this node died: from their output, their exit codes, the kernel's log and the node's shared memory.

The agent notes every line its ranks print, and asks once a generation has ended. What a rank raised stays what it is,
unless a table of known faults (health/faults.py, and the one below) knows better.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from raynium.health.faults import ROWS, RUNTIME_ERROR, WAITING, Fault, Row, classify, classify_exception, is_symptom
from raynium.run.protocol import PEER_WORD_SECONDS, RankExit
from raynium.storage.own_folder import shared_memory_folder
from raynium.train.link import Failed

logger = logging.getLogger(__name__)

KERNEL_LOG = Path("/dev/kmsg")
# Where it cannot be read: a container has none, and Ubuntu, which AWS's images are, keeps it from all but root; its
# journal may be read by the group adm, to which the user of those images belongs.
LOG_PROGRAMS = (("dmesg",), ("journalctl", "--dmesg", "--quiet", "--no-pager", "--output=short-monotonic"))
PROGRAM_SECONDS = 10.0
# Of a line: ranks may print whole graphs. Of a rank: the runtime prints hundreds of lines after the one that counts.
SEARCHED_CHARACTERS = 2000
KEPT_LINES = 50
# Less than one buffer that ranks or libraries put into /dev/shm.
SHARED_MEMORY_FULL_BYTES = 64 * 2**20

# Exceptions of torch, torch-xla and the process groups have the text of the device or a peer, which the tables may know
# better. All others are the program's own.
LIBRARY_ERRORS = {
    *("RuntimeError", "XlaRuntimeError", "AcceleratorError", "OutOfMemoryError"),
    *("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"),
}

LIBRARY_SECONDS = 0.05
_OOM_KILL = re.compile(r"(?:[Oo]ut of memory: Killed process |\boom-kill:.*,pid=)(\d+)")


def seconds_for_others(failure: Failed | None, exit_code: int | None) -> float:
    """How long other ranks' words are worth waiting for, after this one's last.

    An exception of its own, or a signal, says why. A library's may be a consequence, or an abort of a watchdog: a peer
    that knows more fails in the same moment. That a peer is gone says only that its own word is on its way.
    """
    if failure is None:
        return LIBRARY_SECONDS if exit_code == -signal.SIGABRT else 0.0
    if failure.error not in LIBRARY_ERRORS:
        return 0.0
    fault = classify_exception(failure.cause)
    return PEER_WORD_SECONDS if fault is not None and fault.guilty == "peer" else LIBRARY_SECONDS


class KernelLog:
    """What the kernel logs from now on: from /dev/kmsg, or else from a program that prints the log."""

    def __init__(self, path: Path = KERNEL_LOG, programs: Sequence[Sequence[str]] = LOG_PROGRAMS):
        """path: a file of the same lines does for tests. programs: tried in order if the file cannot be read."""
        self._file: int | None = None
        self._program: Sequence[str] | None = None
        self._last_line: str | None = None
        why: list[str] = []
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            why.append(f"{path}: {error.strerror}")
        for program in programs if self._file is None else ():
            lines = _printed(program)
            if isinstance(lines, str):
                why.append(lines)
            else:
                self._program, self._last_line = program, lines[-1] if lines else None
                break
        self.source = str(path) if self._file is not None else " ".join(self._program) if self._program else None
        self.problem = "; ".join(why) if self.source is None else ""
        logger.info("kernel log: %s", self.source or f"none, so a death may stay unexplained ({self.problem})")

    @property
    def readable(self) -> bool:
        return self.source is not None

    def new_lines(self) -> list[str]:
        """Messages since the last call, without their prefix. A program that fails by now is said in the log."""
        if self._program is not None:
            return self._newly_printed(self._program)
        text = b""
        while self._file is not None:
            try:
                record = os.read(self._file, 65536)
            except BlockingIOError:
                break
            except BrokenPipeError:
                # The kernel overwrote what we had not read; the next read goes on behind it.
                continue
            if not record:
                break
            text += record
        # <priority>,<number>,<microseconds>,<flags>;<message>, then indented lines of key=value
        records = (line for line in text.decode(errors="replace").splitlines() if line and not line.startswith(" "))
        return [re.sub(r"^\d+,\d+,\d+,[^;]*;", "", line) for line in records]

    def _newly_printed(self, program: Sequence[str]) -> list[str]:
        lines = _printed(program)
        if isinstance(lines, str):
            logger.warning("the kernel's log can no longer be read: %s", lines)
            return []
        # Without that line the log was overwritten: all of it is new.
        num_new = lines[::-1].index(self._last_line) if self._last_line in lines else len(lines)
        self._last_line = lines[-1] if lines else None
        # [seconds since boot] message, which makes lines unlike; journalctl puts "host kernel: " between
        return [re.sub(r"^\[\s*[\d.]+\] (\S+ kernel: )?", "", line) for line in lines[len(lines) - num_new :]]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _printed(program: Sequence[str]) -> list[str] | str:
    """A program's lines, or one string why there are none: without the right, journalctl succeeds and prints none."""
    try:
        done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program[0]}: {getattr(error, 'strerror', None) or f'no answer within {PROGRAM_SECONDS:g} s'}"
    if done.returncode != 0 or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"{program[0]}: {said[-1] if said else f'exit code {done.returncode}, no line'}"
    return done.stdout.decode(errors="replace").splitlines()


class Diagnosis:
    """One node's, over the life of its agent. Used by one thread. It keeps the last symptoms of each rank."""

    def __init__(self, kernel_log: KernelLog, *, shared_memory: Path | None = None):
        """shared_memory: the folder that ranks and libraries keep it in; None: this machine's."""
        self._kernel_log = kernel_log
        self._shared_memory = shared_memory or shared_memory_folder()
        self._kept: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))

    def note(self, rank: int, line: str) -> None:
        """Called with every line of a rank's output."""
        if is_symptom(line[:SEARCHED_CHARACTERS]):
            self._kept[rank].append(line)

    def explain(self, exits: Iterable[tuple[int, RankExit]]) -> tuple[list[RankExit], Fault | None]:
        """(pid, exit) of the ranks that ended by themselves → the same with their causes, and what else is wrong here.

        The second is a fault of this node that none of these exits carries: it showed in the kernel's log, or in the
        output of a rank that hung and was killed with the others. Forgets what it was told.
        """
        kernel_lines = self._kernel_log.new_lines()
        rows = _rows(self._kept.values())
        explained = [self._explain(pid, exit, kernel_lines, rows) for pid, exit in exits]
        died_of = [each.fault for each in explained if each.fault is not None]
        # One rank's lines at a time: in a hang a rank that only waited must not speak for the one it waited for.
        shown = [classify(kept, kernel_lines, rows) for kept in [(), *self._kept.values()]]
        self._kept.clear()
        if any(fault.names_the_node for fault in died_of):
            return explained, None
        return explained, next((fault for fault in shown if fault is not None and fault.names_the_node), None)

    def _explain(self, pid: int, exit: RankExit, kernel_lines: list[str], rows: Sequence[Row]) -> RankExit:
        if exit.cause is None:
            return exit
        kept = self._kept[exit.rank]
        fault = classify([*kept, *exit.cause.splitlines()], kernel_lines, rows)
        own_exception = exit.error is not None and exit.error not in LIBRARY_ERRORS
        if fault is not None and own_exception and not fault.names_the_node:
            return exit
        if (fault is None or fault.name == RUNTIME_ERROR) and exit.error in LIBRARY_ERRORS:
            fault = classify_exception(exit.cause) or fault
        if exit.exit_code == -signal.SIGBUS and fault is None:
            fault = self._shared_memory_full()
        if exit.exit_code == -signal.SIGKILL and (fault is None or not fault.names_the_node):
            return self._explain_kill(pid, exit, kernel_lines)
        if fault is not None:
            return replace(exit, cause=f"{fault} ({exit.cause})", retry=fault.retry, fault=fault)
        if kept and (waited := WAITING.search(kept[-1])):
            seconds = waited[1] or waited[2]
            note = f"before, it had waited {seconds} s for another rank, which is no error while one compiles"
            return replace(exit, cause=f"{exit.cause} ({note})")
        return exit

    def _explain_kill(self, pid: int, exit: RankExit, kernel_lines: list[str]) -> RankExit:
        kills = [(int(match[1]), line) for line in kernel_lines if (match := _OOM_KILL.search(line))]
        for killed_pid, line in kills:
            if killed_pid == pid:
                fault = _out_of_memory(line)
                return replace(exit, cause=f"killed by SIGKILL: {fault}", fault=fault)
        # Inside a container its pid may be another in the kernel's eyes.
        if kills:
            fault = _out_of_memory(kills[-1][1])
            cause = f"killed by SIGKILL while the kernel ended process {kills[-1][0]}: {fault}"
            return replace(exit, cause=cause, fault=fault)
        if self._kernel_log.readable:
            return replace(exit, cause="killed by SIGKILL, by a person or a program: the kernel's log has no oom-kill")
        unknown = f"by whom is not known, since the kernel's log cannot be read here ({self._kernel_log.problem})"
        return replace(exit, cause=f"{exit.cause}, {unknown}")

    def _shared_memory_full(self) -> Fault | None:
        usage = shutil.disk_usage(self._shared_memory)
        if usage.free >= SHARED_MEMORY_FULL_BYTES:
            return None
        cause = (
            f"shared memory is full, {usage.free >> 20} of {usage.total >> 20} MiB of {self._shared_memory} are free: "
            "remove what others left there, or mount it larger (Docker: --shm-size)"
        )
        return Fault("shared-memory-full", cause, "restart", "job")


def _rows(lines_by_rank: Iterable[Iterable[str]]) -> tuple[Row, ...]:
    """ROWS; but an execution that ends on several chips of a node at once is no sign that one of them is broken.

    AWS's table has a hang of software in the same row: every rank of every node reports it, and all would be replaced.
    """
    faults = [classify(lines) for lines in lines_by_rank]
    chips = {fault.device for fault in faults if fault is not None and fault.name == "compute-hang"}
    if len(chips) < 2:
        return ROWS
    cause = (
        f"an execution did not end, on {len(chips)} chips of this node at once: a hang of software, or of another node"
    )
    return tuple(
        replace(row, cause=cause, action="restart", first=None, guilty="unknown") if row.name == "compute-hang" else row
        for row in ROWS
    )


def _out_of_memory(line: str) -> Fault:
    limited = "cgroup" in line or "CONSTRAINT_MEMCG" in line
    whose = "the memory limit of its container or service" if limited else "the node's memory"
    cause = f"{whose} was used up: take fewer ranks per node or a machine with more memory"
    return Fault("out-of-memory", cause, "restart", "job", line[:300])
