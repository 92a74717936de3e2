"""What the person at the terminal sees: lines as things happen, and one live line of progress."""

import contextlib
import errno
import textwrap
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from raynium.run.protocol import Status

# Without a terminal (a job's log) the progress line becomes ordinary lines, at most this often.
LOG_SECONDS = 10.0


def progress_line(status: Status, total_steps: int, steps_per_second: float | None) -> str:
    """`step 120/400 · loss 3.214 · 2.31 bits/byte · 5,210 tok/s · ETA 0:48 · checkpoint 100`."""
    parts = [f"step {status.step:,}/{total_steps:,}"]
    if status.evaluation is not None:
        done, total = status.evaluation
        parts.append(f"evaluating {done:,}/{total:,}")
    if "train/loss" in status.metrics:
        parts.append(f"loss {status.metrics['train/loss']:.3f}")
    if found := held_out(status.metrics):
        parts.append(f"held-out {found}")
    if "throughput/tokens_per_second" in status.metrics:
        parts.append(f"{status.metrics['throughput/tokens_per_second']:,.0f} tokens/s")
    if steps_per_second:
        parts.append(f"ETA {clock((total_steps - status.step) / steps_per_second)}")
    if status.committed_step is not None:
        parts.append(f"checkpoint {status.committed_step:,}")
    return " · ".join(parts)


def held_out(metrics: Mapping[str, float]) -> str:
    """`1.883 bits/byte`, or `loss 0.790` where no bytes are counted; empty before the first evaluation."""
    if (bits := metrics.get("eval/bits_per_byte")) is not None:
        return f"{bits:.3f} bits/byte"
    loss = metrics.get("eval/loss")
    return f"loss {loss:.3f}" if loss is not None else ""


def clock(seconds: float) -> str:
    """`1:02:03`, and `2:03` where there is no hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Pace:
    """Steps per second of this generation, from (time, step) sightings."""

    def __init__(self) -> None:
        self._generation = 0
        self._first_step = 0
        self._counts_from: tuple[float, int] | None = None

    def update(self, generation: int, step: int, now: float) -> float | None:
        """now: seconds of a steady clock. None until there is something to go by."""
        if generation != self._generation or step < self._first_step:
            self._generation, self._first_step, self._counts_from = generation, step, None
        if self._counts_from is None:
            # It counts from the end of the first step, which may have waited and compiled.
            if step > self._first_step:
                self._counts_from = now, step
            return None
        began, first_step = self._counts_from
        return (step - first_step) / (now - began) if step > first_step else None


class Display:
    """Use as a context manager around a run. What it prints is also appended to a log file."""

    def __init__(self, total_steps: int, console: Console, log_path: Path):
        self.console = console
        self._total_steps = total_steps
        self._log_path = log_path
        self._pace = Pace()
        self._live = (
            Live(console=self.console, transient=True, auto_refresh=False) if self.console.is_terminal else None
        )
        self._last_log = 0.0
        self._last_shown: tuple[int, tuple[int, int] | None] = -1, None

    def __enter__(self) -> "Display":
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._log_path.open("a", buffering=1, encoding="utf-8", errors="replace")
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._show(self._live.stop)
        with contextlib.suppress(OSError):
            self._log.close()

    def line(self, text: str) -> None:
        """Something happened."""
        self._write(text)
        self._show(lambda: self.console.print(Text(text), soft_wrap=True))

    def show(self, status: Status) -> None:
        """The state of things, several times a second."""
        now = time.monotonic()
        pace = self._pace.update(status.generation, status.step, now)
        shown = status.step, status.evaluation
        if not (status.running or status.ended) or shown == self._last_shown:
            return
        text = progress_line(status, self._total_steps, pace)
        if self._live is not None:
            live = self._live
            # The console itself would cut what is longer than the terminal is wide.
            folded = textwrap.fill(text, max(20, self.console.width))
            self._show(lambda: live.update(Text(folded), refresh=True))
        last = status.step == self._total_steps and status.evaluation is None
        if now - self._last_log >= LOG_SECONDS or last:
            self._last_log = now
            if self._live is None:
                self.line(text)
            else:
                self._write(text)
        self._last_shown = shown

    def _write(self, text: str) -> None:
        # A full disk costs lines of a log, not a run of weeks.
        with contextlib.suppress(OSError):
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def _show(self, call: Callable[[], None]) -> None:
        """A terminal that was closed, or a pipe that nobody reads any more, does not end the run: the log goes on."""
        try:
            call()
        except (OSError, SystemExit) as error:
            # A disk has room again at some time.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return
            # rich answers a broken pipe with SystemExit.
            self.console = Console(quiet=True)
            self._live = None
