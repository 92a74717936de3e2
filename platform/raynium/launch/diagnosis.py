"""Why ranks of this node died: from their output, their exit codes, the kernel's log and the node's shared memory.

The agent notes every line its ranks print, and asks once a generation has ended. What a rank raised stays what it is,
unless a table of known faults (accelerators/neuron_errors.py, and the one below) knows better.
"""

import logging
import os
import re
import shutil
import signal
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from raynium.accelerators.neuron_errors import NEURON_ROWS, WAITING, Fault, Row, classify, symptoms
from raynium.launch.images import shared_memory_folder
from raynium.launch.protocol import RankExit

logger = logging.getLogger(__name__)

KERNEL_LOG = Path("/dev/kmsg")
SEARCHED_CHARACTERS = 2000  # of a line: the search takes 0.4 µs each, and ranks may print whole graphs
KEPT_LINES = 50  # of one rank: the runtime prints hundreds of lines after the one that counts
SHARED_MEMORY_FULL_BYTES = 64 * 2**20  # less is left of /dev/shm than one buffer that ranks or libraries put there

# Exceptions of torch, torch-xla and the process groups: their text is the device's or a peer's, so the tables may know
# better. All others are the program's own.
LIBRARY_ERRORS = {
    *("RuntimeError", "XlaRuntimeError", "AcceleratorError", "OutOfMemoryError"),
    *("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"),
}

_XID = r"\bNVRM: Xid \(PCI:[^)]*\): "
_XIDS = "NVIDIA, Xid catalogue (docs.nvidia.com/deploy/xid-errors)"

COMMON_ROWS: tuple[Row, ...] = (
    Row(
        "gpu-memory-error",
        "a GPU's memory had an error that cannot be corrected",
        "reboot",
        "node",
        f"{_XIDS}: 48, 64, 95, reset the GPU",
        kernel=_XID + r"(48|64|95)\b",
    ),
    Row("gpu-lost", "a GPU fell off the bus", "reboot", "node", f"{_XIDS}: 79, reset the GPU", kernel=_XID + r"79\b"),
    Row(
        "gpu-contained-memory-error",
        "a GPU's memory had an error that cannot be corrected and that hit only this process",
        "restart",
        "unknown",
        f"{_XIDS}: 94, restart the application",
        kernel=_XID + r"94\b",
    ),
    Row(
        "device-memory",
        "the GPU has too little memory: set engine.activation_checkpointing=full, fewer sequences "
        "(train.global_batch_size), or more ranks",
        "restart",  # it may be another process's memory, or a late fragment; the same at once is counted and ends
        "job",
        "torch.OutOfMemoryError",
        log=r"CUDA out of memory",
    ),
)
ROWS = (*NEURON_ROWS, *COMMON_ROWS)

_SYMPTOMS = symptoms(ROWS)
_OOM_KILL = re.compile(r"(?:[Oo]ut of memory: Killed process |\boom-kill:.*,pid=)(\d+)")


class KernelLog:
    """What the kernel logs from now on. A file of the same lines does for tests."""

    def __init__(self, path: Path = KERNEL_LOG):
        self._path = path
        self._file: int | None = None
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:  # a container has none, and others than root may not read it
            logger.info("no kernel log, so no reason for a rank that the kernel kills (%s)", error)

    @property
    def readable(self) -> bool:
        return self._file is not None

    def new_lines(self) -> list[str]:
        """Messages since the last call, without their prefix."""
        text = b""
        while self._file is not None:
            try:
                record = os.read(self._file, 65536)
            except BlockingIOError:
                break
            except BrokenPipeError:  # the kernel overwrote what we had not read; the next read goes on behind it
                continue
            if not record:
                break
            text += record
        # <priority>,<number>,<microseconds>,<flags>;<message>, then indented lines of key=value
        records = (line for line in text.decode(errors="replace").splitlines() if line and not line.startswith(" "))
        return [re.sub(r"^\d+,\d+,\d+,[^;]*;", "", line) for line in records]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Diagnosis:
    """One node's, over the life of its agent. Used by one thread."""

    def __init__(self, kernel_log: KernelLog, *, shared_memory: Path | None = None):
        """shared_memory: the folder that ranks and libraries keep it in; None: this machine's."""
        self._kernel_log = kernel_log
        self._shared_memory = shared_memory or shared_memory_folder()
        self._kept: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))  # rank → its symptoms

    def note(self, rank: int, line: str) -> None:
        """Called with every line of a rank's output."""
        if _SYMPTOMS.search(line, 0, SEARCHED_CHARACTERS):
            self._kept[rank].append(line)

    def explain(self, exits: Iterable[tuple[int, RankExit]]) -> tuple[list[RankExit], Fault | None]:
        """(pid, exit) of the ranks that ended by themselves → the same with their causes, and what else is wrong here.

        The second is a fault of this node that none of these exits carries: it showed in the kernel's log, or in the
        output of a rank that hung and was killed with the others. Forgets what it was told.
        """
        kernel_lines = self._kernel_log.new_lines()
        explained = [self._explain(pid, exit, kernel_lines) for pid, exit in exits]
        died_of = [each.fault for each in explained if each.fault is not None]
        # One rank's lines at a time: in a hang a rank that only waited must not speak for the one it waited for.
        shown = [classify(kept, kernel_lines, ROWS) for kept in [(), *self._kept.values()]]
        self._kept.clear()
        if any(fault.names_the_node for fault in died_of):
            return explained, None
        return explained, next((fault for fault in shown if fault is not None and fault.names_the_node), None)

    def _explain(self, pid: int, exit: RankExit, kernel_lines: list[str]) -> RankExit:
        if exit.cause is None:
            return exit
        kept = self._kept[exit.rank]
        fault = classify([*kept, *exit.cause.splitlines()], kernel_lines, ROWS)
        own_exception = exit.error is not None and exit.error not in LIBRARY_ERRORS
        if fault is not None and own_exception and not fault.names_the_node:
            return exit
        if exit.exit_code == -signal.SIGBUS and fault is None:
            fault = self._shared_memory_full()
        if exit.exit_code == -signal.SIGKILL and (fault is None or not fault.names_the_node):
            return self._explain_kill(pid, exit, kernel_lines)
        if fault is not None:
            return replace(exit, cause=f"{fault} ({exit.cause})", retry=fault.retry, fault=fault)
        if kept and (waited := WAITING.search(kept[-1])):
            note = f"before, it had waited {waited[2]} s for another rank, which is no error while one compiles"
            return replace(exit, cause=f"{exit.cause} ({note})")
        return exit

    def _explain_kill(self, pid: int, exit: RankExit, kernel_lines: list[str]) -> RankExit:
        kills = [(int(match[1]), line) for line in kernel_lines if (match := _OOM_KILL.search(line))]
        for killed_pid, line in kills:
            if killed_pid == pid:
                fault = _out_of_memory(line)
                return replace(exit, cause=f"killed by SIGKILL: {fault}", fault=fault)
        if kills:  # its pid may be another in the kernel's eyes, inside a container
            fault = _out_of_memory(kills[-1][1])
            cause = f"killed by SIGKILL while the kernel ended process {kills[-1][0]}: {fault}"
            return replace(exit, cause=cause, fault=fault)
        if self._kernel_log.readable:
            return replace(exit, cause="killed by SIGKILL, by a person or a program: the kernel's log has no oom-kill")
        return exit

    def _shared_memory_full(self) -> Fault | None:
        usage = shutil.disk_usage(self._shared_memory)
        if usage.free >= SHARED_MEMORY_FULL_BYTES:
            return None
        cause = (
            f"shared memory is full, {usage.free >> 20} of {usage.total >> 20} MiB of {self._shared_memory} are free: "
            "remove what others left there, or mount it larger (Docker: --shm-size)"
        )
        return Fault("shared-memory-full", cause, "restart", "job")


def _out_of_memory(line: str) -> Fault:
    limited = "cgroup" in line or "CONSTRAINT_MEMCG" in line
    whose = "the memory limit of its container or service" if limited else "the node's memory"
    cause = f"{whose} was used up: take fewer ranks per node or a machine with more memory"
    return Fault("out-of-memory", cause, "restart", "job", line[:300])
