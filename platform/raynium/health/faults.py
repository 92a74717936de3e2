"""Why a rank on Neuron died: lines of its output and of the kernel's log in, one verdict out. No I/O.

The table is AWS's: the recovery table of "Neuron Runtime Troubleshooting" (nrt-troubleshoot.rst) and the status codes
of nrt_status.rst, in aws-neuron-sdk at 81ce03ae, read 2026-11-23. Its rows are ordered; the first that matches wins:

- What names broken hardware comes before what broken hardware causes (a wrong number, a hang).
- The same hang shows as several lines on one rank; the reading that costs no machine comes first.
- A bare status that has several causes comes last. NRT_TIMEOUT (5) alone says only that something did not end.

Not seen on hardware: the lines are those that AWS documents. A process's exit code says nothing, since 5 or 101 may be
anybody's.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal["replace", "reboot", "restart", "stop"]
Guilty = Literal["node", "peer", "job", "unknown"]

ACTIONS: dict[Action, str] = {
    "replace": "replace this instance (terminate it, or stop and start it): it will fail again",
    "reboot": "reboot this instance, or reload its device driver; then it may be used again",
    "restart": "restart the ranks",
    "stop": "stop: the same would happen again",
}


@dataclass(frozen=True)
class Row:
    """One known cause of death, and how to recognise it."""

    name: str
    cause: str  # a sentence without its subject's name and its full stop
    action: Action
    # whom to blame: this node's hardware; another rank; the job's code, data or settings
    guilty: Guilty
    source: str
    log: str | None = None  # pattern, in a line of a rank's output
    kernel: str | None = None  # pattern, in a line of the kernel's log
    statuses: tuple[int, ...] = ()  # of the Neuron runtime, in a rank's output


@dataclass(frozen=True)
class Fault:
    """What killed a rank or broke a node."""

    name: str
    cause: str
    action: Action
    guilty: Guilty
    evidence: str = ""  # the line that says so
    device: int | None = None  # Neuron device (a chip) of this node, as the driver counts
    core: int | None = None  # of that device

    @property
    def retry(self) -> bool:
        return self.action != "stop"

    @property
    def names_the_node(self) -> bool:
        """Whether somebody has to do something about this node before it is good again."""
        return self.guilty == "node" and self.action in ("replace", "reboot")

    def __str__(self) -> str:
        where = "" if self.device is None else f"Neuron device {self.device}, "
        where += "" if self.device is None or self.core is None else f"core {self.core}, "
        return f"{where}{self.cause}"


STATUSES: dict[int, str] = {
    1: "NRT_FAILURE",
    2: "NRT_INVALID",
    3: "NRT_INVALID_HANDLE",
    4: "NRT_RESOURCE",
    5: "NRT_TIMEOUT",
    6: "NRT_HW_ERROR",
    7: "NRT_QUEUE_FULL",
    9: "NRT_LOAD_NOT_ENOUGH_NC",
    10: "NRT_UNSUPPORTED_NEFF_VERSION",
    11: "NRT_FAIL_HOST_MEM_ALLOC",
    13: "NRT_UNINITIALIZED",
    14: "NRT_CLOSED",
    15: "NRT_QUEUE_EMPTY",
    101: "NRT_EXEC_UNIT_UNRECOVERABLE",
    1002: "NRT_EXEC_BAD_INPUT",
    1003: "NRT_EXEC_COMPLETED_WITH_NUM_ERR",
    1004: "NRT_EXEC_COMPLETED_WITH_ERR",
    1005: "NRT_EXEC_NC_BUSY",
    1006: "NRT_EXEC_OOB",
    1100: "NRT_COLL_PENDING",
    1200: "NRT_EXEC_HW_ERR_COLLECTIVES",
    1201: "NRT_EXEC_HW_ERR_HBM_UE",
    1202: "NRT_EXEC_HW_ERR_NC_UE",
    1203: "NRT_EXEC_HW_ERR_DMA_ABORT",
    1204: "NRT_EXEC_SW_NQ_OVERFLOW",
    1205: "NRT_EXEC_HW_ERR_REPAIRABLE_HBM_UE",
    1206: "NRT_NETWORK_PROXY_FAILURE",
}

EVIDENCE_CHARACTERS = 300  # of the line that is quoted

CORES_TAKEN = "cores-taken"  # the row below that passes by itself, if the process was killed a moment ago

_HARDWARE = "nrt-troubleshoot, Hardware Errors"
_NETWORK = "nrt-troubleshoot, EFA and Collective Communication Errors"
_CODES = "nrt_status"

NEURON_ROWS: tuple[Row, ...] = (
    # ---- broken hardware ---------------------------------------------------------------------------------------------
    Row(
        "sram-uncorrectable",
        "an on-chip memory had an error that cannot be corrected, and computed wrong results",
        "replace",
        "node",
        f"{_HARDWARE}: SRAM Uncorrectable",
        log=r"(?<!HBM )Uncorrectable memory error is detected",
        kernel=r"\bNEURON_HW_ERR=(SRAM|NC)_UNCORRECTABLE_ERROR\b",
        statuses=(1202,),
    ),
    Row(
        "hbm-unrepairable",
        "its HBM memory had an error that cannot be corrected or repaired, and results are wrong",
        "replace",
        "node",
        f"{_HARDWARE}: HBM Unrepairable Uncorrectable; the second wording: release notes of the runtime, 2.x",
        log=r"Uncorrectable HBM memory error is detected.*Please terminate"
        r"|encountered uncorrectable memory error on Neuron Device",
        kernel=r"\bNEURON_HW_ERR=HBM_UNCORRECTABLE_ERROR\b",
        statuses=(1201,),
    ),
    Row(
        "hbm-repairable",
        "its HBM memory had an error that a reboot repairs, and results are wrong",
        "reboot",
        "node",
        f"{_HARDWARE}: HBM Repairable Uncorrectable",
        log=r"Uncorrectable HBM memory error is detected",
        statuses=(1205,),
    ),
    Row(
        "dma-abort",
        "a DMA engine stopped for good",
        "replace",
        "node",
        f"{_HARDWARE}: DMA Aborts",
        log=r"\bDMA (TX|RX) engine \d+ is in an abort state",
        kernel=r"\bNEURON_HW_ERR=DMA_ERROR\b",
        statuses=(1203,),
    ),
    Row(
        "unknown-hardware-error",
        "the driver reports a hardware error that Raynium does not know",
        "restart",
        "unknown",
        "none: a name that the documents of 2026-11 do not have",
        kernel=r"\bNEURON_HW_ERR=(?!HANG_ON_COLLECTIVES)\w+",
    ),
    # ---- the job -----------------------------------------------------------------------------------------------------
    Row(
        "not-a-number",
        "an operation produced NaN: an error of the training, not of the hardware",
        "stop",
        "job",
        _CODES,
        statuses=(1003,),
    ),
    Row(
        "out-of-bounds",
        "an index was outside of its tensor: look for token ids at or above model.vocab_size",
        "stop",
        "job",
        "nrt-troubleshoot, execution fails at out-of-bound access",
        log=r"failed to run scatter/gather .* due to out-of-bound access|\bOut of bounds access on model",
        statuses=(1006,),
    ),
    Row(
        "notification-overflow",
        "the runtime's notification queue overflowed: set NEURON_RT_ENABLE_DGE_NOTIFICATIONS=0",
        "stop",
        "job",
        "nrt-troubleshoot, Neuron DGE notification queue overflow",
        log=r"potentially caused by DGE notifications enabled",
        statuses=(1204,),
    ),
    # ---- hangs -------------------------------------------------------------------------------------------------------
    Row(
        "collectives-hang",
        "a collective operation hung, most likely through a hardware error of another rank: this node is not to blame",
        "restart",
        "peer",
        f"{_HARDWARE}: Hang on Collectives; the kernel's line: AWS's problem detector for ECS",
        log=r"missing collectives status|(?i:suspected hang in collectives)",
        kernel=r"\bNEURON_HW_ERR=HANG_ON_COLLECTIVES\b",
        statuses=(1200,),
    ),
    Row(
        "compute-hang",
        "an execution did not end, for a reason in software or hardware that the runtime cannot tell",
        "replace",
        "node",
        f"{_HARDWARE}: Hang on Compute; `inference timeout` is its wording in runtimes before 2024",
        log=r"\(FATAL-RT-UNDEFINED-STATE\).*\b(execution|inference) timeout \(\d+ ms\)",
    ),
    # ---- the network -------------------------------------------------------------------------------------------------
    Row(
        "peer-gone",
        "the connection to another rank broke, most likely because that rank or its node ended",
        "restart",
        "peer",
        f"{_NETWORK}: Communication errors",
        log=r"connection closed by remote peer",
        statuses=(1206,),
    ),
    # ---- a node that is not set up -----------------------------------------------------------------------------------
    Row(
        "no-driver",
        "the Neuron driver is missing, or older than the runtime needs: install aws-neuronx-dkms of the same release",
        "stop",
        "job",
        "nrt-troubleshoot, Neuron Driver installation",
        log=r"Unable to determine Neuron Driver version|This runtime requires Neuron Driver version",
    ),
    Row(
        "no-collectives-library",
        "libnccom.so cannot be loaded: install aws-neuronx-collectives",
        "stop",
        "job",
        f"{_NETWORK}: Missing aws-neuronx-collectives package",
        log=r"Error opening libnccom\.so",
    ),
    Row(
        "no-efa",
        "EFA is not there: install efa-installer, and attach the instance's EFA cards when it is launched",
        "stop",
        "job",
        f"{_NETWORK}: Missing efa installer package. (`OFI plugin initNet() failed` alone is no sign: a node that has "
        "no EFA and needs none says so at each start, AWS's NKI quickstart)",
        log=r"Ofi plugin is not installed or EFA is not enabled",
    ),
    Row(
        CORES_TAKEN,
        "another process holds its NeuronCores, or one that was killed has not given them back yet",
        "restart",
        "unknown",
        "nrt-troubleshoot, NeuronCore(s) not available; since 2025 runtimes say Logical Neuron Core(s)",
        log=r"Neuron ?Core\(s\) not available",
        statuses=(9, 1005),
    ),
    # ---- statuses that say little ------------------------------------------------------------------------------------
    Row(
        "unrecoverable",
        "the execution unit is lost until the process starts anew",
        "restart",
        "unknown",
        _CODES,
        statuses=(101,),
    ),
    Row(
        "completed-with-error",
        "an execution ended in an error of logic or a parity error, and the runtime did not say which: "
        "replace the node if it happens there again",
        "restart",
        "unknown",
        f"{_CODES}; with the line of SRAM Uncorrectable it is that row",
        statuses=(1004,),
    ),
    Row(
        "hardware",
        "the runtime reports a hardware failure and not which one",
        "restart",
        "unknown",
        _CODES,
        statuses=(6,),
    ),
    Row(
        "timeout",
        "an operation of the runtime took too long, and no line says why",
        "restart",
        "unknown",
        _CODES,
        statuses=(5,),
    ),
    Row(
        "unfinished-collective",
        "a collective operation was still pending",
        "restart",
        "unknown",
        _CODES,
        statuses=(1100,),
    ),
    Row(
        "old-compiler",
        "the compiled graph is of a version that this runtime cannot run: "
        "install neuronx-cc and the runtime of one release, and empty the compile cache",
        "stop",
        "job",
        _CODES,
        statuses=(10,),
    ),
    Row(
        "bad-input",
        "an execution was given tensors that are not those of its graph",
        "stop",
        "job",
        _CODES,
        statuses=(2, 1002),
    ),
    Row(
        "misused-runtime",
        "the runtime was called before its start, after its end, or with a handle it does not know",
        "stop",
        "job",
        _CODES,
        statuses=(3, 13, 14),
    ),
    Row(
        "no-resource",
        "the runtime could not allocate what it needs, of the device's or the host's memory",
        "restart",
        "unknown",
        _CODES,
        statuses=(4, 11),
    ),
    Row("queue", "an execution queue was full or empty", "restart", "unknown", _CODES, statuses=(7, 15)),
    Row("failure", "the runtime failed and did not say how", "restart", "unknown", _CODES, statuses=(1,)),
)

# Not a cause: ranks wait for ever, mostly for one that still compiles.
WAITING = re.compile(r"Timeout waiting for (RX|incoming connection) \(waited (\d+) sec\) - retrying")

# How a status shows: by name, or as a number that is certain to be one.
_STATUS_NAME = re.compile(r"\b(" + "|".join(STATUSES.values()) + r")\b")
_STATUS_NUMBER = re.compile(
    r"(?:\b[Nn]rt(?:_\w+|::\w+)|\bNRT\b|[Ff]ailed to execute the model)[^\n]{0,120}?\bstatus(?:_code)?\s*[=:]\s*(\d+)\b"
    r"|\b(?:Inference|Execution) completed with err: (\d+)\b"
)
# After a failure the runtime prints its whole environment, NEURON_RT_EXEC_TIMEOUT and all; only this one is a symptom.
_DUMP = re.compile(r"\bNRT:nrt_infodump\b(?!.*\bFailure:)")
_NUMBERS = {name: number for number, name in STATUSES.items()}

_DEVICE = re.compile(
    r"(?:\bND |\bMLA |\bNeuron Device |\bnd-id=|\bnd)(\d{1,4})(?:\]?\[?(?:NC |:nc)| NC | nc-id=)(\d{1,4})\b"
)
_DEVICE_ONLY = re.compile(r"\bNeuron Device (\d{1,4})\b")


def classify(lines: Iterable[str], kernel_lines: Iterable[str] = (), rows: Sequence[Row] = NEURON_ROWS) -> Fault | None:
    """The first row that any of the lines shows; None if they show none.

    lines: of the ranks' output, exceptions' texts included. kernel_lines: of the node's kernel log since the ranks
    started. An older line of it would blame the node for what happened to somebody else.
    """
    output = [(line, statuses_in(line)) for line in lines]
    kernel = list(kernel_lines)
    for row in rows:
        evidence = _find(row, output, kernel)
        if evidence is not None:
            return make_fault(row, evidence)
    return None


def make_fault(row: Row, evidence: str) -> Fault:
    """The verdict of one row, with the device that the line names."""
    both, one = _DEVICE.search(evidence), _DEVICE_ONLY.search(evidence)
    device = int(both[1]) if both else int(one[1]) if one else None
    core = int(both[2]) if both else None
    named = [f"{STATUSES[number]} ({number})" for number in statuses_in(evidence) if number in row.statuses]
    cause = f"{row.cause} [{named[0]}]" if named else row.cause
    return Fault(row.name, cause, row.action, row.guilty, evidence.strip()[:EVIDENCE_CHARACTERS], device, core)


def statuses_in(line: str) -> list[int]:
    """Statuses of the Neuron runtime that a line reports, by name or by number; success is none."""
    if _DUMP.search(line):
        return []
    found = [_NUMBERS[name] for name in _STATUS_NAME.findall(line)]
    numbers = (int(first or second) for first, second in _STATUS_NUMBER.findall(line))
    return found + [number for number in numbers if number in STATUSES]


def symptoms(rows: Sequence[Row]) -> re.Pattern[str]:
    """What makes a line of a rank's output worth keeping until the rank dies: one search instead of a table's."""
    logs = [f"(?:{row.log})" for row in rows if row.log is not None]
    return re.compile("|".join([*logs, WAITING.pattern, _STATUS_NAME.pattern, _STATUS_NUMBER.pattern]))


def _find(row: Row, output: list[tuple[str, list[int]]], kernel: list[str]) -> str | None:
    if row.kernel is not None:
        for line in kernel:
            if re.search(row.kernel, line):
                return line
    for line, statuses in output:
        if row.log is not None and re.search(row.log, line):
            return line
        if any(number in row.statuses for number in statuses):
            return line
    return None
