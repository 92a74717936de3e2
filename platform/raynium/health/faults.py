"""Why a rank died: lines of its output and of the kernel's log in, one verdict out. No I/O.

The table is faults.toml. Its rows are ordered; the first that matches wins:

- What names broken hardware comes before what broken hardware causes (a wrong number, a hang).
- The same hang shows as several lines on one rank; the reading that costs no machine comes first.
- A bare status that has several causes comes last. NRT_TIMEOUT (5) alone says only that something did not end.

A process's exit code says nothing, since 5 or 101 may be anybody's.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

Action = Literal["replace", "reboot", "restart", "stop"]
Guilty = Literal["node", "peer", "job", "unknown"]

ACTIONS: dict[Action, str] = {
    "replace": "replace this instance (terminate it, or stop and start it): it will fail again",
    "reboot": "reboot this instance, or reload its device driver; then it may be used again",
    "restart": "restart the ranks",
    "stop": "stop: the same would happen again",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One known cause of death, and how to recognise it; faults.toml says what each field means."""

    name: str
    cause: str
    action: Action
    guilty: Guilty
    source: str
    first: Action | None = None
    log: str | None = None
    exception: str | None = None
    kernel: str | None = None
    detail: str | None = None
    statuses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What killed a rank or broke a node.

    evidence: the line that says so, up to EVIDENCE_CHARACTERS. device: Neuron device (a chip) of this node, as the
    driver counts; core: of that device. details: what its line says besides, by the names of the row's groups.
    if_again: what helps if the same comes back on this node, where that is something else.
    """

    name: str
    cause: str
    action: Action
    guilty: Guilty
    evidence: str = ""
    device: int | None = None
    core: int | None = None
    details: Mapping[str, str] = field(default_factory=dict, hash=False)
    if_again: Action | None = None

    def again(self) -> "Fault":
        """The same on a node that has had it before."""
        return replace(self, action=self.if_again, if_again=None) if self.if_again is not None else self

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
        details = ", ".join(f"{name} {text}" for name, text in self.details.items())
        return f"{where}{self.cause}{f' ({details})' if details else ''}"


EVIDENCE_CHARACTERS = 300

# This row passes by itself, if the process was killed a moment ago.
CORES_TAKEN = "cores-taken"
# And this one if the graph is removed from the compile cache.
BROKEN_GRAPH = "broken-graph"
# Of this one only its line is known.
RUNTIME_ERROR = "runtime-error"

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ROWS: tuple[Row, ...] = tuple(
    Row(name=name, **row.pop("verdict"), **row) for name, row in _TABLE.items() if name != "words"
)
# Number → name, of the Neuron runtime.
STATUSES: dict[int, str] = {number: name for row in ROWS for name, number in row.statuses.items()}

# Not a cause: ranks wait for ever, mostly for one that still compiles. Runtimes before 2024 say no "retrying", some say
# where they wait.
WAITING = re.compile(
    r"Time(?:d )?out waiting for [^(\n]{1,60}\(waited (\d+) sec|Waiting on [\w ]{1,40} task: (\d+) sec"
)

# How a status shows: by name, or as a number that is certain to be one.
_STATUS_NAME = re.compile(r"\b(" + "|".join(STATUSES.values()) + r")\b")
_STATUS_NUMBER = re.compile(
    r"(?:\b[Nn]rt(?:_\w+|::\w+)|\bNRT\b|[Ff]ailed to execute the model)[^\n]{0,120}?"
    r"(?:\b|_)status(?:_code)?\s*[=:]\s*(\d+)\b"
    r"|\b(?:Inference|Execution) completed with err: (\d+)\b"
)
# What any row shows, in one search instead of a table's.
_SYMPTOM = re.compile(
    "|".join(
        [f"(?:{row.log})" for row in ROWS if row.log]
        + [each.pattern for each in (WAITING, _STATUS_NAME, _STATUS_NUMBER)]
    )
)
_WORDS: tuple[str, ...] = tuple(_TABLE["words"])
# After a failure the runtime prints its whole environment, NEURON_RT_EXEC_TIMEOUT and all; only this one is a symptom.
_DUMP = re.compile(r"\bNRT:nrt_infodump\b(?!.*\bFailure:)")
_NUMBERS = {name: number for number, name in STATUSES.items()}

_DEVICE = re.compile(
    r"(?:\bND ?|\bMLA |\bNeuron Device |\bnd-id=|\bnd)(\d{1,4})(?:\]?\[?:?(?:NC |nc)| NC | nc-id=| nc)(\d{1,4})\b"
)
_DEVICE_ONLY = re.compile(r"\b(?:Neuron Device |nd)(\d{1,4})\b")


def classify(lines: Iterable[str], kernel_lines: Iterable[str] = (), rows: Sequence[Row] = ROWS) -> Fault | None:
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


def classify_exception(text: str, rows: Sequence[Row] = ROWS) -> Fault | None:
    """The first row that an exception of torch's or of its process groups shows; None if it shows none."""
    rows = [row for row in rows if row.exception is not None and re.search(row.exception, text)]
    return make_fault(rows[0], text) if rows else None


def make_fault(row: Row, evidence: str) -> Fault:
    """The verdict of one row, with the device that the line names."""
    both, one = _DEVICE.search(evidence), _DEVICE_ONLY.search(evidence)
    device = int(both[1]) if both else int(one[1]) if one else None
    core = int(both[2]) if both else None
    named = [f"{STATUSES[number]} ({number})" for number in statuses_in(evidence) if number in row.statuses.values()]
    return Fault(
        row.name,
        f"{row.cause} [{named[0]}]" if named else row.cause,
        row.first or row.action,
        row.guilty,
        evidence.strip()[:EVIDENCE_CHARACTERS],
        device,
        core,
        _details(row, evidence),
        row.action if row.first is not None else None,
    )


def _details(row: Row, line: str) -> dict[str, str]:
    found = re.search(row.detail, line) if row.detail is not None else None
    return {name: text.strip() for name, text in found.groupdict().items() if text} if found else {}


def statuses_in(line: str) -> list[int]:
    """Statuses of the Neuron runtime that a line reports, by name or by number; success is none."""
    if _DUMP.search(line):
        return []
    found = [_NUMBERS[name] for name in _STATUS_NAME.findall(line)]
    numbers = (int(first or second) for first, second in _STATUS_NUMBER.findall(line))
    return found + [number for number in numbers if number in STATUSES]


def is_symptom(line: str) -> bool:
    """Whether a line of a rank's output is worth keeping until the rank dies."""
    lowered = line.lower()
    return any(word in lowered for word in _WORDS) and _SYMPTOM.search(line) is not None


def _find(row: Row, output: list[tuple[str, list[int]]], kernel: list[str]) -> str | None:
    """Of the lines that show it, the one that says most; of those that say as much, the first."""
    shows = [line for line in kernel if row.kernel is not None and re.search(row.kernel, line)]
    shows += [
        line
        for line, statuses in output
        if (row.log is not None and re.search(row.log, line))
        or any(number in row.statuses.values() for number in statuses)
    ]
    return max(shows, key=lambda line: len(_details(row, line)) + bool(_DEVICE.search(line)), default=None)
