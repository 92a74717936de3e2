"""The run record: what a run is, where it got to, and which process owns it. Lives in the run's store; no ray.

<root>/<name>/run.json              the record, rewritten by the owner: also its heartbeat
<root>/<name>/claims/000007.json    one per driver that ever owned the run; created exclusively, so that of two
                                    drivers that start at once exactly one wins. See fence.py
<root>/<name>/stop-requested        somebody asked the owner to save and end
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from raynium.errors import RunInUse, StoreError
from raynium.run.fence import CLAIMS, Fence, claim_key, steady
from raynium.storage.backend import KeyExists, KeyMissing
from raynium.storage.process import Owner, this_process
from raynium.storage.store import Store
from raynium.tracking.incidents import Incident, merged
from raynium.tracking.ledger import Before, Ledger, LifeLedger, RunBook

logger = logging.getLogger(__name__)

RECORD_KEY = "run.json"
STOP_KEY = "stop-requested"
HEARTBEAT_SECONDS = 10.0
# An owner on another host is taken for dead after this long without a heartbeat. On the same host we look at its pid.
OWNER_LOST_SECONDS = 60.0
# How often a heart is looked at that is perhaps silent.
SILENCE_LOOK_SECONDS = 1.0

State = Literal["preparing", "running", "finished", "stopped", "failed"]
LIVE_STATES = ("preparing", "running")


@dataclass(frozen=True)
class RunRecord:
    """Everything the CLI, the SDK and the next driver need to know about a run.

    config: resolved; enough to run the job again. agents: host and pid of each node's agent, by node rank. metrics: the
    last value of every metric. log_path: of the driver, on its host. job_id: Ray's job submission id, when it runs as
    one. cause: of a failure, or why a run finished before its last step. node_faults: nodes that a verdict named,
    oldest first, as NodeFault.to_json. result: of a finished run: evaluation, baselines, samples.
    """

    name: str
    config: dict[str, Any]
    state: State
    owner: Owner
    created_unix: float
    heartbeat_unix: float
    generation: int = 0
    agents: list[dict[str, Any]] | None = None
    step: int = 0
    metrics: dict[str, float] | None = None
    mlflow_uri: str | None = None
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    log_path: str | None = None
    job_id: str | None = None
    cause: str | None = None
    # Of a failed run: the cluster ended under it, and it is to go on on another.
    cluster_lost: bool = False
    # Of a run that somebody stopped: the name of a signal, or `raynium stop`.
    stopped_by: str | None = None
    node_faults: list[dict[str, Any]] | None = None
    result: dict[str, Any] | None = None
    # Under data.packing documents, what became of them: rows, efficiency (the share of positions filled), …
    packing: dict[str, int | float] | None = None
    # Of the newest checkpoint.
    committed_step: int | None = None
    # What went wrong, oldest first, and what it cost: Incident.to_json of the newest ones.
    incidents: list[dict[str, Any]] | None = None
    # Keys of those that the user's command or webhook got, or was tried for; the next driver sends the others.
    notified: list[str] | None = None
    # From created_unix to heartbeat_unix, without idle_seconds.
    ledger: Ledger = field(default_factory=Ledger)
    # In which it had ended, and nobody wanted it to go on.
    idle_seconds: float = 0.0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "RunRecord":
        """Raises ValueError for text that is no record, fields of another kind included."""
        record = TypeAdapter(cls).validate_json(text, strict=True)
        # What is read of any run.
        root = record.config.get("run", {}).get("root")
        steps = record.config.get("train", {}).get("steps")
        if not isinstance(root, str) or not isinstance(steps, int | None):
            raise ValueError(f"its config has run.root = {root!r} and train.steps = {steps!r}")
        return record

    def owner_is_alive(self, now_unix: float) -> bool:
        """False once the owner has ended, cleanly or not."""
        if self.state not in LIVE_STATES:
            return False
        if (lives := self.owner.lives_here()) is not None:
            return lives
        return now_unix - self.heartbeat_unix < OWNER_LOST_SECONDS

    def is_orphaned(self, now_unix: float) -> bool:
        """Whether it should run and nobody runs it: its driver or cluster died, and no person or fault ended it."""
        if self.state == "failed":
            return self.cluster_lost
        return self.state in LIVE_STATES and not self.owner_is_alive(now_unix)

    def shown_state(self, now_unix: float) -> str:
        """The state in the words of a person: a run whose owner is gone was interrupted."""
        if self.state in LIVE_STATES and not self.owner_is_alive(now_unix):
            return "interrupted"
        return self.state

    def shown_cause(self, now_unix: float) -> str | None:
        """Why the run does not go on, as far as anybody could say it; None if it does, or has finished."""
        match self.shown_state(now_unix):
            case "stopped":
                return f"stopped by {self.stopped_by}" if self.stopped_by is not None else self.cause
            case "interrupted":
                heard = datetime.fromtimestamp(self.heartbeat_unix)
                return (
                    f"its driver, process {self.owner.pid} on {self.owner.host}, ended without a word (it was killed, "
                    f"or its machine was lost); last heard of at {heard:%Y-%m-%d %H:%M:%S}"
                )
            case _:
                return self.cause

    def is_wanted(self, config: dict[str, Any]) -> bool:
        """Whether the time since it ended is time in which it should have run.

        config: what it is started with now. Another one than that which failed is a corrected one: until somebody had
        thought of it, there was nothing to run.
        """
        return self.state in LIVE_STATES or (self.state == "failed" and _asked(config) == _asked(self.config))


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    """Without what the run itself finds out, and writes into it."""
    return config | {"data": {**config.get("data", {}), "identity": None}}


def read_record(store: Store) -> RunRecord | None:
    """The record of the run that this store holds; None if there is no run."""
    try:
        return RunRecord.from_json(store.read(RECORD_KEY))
    except KeyMissing:
        return None
    except (ValueError, AttributeError) as error:
        raise StoreError(
            f"{store.uri(RECORD_KEY)} is not a run record ({_first_line(error)}). Give another run.name, or move the "
            "folder away"
        ) from error


def read_records(root: Store, left_out: Callable[[str], None] = logger.warning) -> list[RunRecord]:
    """Of all runs under this root. StoreError if it cannot be listed; `left_out` is told of a record that cannot be
    read.
    """
    records = []
    for folder in root.list(recursive=False).folders:
        try:
            record = read_record(root.child(folder))
        except StoreError as error:
            # One that cannot be read must not hide the others.
            left_out(f"left out: {error}")
            continue
        if record is not None:
            records.append(record)
    return records


def _first_line(error: ValueError | AttributeError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the text'}: {first['msg']}"
    return str(error)


class RecordKeeper:
    """The owner's hand on the record. One per driver; threads may share it."""

    def __init__(self, store: Store, record: RunRecord, claim_number: int):
        """record: as of now, its ledger too."""
        # This driver is the run's n-th.
        self.claim_number = claim_number
        self._store = store
        self._fence = Fence(store, claim_number)
        self._looked = steady()
        self._writing = threading.Lock()
        self._book = RunBook(record.ledger, now=time.monotonic())
        self.record = record

    def check(self) -> None:
        """Raises RunInUse if another driver owns the run by now, or StoreError; asks every HEARTBEAT_SECONDS at most.

        That happens when this host was frozen or cut off for so long that it was taken for dead.
        """
        now = steady()
        if now - self._looked >= HEARTBEAT_SECONDS:
            self._fence.check()
            self._looked = now

    def update(self, **changes: Any) -> None:
        """Writes the record with these fields changed and a fresh heartbeat. Raises as `check`, which it does not wait
        for.
        """
        now = steady()
        self._fence.check()
        self._looked = now
        self.take_over(**changes)

    def take_over(self, **changes: Any) -> None:
        """Like `update`, whoever owned the run before: for the driver that has just claimed it."""
        with self._writing:
            ledger = self._book.ledger(time.monotonic())
            self.record = replace(self.record, **changes, heartbeat_unix=time.time(), ledger=ledger)
            self._store.replace(RECORD_KEY, self.record.to_json())

    def failure(self, cause: str, **changes: Any) -> dict[str, Any]:
        """What an update writes of a run that fails now, which is an incident whatever came before it."""
        end = Incident(f"end-{self.claim_number}", time.time(), "run", "", cause, self.record.step)
        incidents = merged(self.record.incidents or [], [end])
        return {"state": "failed", "cause": cause, "incidents": incidents} | changes

    def hear_ledger(self, coordinator: LifeLedger) -> Before:
        """Takes over what the coordinator has booked; returns what the run's ledger held before its birth."""
        with self._writing:
            self._book.heard(coordinator, now=time.monotonic())
            return self._book.before_coordinator()

    def finishing(self) -> None:
        """No generation will follow: the time from here on is the run's end."""
        with self._writing:
            self._book.finishing(now=time.monotonic())

    def beat(self, **changes: Any) -> None:
        """Like `update`, at most once every HEARTBEAT_SECONDS."""
        # A clock that was set back must not stop the heart until it is as late as it was.
        if 0 <= time.time() - self.record.heartbeat_unix < HEARTBEAT_SECONDS:
            return
        self.update(**changes)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keeps the heart beating while this thread is busy with one long thing, such as making a document store."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                try:
                    self.update()
                except StoreError as error:
                    # The next beat tries again; several may be missed before it matters.
                    logger.warning("a heartbeat of run %s was lost: %s", self.record.name, error)
                except RunInUse:
                    # It is raised anew where the owner next writes something down.
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def stop_requested(self) -> bool:
        return stop_is_asked(self._store)


def refuse_live(record: RunRecord, store: Store) -> None:
    """Raises RunInUse while the run's owner lives."""
    if record.owner_is_alive(time.time()):
        owner = record.owner
        raise RunInUse(
            f"run {record.name!r} at {store.url} is in use by process {owner.pid} on {owner.host} ({record.state}, "
            f"step {record.step}). Stop it with `raynium stop {record.name}`, or give another run.name"
        )


def claim(
    store: Store,
    name: str,
    config: dict[str, Any],
    *,
    job_id: str | None = None,
    supervised: bool = False,
    tell: Callable[[str], None] = logger.info,
) -> RecordKeeper:
    """Takes the run for this process. Raises RunInUse while its owner lives, or when another driver was faster.

    job_id: as in the record. supervised: a supervisor starts it, which overrules nobody who wants it stopped. tell:
    gets a line if an owner on another host has to be watched until it is surely dead.
    """
    # Listed before the record is read: whoever claims the run in between has the next number, or a record that lives.
    numbers = [int(key.rpartition("/")[2].removesuffix(".json")) for key in store.list(CLAIMS).sizes]
    number = max(numbers, default=0) + 1
    earlier = read_record(store)
    if earlier is not None:
        refuse_live(earlier, store)
        earlier = _silent(earlier, store, tell)
    owner = this_process()
    try:
        store.write_new(claim_key(number), json.dumps(asdict(owner)).encode())
    except KeyExists as error:
        raise RunInUse(
            f"run {name!r} at {store.url} was taken by another driver a moment ago. Give another run.name, or wait"
        ) from error
    if not supervised:
        # What was asked of an earlier owner.
        store.delete(STOP_KEY)
    now = time.time()
    if earlier is None:
        record = RunRecord(name, config, "preparing", owner, created_unix=now, heartbeat_unix=now, job_id=job_id)
    else:
        # Unix time is all that two drivers share. Where their clocks disagree, this is what makes the sum right again.
        silent = max(0.0, now - earlier.created_unix - earlier.idle_seconds - earlier.ledger.total)
        wanted = earlier.is_wanted(config)
        record = replace(
            earlier,
            config=config,
            state="preparing",
            owner=owner,
            job_id=job_id,
            cause=None,
            cluster_lost=False,
            stopped_by=None,
            result=None,
            heartbeat_unix=now,
            ledger=earlier.ledger + Ledger(down=silent if wanted else 0.0),
            idle_seconds=earlier.idle_seconds + (0.0 if wanted else silent),
            incidents=_with_death(earlier),
        )
    keeper = RecordKeeper(store, record, number)
    keeper.take_over()
    return keeper


def _silent(earlier: RunRecord, store: Store, tell: Callable[[str], None]) -> RunRecord:
    """The record, once its owner has been silent for OWNER_LOST_SECONDS of this machine's own clock.

    At once if the run has ended, or its owner has died on this host. Clocks of two hosts may differ by more than that,
    so those that only say that it is silent are not believed. Raises RunInUse if its heart beats.
    """
    if earlier.state in LIVE_STATES and earlier.owner.lives_here() is None:
        tell(
            f"the driver on {earlier.owner.host} is not heard of: it is taken for dead if it stays silent for "
            f"{OWNER_LOST_SECONDS:g} s"
        )
        surely_dead = steady() + OWNER_LOST_SECONDS
        while (left := surely_dead - steady()) > 0:
            time.sleep(min(SILENCE_LOOK_SECONDS, left))
            record = read_record(store)
            if record is None or record.heartbeat_unix != earlier.heartbeat_unix:
                raise RunInUse(
                    f"run {earlier.name!r} at {store.url} is in use by process {earlier.owner.pid} on "
                    f"{earlier.owner.host}, whose clock is far from this machine's: set both by NTP. Stop the run with "
                    f"`raynium stop {earlier.name}`, or give another run.name"
                )
    return earlier


def _with_death(earlier: RunRecord) -> list[dict[str, Any]] | None:
    """The incidents of a run whose driver may have ended without a word."""
    if earlier.state not in LIVE_STATES:
        return earlier.incidents
    owner, unix = earlier.owner, earlier.heartbeat_unix
    cause = f"process {owner.pid} ended without a word: it was killed, or its machine was lost"
    death = Incident(f"driver-{owner.pid}-{unix:.0f}", unix, "driver", owner.host, cause, earlier.step)
    return merged(earlier.incidents or [], [death])


def request_stop(store: Store) -> None:
    """Asks the run's owner to save at the next step and end; and supervisors not to start it again."""
    store.replace(STOP_KEY, b"")


def stop_is_asked(store: Store) -> bool:
    """Since a person last started the run."""
    return store.exists(STOP_KEY)
