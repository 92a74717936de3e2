"""Metric points and text artifacts on local disk, from the moment they are accepted until MLflow has them.

    <folder>/lock                        held (flock) by the one process that uses the folder
    <folder>/points-000000000042.jsonl   one line per appended step; the name is the first record's number
    <folder>/acknowledged                how many records MLflow has: all before this number
    <folder>/artifacts/000003.json       {"path": …, "text": …}

A record survives the death of this process, not a power cut of the node: nothing is fsynced, since a step must not
wait for a disk. Every mistake of the bookkeeping errs towards sending again; the sender drops repeats.

When the disk is full or broken, records stay in memory (`max_held_records`), can still be read and sent from there,
and go to disk as soon as it accepts them. Beyond that bound new points are refused and counted in `points_lost`.
Training never stops for a metric; the log says so once per outage.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raynium.errors import TrackingError
from raynium.tracking.metrics import check_metrics

logger = logging.getLogger(__name__)

LOCK_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Record:
    """The points of one appended step. `metrics` is empty if the line on disk was damaged."""

    number: int
    step: int
    unix_ms: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class SpooledArtifact:
    """A text file that waits to be sent."""

    file: Path
    path: str
    text: str


@dataclass
class _Segment:
    path: Path
    num_bytes: int


class MetricSpool:
    """A queue on disk: any thread may `append`, one thread at a time calls `read_batch` and `acknowledge`.

    wait_seconds: for another process that uses the folder to end.
    Raises TrackingError if the folder cannot be made or another live process uses it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        segment_bytes: int = 1 << 20,
        max_held_records: int = 10_000,
        wait_seconds: float = 0.0,
    ):
        self._folder = Path(folder)
        self._segment_bytes = segment_bytes
        self._max_held_records = max_held_records
        self._mutex = threading.Lock()
        self._segments: deque[_Segment] = deque()
        self._active_fd: int | None = None  # of the last segment, once this process has appended
        self._read_offset = 0  # in the first segment: where the first unacknowledged record begins
        self._unacknowledged: deque[tuple[int, int]] = deque()  # (points, bytes) of each record, oldest first
        self._held: deque[bytes] = deque()  # the newest of them, that the disk refused
        self._warned_disk = False
        self.points_appended = 0
        self.points_lost = 0
        self._points_pending = 0
        try:
            (self._folder / "artifacts").mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise TrackingError(
                f"cannot use {self._folder} to keep metrics until MLflow has them: {error}. "
                "Make it a folder on a local disk that this user may write"
            ) from error
        self._take_lock(wait_seconds)
        self._acknowledged = 0  # number of the first unacknowledged record
        self._next_number = 0  # of the next line on disk
        self._load()
        self._next_artifact = 1 + max((int(file.stem) for file in self._artifact_files()), default=-1)

    # ---- appending -------------------------------------------------------------------------------------------------

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int) -> None:
        """Accept the points of one step: one `write` to the page cache, no sync, no network.

        Raises ValueError for an unknown name, a value that is no number, or a negative step or time.
        """
        check_metrics(metrics)
        if step < 0 or unix_ms < 0:
            raise ValueError(f"step = {step} and unix_ms = {unix_ms} must not be negative")
        values = {name: float(value) for name, value in metrics.items()}
        line = json.dumps({"step": int(step), "unix_ms": int(unix_ms), "metrics": values}).encode() + b"\n"
        with self._mutex:
            assert self._lock_fd is not None, "append to a closed spool"
            self._write_held()
            if len(self._held) >= self._max_held_records:
                if self.points_lost == 0:
                    logger.error("%s takes no more points and memory is at its bound: points are lost", self._folder)
                self.points_lost += len(values)
                return
            self._held.append(line)
            self._unacknowledged.append((len(values), len(line)))
            self.points_appended += len(values)
            self._points_pending += len(values)
            self._write_held()

    def _write_held(self) -> None:
        try:
            while self._held:
                self._write_line(self._held[0])
                self._held.popleft()
        except OSError as error:
            self._warn_disk(f"{error}; metric points are kept in memory")
        else:
            self._warned_disk = False

    def _write_line(self, line: bytes) -> None:
        if self._active_fd is not None and self._segments[-1].num_bytes >= self._segment_bytes:
            self._close_segment()
        if self._active_fd is None:
            path = self._folder / f"points-{self._next_number:012d}.jsonl"
            self._active_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self._segments.append(_Segment(path, num_bytes=0))
            self._remove_acknowledged_segments()
        segment = self._segments[-1]
        try:
            num_written = os.write(self._active_fd, line)
            if num_written < len(line):
                raise OSError(f"wrote {num_written} of {len(line)} bytes to {segment.path}: the disk is full")
        except OSError:
            os.ftruncate(self._active_fd, segment.num_bytes)  # a torn line would join the next one
            raise
        segment.num_bytes += len(line)
        self._next_number += 1

    def _close_segment(self) -> None:
        if self._active_fd is not None:
            os.close(self._active_fd)
            self._active_fd = None

    def _warn_disk(self, problem: str) -> None:
        if not self._warned_disk:
            logger.warning("%s: %s. Free some space on that disk", self._folder, problem)
            self._warned_disk = True

    # ---- reading ---------------------------------------------------------------------------------------------------

    @property
    def points_pending(self) -> int:
        """Points accepted and not acknowledged, those of earlier processes included."""
        return self._points_pending

    def read_batch(self, *, max_points: int) -> list[Record]:
        """The oldest unacknowledged records, up to `max_points` points in all (but at least one record, if any)."""
        with self._mutex:
            num_records, num_points = 0, 0
            for points, _ in self._unacknowledged:
                if num_records and num_points + points > max_points:
                    break
                num_records, num_points = num_records + 1, num_points + points
            lines, first_number = self._read_lines(num_records), self._acknowledged
        return [_parse(line, number=first_number + index) for index, line in enumerate(lines)]

    def _read_lines(self, num_records: int) -> list[bytes]:
        num_on_disk = len(self._unacknowledged) - len(self._held)
        lines: list[bytes] = []
        offset = self._read_offset
        for segment in self._segments:
            wanted = min(num_records, num_on_disk) - len(lines)
            if wanted <= 0:
                break
            with open(segment.path, "rb") as file:
                file.seek(offset)
                lines += [line for _, line in zip(range(wanted), file, strict=False)]
            offset = 0
        return lines + [self._held[index] for index in range(num_records - len(lines))]

    def acknowledge(self, *, through: int) -> None:
        """MLflow has the records up to and including number `through`: forget them, here and on disk."""
        with self._mutex:
            num_records = through + 1 - self._acknowledged
            assert 0 <= num_records <= len(self._unacknowledged)
            for _ in range(num_records):
                is_on_disk = len(self._unacknowledged) > len(self._held)
                points, num_bytes = self._unacknowledged.popleft()
                self._points_pending -= points
                if is_on_disk:
                    self._read_offset += num_bytes
                    self._remove_acknowledged_segments()
                else:
                    self._held.popleft()
                    self._next_number += 1
                    self._close_segment()  # within a segment numbers are consecutive
            self._acknowledged += num_records
        try:  # outside the mutex: an append must not wait for a rename
            _replace_text(self._folder / "acknowledged", f"{self._acknowledged}\n")
        except OSError as error:
            self._warn_disk(f"{error}; after a crash, points will be sent again and dropped as repeats")

    def _remove_acknowledged_segments(self) -> None:
        while len(self._segments) > 1 and self._read_offset >= self._segments[0].num_bytes:
            self._segments.popleft().path.unlink()
            self._read_offset = 0

    # ---- artifacts -------------------------------------------------------------------------------------------------

    def put_artifact(self, path: str, text: str) -> None:
        """Keep a text file until `remove_artifact`. Raises TrackingError when the disk refuses it."""
        file = self._folder / "artifacts" / f"{self._next_artifact:06d}.json"
        try:
            with self._mutex:
                self._next_artifact += 1
                _replace_text(file, json.dumps({"path": path, "text": text}))
        except OSError as error:
            raise TrackingError(f"cannot keep artifact {path!r} in {file}: {error}. Free some space there") from error

    def read_artifacts(self) -> list[SpooledArtifact]:
        """Waiting artifacts, oldest first."""
        artifacts = []
        for file in self._artifact_files():
            try:
                content = json.loads(file.read_text())
            except ValueError:
                logger.warning("removed %s: damaged, as after a power cut", file)
                file.unlink()
                continue
            artifacts.append(SpooledArtifact(file, content["path"], content["text"]))
        return artifacts

    def remove_artifact(self, artifact: SpooledArtifact) -> None:
        artifact.file.unlink()

    @property
    def artifacts_pending(self) -> int:
        return len(self._artifact_files())

    def _artifact_files(self) -> list[Path]:
        return sorted((self._folder / "artifacts").glob("*.json"))

    # ---- opening and closing ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let another process use the folder. What is not acknowledged stays on disk."""
        with self._mutex:
            self._write_held()
            if self._held:
                logger.error("%s: %d steps of metrics never reached the disk", self._folder, len(self._held))
            self._close_segment()
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    def _take_lock(self, wait_seconds: float) -> None:
        assert self._lock_fd is not None
        deadline = time.monotonic() + wait_seconds
        while not (taken := self._try_lock()) and time.monotonic() < deadline:
            time.sleep(LOCK_POLL_SECONDS)
        if not taken:
            owner = os.pread(self._lock_fd, 32, 0).decode().strip()
            os.close(self._lock_fd)
            raise TrackingError(
                f"{self._folder} is in use by process {owner}: one process at a time may send a run's metrics. "
                f"Wait for it to end, or stop it"
            )
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _try_lock(self) -> bool:
        assert self._lock_fd is not None
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _load(self) -> None:
        """Take over what an earlier process left."""
        self._acknowledged = self._next_number = acknowledged = self._load_acknowledged()
        for path in sorted(self._folder.glob("points-*.jsonl")):
            first_number = int(path.stem.removeprefix("points-"))
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
                logger.info("%s: dropped a line that was being written when its process died", path)
            lines = whole.splitlines(keepends=True)
            self._next_number = max(self._next_number, first_number + len(lines))
            num_skipped = max(0, acknowledged - first_number)
            if num_skipped >= len(lines):
                path.unlink()
                continue
            if not self._segments:
                self._acknowledged = first_number + num_skipped
                self._read_offset = sum(map(len, lines[:num_skipped]))
            self._segments.append(_Segment(path, num_bytes=len(whole)))
            for line in lines[num_skipped:]:
                points = len(_parse(line, number=0).metrics)
                self._unacknowledged.append((points, len(line)))
                self._points_pending += points

    def _load_acknowledged(self) -> int:
        file = self._folder / "acknowledged"
        if not file.exists():
            return 0
        text = file.read_text().strip()
        if text.isdecimal():
            return int(text)
        logger.warning("%s holds %r, not a number: all points still here are sent again, repeats dropped", file, text)
        return 0


def _parse(line: bytes, *, number: int) -> Record:
    try:
        content = json.loads(line)
        return Record(number, content["step"], content["unix_ms"], content["metrics"])
    except (ValueError, KeyError, TypeError):
        logger.warning("skipped a damaged line of the metric spool: %.80r", line)
        return Record(number, step=0, unix_ms=0, metrics={})


def _replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new, never a part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
