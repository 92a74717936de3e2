"""What the run's MLflow page says of it: a verdict in the description, kept current while it runs, and how it ended."""

import logging
import shlex
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime

from raynium.errors import RayniumError, StoreError, TrackingError
from raynium.hardware.catalog import peak_note
from raynium.run.protocol import Status
from raynium.run.record import LIVE_STATES, RunRecord, read_record
from raynium.storage.backend import KeyMissing
from raynium.storage.local_files import look
from raynium.storage.store import Store
from raynium.terminal.display import Pace, clock, held_out
from raynium.terminal.report import goodput_line
from raynium.tracking.client import sqlite_path
from raynium.tracking.incidents import SHOWN, row
from raynium.tracking.runs import TrackedRun, end_abandoned, finish_run, set_tags

logger = logging.getLogger(__name__)

PAGE_RETRY_SECONDS = 60.0
# Between two writes of the description.
DESCRIPTION_SECONDS = 20.0
# A write that takes longer than its requests may is left to itself.
WRITE_SECONDS = 30.0
# By these names MLflow shows a description, and `tags."raynium.state"` finds what its own four states do not tell.
DESCRIPTION, STATE = "mlflow.note.content", "raynium.state"
# In the run's store: the heartbeat of the record whose abandoned run was ended on its page.
ENDED_KEY = "page-ended"


def describe(record: RunRecord, *, now_unix: float, eta_seconds: float | None = None) -> str:
    """The run in Markdown, the verdict first."""
    state = record.shown_state(now_unix)
    verdict = [f"**{state}** at step {record.step:,} of {record.config['train']['steps']:,}"]
    if eta_seconds is not None:
        verdict.append(f"ETA {clock(eta_seconds)}")
    if found := held_out(record.metrics or {}):
        verdict.append(f"held-out {found}")
    if record.ledger.total:
        verdict.append(f"goodput {100 * record.ledger.goodput:.0f} %")
    # MLflow folds all but the first lines.
    lines = [" · ".join(verdict), ""]
    if cause := record.shown_cause(now_unix):
        lines.append(f"- cause: {_literal(cause)}")
    if state != "finished":
        lines.append(f"- to go on{', should it break off' if state in LIVE_STATES else ''}: {_command(record)}")
    committed = "none yet" if record.committed_step is None else f"step {record.committed_step:,}"
    lines.append(f"- last checkpoint: {committed}; restarts: {max(0, record.generation - 1)}")
    if record.ledger.total:
        lines.append(f"- {goodput_line(record.ledger)}")
    if record.incidents:
        lines += ["", "| when (UTC) | what failed | why | at step | lost |", "|---|---|---|---|---|"]
        for each in record.incidents[: -SHOWN - 1 : -1]:
            when = f"{datetime.fromtimestamp(each['unix'], UTC):%m-%d %H:%M:%S}"
            what, why, *rest = row(each)
            lines.append(f"| {' | '.join([when, what, _literal(why).replace('|', ' '), *rest])} |")
    return "\n".join([*lines, "", f"As of {datetime.fromtimestamp(now_unix, UTC):%Y-%m-%d %H:%M:%S} UTC."])


def _literal(text: str) -> str:
    """Words that others chose, in which Markdown and HTML mean nothing."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _command(record: RunRecord) -> str:
    root = record.config["run"]["root"].removeprefix("file://")
    program = "raynium submit" if record.job_id else "raynium train"
    if "://" in root:
        return f"`{program} config.yaml`, with that file from this run's artifacts"
    return _literal(f"{program} {shlex.quote(f'{root}/{record.name}/config.yaml')}")


def page_tags(record: RunRecord, *, now_unix: float, eta_seconds: float | None = None) -> dict[str, str]:
    """The description, the state in our words, and each node that a verdict has named."""
    faults = {f"node_fault.{number}": each["text"] for number, each in enumerate(record.node_faults or [], start=1)}
    description = describe(record, now_unix=now_unix, eta_seconds=eta_seconds)
    return faults | {STATE: record.shown_state(now_unix), DESCRIPTION: description}


class Page:
    """Writes the page while the run goes on, in a thread: an MLflow that is slow or away costs the page only.

    A run that MLflow could not be asked to open again is opened here, once it answers. Use as a context manager around
    the calls of `show`: nothing is written after it.
    """

    def __init__(
        self, mlflow: TrackedRun, *, open_mlflow: Callable[[], TrackedRun], dtype: str, tell: Callable[[str], None]
    ):
        """tell: a line for the user's terminal."""
        self._mlflow = mlflow
        self._open_mlflow = open_mlflow
        self._dtype = dtype
        self._tell = tell
        self._pace = Pace()
        self._shown: dict[str, str] = {}
        self._peak_told = ""
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow-page")
        # What is being written.
        self._writing: tuple[dict[str, str], Future[TrackedRun]] | None = None
        self._describe_at = 0.0
        # When it is tried again, after MLflow did not answer.
        self._not_before = 0.0 if mlflow.is_open else time.monotonic() + PAGE_RETRY_SECONDS

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writing is not None:
            wait([self._writing[1]], WRITE_SECONDS)

    def show(self, status: Status, record: RunRecord) -> None:
        """record: as of now. Returns at once."""
        now = time.monotonic()
        pace = self._pace.update(status.generation, status.step, now)
        eta = (record.config["train"]["steps"] - status.step) / pace if pace else None
        tags = page_tags(record, now_unix=time.time(), eta_seconds=eta)
        peak_flops = status.metrics.get("throughput/peak_flops_per_rank")
        if peak_flops is not None and status.agents:
            tags["mfu.peak"] = peak_note(peak_flops, dtype=self._dtype, machine=status.agents[0].machine)
            if self._peak_told != tags["mfu.peak"]:
                self._peak_told = tags["mfu.peak"]
                self._tell(f"MFU is a share of {self._peak_told}")
        self._hear()
        if self._writing is not None or now < self._not_before:
            return
        if now < self._describe_at:
            del tags[DESCRIPTION], tags[STATE]
        new = {name: text for name, text in tags.items() if self._shown.get(name) != text}
        if new or not self._mlflow.is_open:
            self._writing = new, self._writer.submit(self._write, new)
            if DESCRIPTION in new:
                self._describe_at = now + DESCRIPTION_SECONDS

    def _write(self, tags: dict[str, str]) -> TrackedRun:
        mlflow = self._mlflow if self._mlflow.is_open else self._open_mlflow()
        set_tags(mlflow.uri, mlflow.run_id, tags)
        return mlflow

    def _hear(self) -> None:
        """What has become of a write."""
        if self._writing is None or not self._writing[1].done():
            return
        (tags, written), self._writing = self._writing, None
        try:
            mlflow = written.result()
        except TrackingError as error:
            # Once for all: it may be away for a day.
            if not self._not_before and self._mlflow.is_open:
                self._tell(f"the MLflow page does not show {', '.join(tags)} yet: {error}")
            self._not_before = time.monotonic() + PAGE_RETRY_SECONDS
            self._describe_at = 0.0
            return
        if not self._mlflow.is_open:
            self._tell("MLflow answers again, and shows the run")
        self._mlflow = mlflow
        self._shown |= tags
        self._not_before = 0.0


def end_page(mlflow: TrackedRun, record: RunRecord) -> None:
    """Writes the end. A run that was stopped did as it was asked, and is no failed one. Raises TrackingError."""
    status = "FAILED" if record.state == "failed" else "FINISHED"
    finish_run(mlflow.uri, mlflow.run_id, status, page_tags(record, now_unix=time.time()))


def end_abandoned_pages(records: Iterable[RunRecord]) -> None:
    """Ends, on their pages, the runs whose drivers have died: nobody else is left to. For whoever looks at them.

    What cannot be written now is left to the next who looks.
    """
    # A server that does not answer is asked once.
    away: set[str | None] = set()
    for record in records:
        if record.mlflow_uri in away:
            continue
        try:
            _end_abandoned_page(record)
        except RayniumError as error:
            away.add(record.mlflow_uri)
            logger.warning("the MLflow page of run %s does not show that it was interrupted: %s", record.name, error)


def _end_abandoned_page(record: RunRecord) -> None:
    uri, run_id, now = record.mlflow_uri, record.mlflow_run_id, time.time()
    if uri is None or run_id is None or record.shown_state(now) != "interrupted":
        return
    # A database of another machine.
    if uri.startswith("sqlite") and not look(sqlite_path(uri).exists):
        return
    store = Store(record.config["run"]["root"]).child(record.name)
    heartbeat = repr(record.heartbeat_unix).encode()
    if _read(store, ENDED_KEY) == heartbeat:
        return

    def still() -> bool:
        stored = read_record(store)
        return stored is not None and stored.owner == record.owner and stored.shown_state(time.time()) == "interrupted"

    end_abandoned(uri, run_id, page_tags(record, now_unix=now), unix=record.heartbeat_unix, still=still)
    try:
        store.replace(ENDED_KEY, heartbeat)
    except StoreError as error:
        # Who may only read asks MLflow again.
        logger.info("%s", error)


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except KeyMissing:
        return None
