"""Metric points and text artifacts on local disk, from the moment they are accepted until MLflow has them.

An SQLite database (`queue.db`) that one process at a time uses: it holds a lock on the file `lock`.

What was accepted survives the death of this process, not a power cut of the node: `synchronous=OFF`, since a step must
not wait for a disk. (NORMAL syncs at each checkpoint of the write-ahead log, which falls to the thread that appends.)
A power cut may even damage the database: then it is set aside, and the log says so. With the write-ahead log nobody who
appends waits for somebody who reads. Every mistake of the bookkeeping errs towards sending again; the sender drops
repeats. The file keeps the size of the longest queue it ever held, and uses it again.

When the disk is full or broken, the points of new steps stay in memory (`max_held_steps`), can be read and sent from
there, and go to disk as soon as it accepts them. Beyond that bound they are refused and counted in `points_lost`.
Training never stops for a metric; the log says so once per outage.
"""

import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from raynium.errors import TrackingError
from raynium.tracking.metrics import check_metrics

logger = logging.getLogger(__name__)

LOCK_POLL_SECONDS = 0.1
# The number of a row orders its table. The oldest are read first and deleted when MLflow has them. No number comes
# twice, also once a table is empty: what is at or below the last acknowledged one is not read again.
TABLES = """
    CREATE TABLE IF NOT EXISTS steps (number INTEGER PRIMARY KEY, step INT, unix_ms INT, num_points INT, metrics TEXT);
    CREATE TABLE IF NOT EXISTS artifacts (number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT, text TEXT);
"""


@dataclass(frozen=True)
class SpooledStep:
    """The points of one appended step."""

    number: int
    step: int
    unix_ms: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class SpooledArtifact:
    """A text file that waits to be sent."""

    number: int
    path: str
    text: str


class MetricSpool:
    """A queue on disk: any thread may `append`, one thread at a time reads and acknowledges.

    wait_seconds: for another process that uses the folder to end.
    Raises TrackingError if the folder cannot be used or another live process uses it.
    """

    def __init__(self, folder: str | Path, *, max_held_steps: int = 10_000, wait_seconds: float = 0.0):
        self._folder = Path(folder)
        self._file = self._folder / "queue.db"
        self._max_held_steps = max_held_steps
        self._mutex = threading.Lock()
        # The newest steps, which the disk refused.
        self._held: deque[SpooledStep] = deque()
        # Up to which number of each table MLflow has all. Rows may outlive it where the disk refused to delete them.
        self._acknowledged = {"steps": 0, "artifacts": 0}
        self._warned_disk = False
        self.points_appended = 0
        self.points_lost = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as undo:
                self._lock = undo.enter_context(open(self._folder / "lock", "a+", encoding="utf-8"))
                self._take_lock(wait_seconds)
                self._database = self._open()
                undo.pop_all()
        except (OSError, sqlite3.Error) as error:
            raise TrackingError(
                f"cannot use {self._folder} to keep metrics until MLflow has them: {error}. "
                "Make it a folder on a local disk with room, that this user may write"
            ) from error
        count = "SELECT coalesce(max(number), 0), coalesce(sum(num_points), 0) FROM steps"
        # What earlier processes left counts as pending too.
        self._last_step_number, self.points_pending = self._database.execute(count).fetchone()
        (self.artifacts_pending,) = self._database.execute("SELECT count(*) FROM artifacts").fetchone()

    # ---- appending -------------------------------------------------------------------------------------------------

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int) -> None:
        """Accept the points of one step: a write to the page cache, no sync, no network.

        Raises ValueError for an unknown name, a value that is no number, or a negative step or time.
        """
        check_metrics(metrics)
        if step < 0 or unix_ms < 0:
            raise ValueError(f"step = {step} and unix_ms = {unix_ms} must not be negative")
        values = {name: float(value) for name, value in metrics.items()}
        with self._mutex:
            self._write_held()
            if len(self._held) >= self._max_held_steps:
                if self.points_lost == 0:
                    logger.error("%s takes no more points and memory is at its bound: points are lost", self._folder)
                self.points_lost += len(values)
                return
            self._last_step_number += 1
            self._held.append(SpooledStep(self._last_step_number, int(step), int(unix_ms), values))
            self.points_appended += len(values)
            self.points_pending += len(values)
            self._write_held()

    def _write_held(self) -> None:
        try:
            while self._held:
                held = self._held[0]
                row = (held.number, held.step, held.unix_ms, len(held.metrics), json.dumps(held.metrics))
                self._database.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", row)
                self._held.popleft()
        except sqlite3.Error as error:
            self._warn_disk(f"{error}; metric points are kept in memory")
        else:
            self._warned_disk = False

    def _warn_disk(self, problem: str) -> None:
        if not self._warned_disk:
            logger.warning("%s: %s. Free some space on that disk", self._folder, problem)
            self._warned_disk = True

    def put_artifact(self, path: str, text: str) -> None:
        """Keep a text file until it is acknowledged. Raises TrackingError when the disk refuses it."""
        try:
            with self._mutex:
                self._database.execute("INSERT INTO artifacts (path, text) VALUES (?, ?)", (path, text))
                self.artifacts_pending += 1
        except sqlite3.Error as error:
            raise TrackingError(
                f"cannot keep artifact {path!r} in {self._file}: {error}. Free some space there"
            ) from error

    # ---- sending ---------------------------------------------------------------------------------------------------

    def read_steps(self, *, max_points: int) -> list[SpooledStep]:
        """The oldest unacknowledged steps, up to `max_points` points in all (but at least one step, if any)."""
        with self._mutex:
            held = list(self._held)
        batch: list[SpooledStep] = []
        num_points = 0
        # Whatever is older than the held steps is on disk, and goes first.
        with closing(self._steps_on_disk(before=held[0].number if held else None)) as on_disk:
            for waiting in chain(on_disk, held):
                num_points += len(waiting.metrics)
                if batch and num_points > max_points:
                    break
                batch.append(waiting)
        return batch

    def newest(self, *, max_points: int) -> list[SpooledStep]:
        """The newest unacknowledged steps, of no more points than this, oldest first. Any thread.

        Raises TrackingError where the disk does not give them.
        """
        with self._mutex:
            held = list(self._held)
        found: deque[SpooledStep] = deque()
        try:
            with closing(self._steps_on_disk(before=held[0].number if held else None, order="DESC")) as older:
                for waiting in chain(reversed(held), older):
                    max_points -= len(waiting.metrics)
                    if max_points < 0:
                        break
                    found.appendleft(waiting)
        except sqlite3.Error as error:
            raise TrackingError(f"cannot read {self._file}: {error}. See to the disk that it is on") from error
        return list(found)

    def _steps_on_disk(self, *, before: int | None, order: Literal["ASC", "DESC"] = "ASC") -> Generator[SpooledStep]:
        query = (
            f"SELECT number, step, unix_ms, metrics FROM steps WHERE number > ? AND number < ? ORDER BY number {order}"
        )
        first = self._acknowledged["steps"]
        with closing(sqlite3.connect(self._file)) as reader:
            for number, step, unix_ms, metrics in reader.execute(query, (first, before or 2**62)):
                yield SpooledStep(number, step, unix_ms, json.loads(metrics))

    def acknowledge_steps(self, steps: Sequence[SpooledStep]) -> None:
        """MLflow has these, which `read_steps` returned: forget them, here and on disk."""
        with self._mutex:
            self.points_pending -= sum(len(each.metrics) for each in steps)
            while self._held and self._held[0].number <= steps[-1].number:
                self._held.popleft()
            self._forget("steps", through=steps[-1].number)

    def read_artifacts(self) -> list[SpooledArtifact]:
        """Waiting artifacts, oldest first."""
        query = "SELECT number, path, text FROM artifacts WHERE number > ? ORDER BY number"
        with closing(sqlite3.connect(self._file)) as reader:
            return [SpooledArtifact(*row) for row in reader.execute(query, (self._acknowledged["artifacts"],))]

    def acknowledge_artifact(self, artifact: SpooledArtifact) -> None:
        """MLflow has this one, the oldest of `read_artifacts`."""
        with self._mutex:
            self.artifacts_pending -= 1
            self._forget("artifacts", through=artifact.number)

    def _forget(self, table: str, *, through: int) -> None:
        self._acknowledged[table] = through
        try:
            self._database.execute(f"DELETE FROM {table} WHERE number <= ?", (through,))
        except sqlite3.Error as error:
            self._warn_disk(f"{error}; after a crash, points will be sent again and dropped as repeats")

    def drop_after(self, step: int) -> None:
        """Nobody is to send the steps after this one. No other thread reads or acknowledges any more."""
        with self._mutex:
            self._held = deque(each for each in self._held if each.step <= step)
            try:
                self._database.execute("DELETE FROM steps WHERE step > ?", (step,))
            except sqlite3.Error as error:
                self._warn_disk(f"{error}; steps that were taken again may be sent as they were at first")

    # ---- opening and closing ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let another process use the folder. What is not acknowledged stays on disk."""
        with self._mutex:
            self._write_held()
            if self._held:
                logger.error("%s: %d steps of metrics never reached the disk", self._folder, len(self._held))
            self._database.close()
            self._lock.close()

    def _take_lock(self, wait_seconds: float) -> None:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self._lock.seek(0)
                    raise TrackingError(
                        f"{self._folder} is in use by process {self._lock.read().strip()}: one process at a time may "
                        "send a run's metrics. Wait for it to end, or stop it"
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _open(self) -> sqlite3.Connection:
        """Open the queue; what a power cut damaged is set aside."""
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            # A full disk and a folder without permission are OperationalErrors: they damage nothing.
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = self._file.with_suffix(f".damaged-{time.time_ns()}")
            self._file.rename(aside)
            for log in self._folder.glob("queue.db-*"):
                log.unlink()
            logger.error(
                "%s: %s, as after a power cut: the points it held are lost. Kept as %s", self._file, error, aside
            )
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA journal_mode=WAL")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            connection.executescript(TABLES)
        except BaseException:
            connection.close()
            raise
        return connection
