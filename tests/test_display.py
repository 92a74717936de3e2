"""What the person at the terminal sees while a run goes on."""

import contextlib
import errno
import io
import os
import pty
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raynium.run.protocol import Status
from raynium.terminal.display import LOG_SECONDS, Display, Pace, progress_line

pytestmark = pytest.mark.quick

METRICS = {"train/loss": 3.21449, "eval/bits_per_byte": 2.305, "throughput/tokens_per_second": 5210.4}


def status(step: int, **changes: Any) -> Status:
    fields: dict[str, Any] = {
        "generation": 1, "running": True, "resume_step": None, "step": step, "metrics": {}, "committed_step": None,
        "committed_uri": None, "agents": (), "ended": None, "cause": None,
    }  # fmt: skip
    return Status(**fields | changes)


@pytest.mark.parametrize(
    ("now", "steps_per_second", "line"),
    [
        (status(0), None, "step 0/1,400"),
        (status(1400), 2.0, "step 1,400/1,400 · ETA 0:00"),
        (
            status(1200, metrics=METRICS, committed_step=1000),
            2.0,
            "step 1,200/1,400 · loss 3.214 · held-out 2.305 bits/byte · 5,210 tokens/s · ETA 1:40 · checkpoint 1,000",
        ),
        (status(324, evaluation=(40, 180)), 2.0, "step 324/1,400 · evaluating 40/180 · ETA 8:58"),
        (status(5, committed_step=0), 0.1, "step 5/1,400 · ETA 3:52:30 · checkpoint 0"),
    ],
)
def test_the_progress_line(now: Status, steps_per_second: float | None, line: str) -> None:
    assert progress_line(now, 1400, steps_per_second) == line


def paces(sightings: Iterable[tuple[int, int, float]]) -> list[float | None]:
    pace = Pace()
    return [pace.update(generation, step, now) for generation, step, now in sightings]


def test_the_pace_counts_from_the_end_of_the_first_step() -> None:
    # Step 1 took 60 s of compilation, each of the others 2 s.
    assert paces([(1, 0, 0.0), (1, 0, 30.0), (1, 1, 60.0), (1, 1, 61.0), (1, 2, 62.0), (1, 6, 70.0)]) == [
        *[None] * 4, 0.5, 0.5,
    ]  # fmt: skip


def test_a_new_generation_starts_the_estimate_again() -> None:
    first = [(1, 0, 0.0), (1, 1, 1.0), (1, 11, 2.0)]
    # It goes on from the checkpoint of step 5 after a minute of waiting, at half the pace.
    second = [(2, 5, 62.0), (2, 6, 63.0), (2, 11, 64.0)]
    assert paces([*first, *second]) == [None, None, 10.0, None, None, 5.0]


def test_a_step_back_without_a_new_generation_starts_it_again_too() -> None:
    assert paces([(1, 50, 0.0), (1, 51, 1.0), (1, 52, 2.0), (1, 10, 3.0), (1, 11, 4.0), (1, 15, 5.0)]) == [
        None, None, 1.0, None, None, 4.0,
    ]  # fmt: skip


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("raynium.terminal.display.time.monotonic", lambda: self.now)


def lines_of(path: Path) -> list[str]:
    """A log's lines without their times."""
    return [line.split(" ", 2)[2] for line in path.read_text().splitlines()]


def test_without_a_terminal_progress_becomes_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    output = io.StringIO()
    log = tmp_path / "logs" / "driver.log"
    with Display(30, Console(file=output, width=40), log) as display:
        display.line("generation 1: 2 ranks, and a line that is much longer than the terminal is wide [not markup]")
        display.show(status(0, running=False))
        for step in range(1, 31):
            display.show(status(step))
            display.show(status(step))  # asked for more often than there is news
            clock.now += LOG_SECONDS / 10
    shown = output.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in shown[1:]] == [f"step {n}/30" for n in (1, 11, 21, 30)]
    assert shown[0].endswith("terminal is wide [not markup]"), "lines are neither wrapped nor read as markup"
    assert lines_of(log) == shown


def test_a_terminal_has_one_live_line_and_the_log_the_same_lines_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    output = io.StringIO()
    log = tmp_path / "driver.log"
    with Display(3, Console(file=output, force_terminal=True, width=100), log) as display:
        for step in range(1, 4):
            display.show(status(step))
            clock.now += LOG_SECONDS
        display.line("done")
    assert output.getvalue().count("step 2/3") == 1 and "\x1b[2K" in output.getvalue()
    assert [line.split(" · ")[0] for line in lines_of(log)] == ["step 1/3", "step 2/3", "step 3/3", "done"]


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_loses_nothing_of_the_progress(tmp_path: Path, columns: int) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=columns, soft_wrap=True, color_system=None)
    now = status(1200, metrics=METRICS, committed_step=1000, evaluation=(1, 9))
    with Display(1400, console, tmp_path / "driver.log") as display:
        display.show(now)
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", output.getvalue()).split())
    assert progress_line(now, 1400, None) in shown


def test_an_evaluation_is_one_line_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    output = io.StringIO()
    with Display(30, Console(file=output, force_terminal=True, width=100), tmp_path / "driver.log") as display:
        for done in range(9):
            display.show(status(10, evaluation=(done, 9)))
            clock.now += LOG_SECONDS / 5
        display.show(status(11))
    assert [f"evaluating {done}/9" in output.getvalue() for done in range(9)] == [True] * 9
    assert len(lines_of(tmp_path / "driver.log")) == 2, "the log has one now and then"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_reader_that_is_gone_costs_what_it_would_read(tmp_path: Path, is_terminal: bool) -> None:
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    output = os.fdopen(theirs, "w", buffering=1)
    with Display(30, Console(file=output, force_terminal=is_terminal), tmp_path / "driver.log") as display:
        display.line("read")
        os.close(ours)
        display.line("written")
        display.show(status(30))
        display.line("down")
    with contextlib.suppress(OSError):
        output.close()
    assert [line.split(" · ")[0] for line in lines_of(tmp_path / "driver.log")] == [
        "read", "written", "step 30/30", "down",
    ]  # fmt: skip


def test_a_full_disk_costs_the_log(tmp_path: Path) -> None:
    output = io.StringIO()
    with Display(30, Console(file=output), Path("/dev/full")) as display:
        display.line("shown")
    assert output.getvalue() == "shown\n"


def test_a_full_disk_costs_the_lines_that_come_while_it_is_full(tmp_path: Path) -> None:
    class Disk(io.StringIO):
        full = False

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    output = Disk()
    with Display(30, Console(file=output), tmp_path / "driver.log") as display:
        for text, output.full in (("before", False), ("lost", True), ("after", False)):
            display.line(text)
    assert "before" in output.getvalue() and "after" in output.getvalue()
    assert lines_of(tmp_path / "driver.log") == ["before", "lost", "after"]


def test_a_second_driver_adds_to_the_log(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with Display(3, Console(file=io.StringIO()), tmp_path / "driver.log") as display:
            display.line(text)
    assert lines_of(tmp_path / "driver.log") == ["first", "second"]
