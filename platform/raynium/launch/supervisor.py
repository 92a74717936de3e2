"""The supervisor: on a cluster's head, outside any job, it starts what should be running and is not.

It reads the records under a root and submits an orphaned run again, from the config in its record, as `raynium submit`
does. Two supervisors, or one and a person, may submit the same run: the claim settles whose driver gets it.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from raynium.config.load import dump_yaml, parse_config
from raynium.errors import ConfigError, LaunchError, StoreError
from raynium.launch.jobs import connect_jobs, submit_job
from raynium.run.record import RunRecord, read_records, stop_is_asked
from raynium.run.supervision import MOST_STARTS, Seen, Supervision
from raynium.storage.store import Store

LOOK_SECONDS = 5.0
LIVING_JOBS = ("PENDING", "RUNNING")
# A head that comes back with its tables (Redis) lists the jobs of the dead one as running until somebody submits one.
# A driver that has said nothing to the run's store for so long is taken for dead; if it is not, it is fenced.
SILENT_JOB_SECONDS = 600.0

# Its submission id, which a driver that nobody submitted has not; and its run, if it says so.
JobOf = tuple[str | None, str | None]


class Supervisor:
    """Of the runs under `roots` (absolute), on the cluster whose dashboard is at `address`."""

    def __init__(self, roots: Sequence[str], *, address: str, tell: Callable[[str], None]):
        """tell: gets a line for each start, and for each thing that hinders one, once."""
        self._roots = [Store(root) for root in roots]
        self._address = address
        self._tell = tell
        self._supervision = Supervision()
        # Run → since when its own job is listed as living though its driver is not heard.
        self._silent_since: dict[str, float] = {}
        # Subject → what was told of it last.
        self._told: dict[str, str] = {}

    def serve(self) -> None:
        """Looks for ever. A cluster or store that is away is asked again."""
        while True:
            self.look()
            time.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Looks once, and starts what is due."""
        try:
            jobs = connect_jobs(self._address)
            living = [each for each in jobs.list_jobs() if str(each.status.value) in LIVING_JOBS]
        except (LaunchError, OSError, RuntimeError) as error:
            return self._say(self._address, f"no run can be started: {error}")
        self._told.pop(self._address, None)
        # A job that was not submitted by us says of no run that it is its own; its driver does, in the run's record. A
        # driver that nobody submitted is in the list too.
        with_job = [(each.submission_id, (each.metadata or {}).get("run_url")) for each in living]
        for root in self._roots:
            try:
                records = read_records(root, lambda line: self._say(line, line))
            except StoreError as error:
                self._say(root.url, f"the runs under {root.url} cannot be read: {error}")
                continue
            self._told.pop(root.url, None)
            for record in records:
                self._look_at(record, root.child(record.name).url, with_job, jobs)

    def _look_at(self, record: RunRecord, url: str, with_job: Sequence[JobOf], jobs: Any) -> None:
        """with_job: the living jobs."""
        # What `raynium train` started somewhere is no job of a cluster, and a copy of a run is not the run.
        if record.job_id is None or Store(record.config["run"]["root"]).child(record.name).url != url:
            return
        orphaned = record.is_orphaned(time.time())
        try:
            if orphaned and stop_is_asked(Store(url)):
                line = f"run {record.name} is not started again: somebody has stopped it. Submit it, and it goes on"
                return self._say(url, line)
        except StoreError as error:
            return self._say(url, f"run {record.name} cannot be started: {error}")
        has_job = any(job != record.job_id and of == url for job, of in with_job)
        seen = Seen(url, orphaned, has_job or self._own_job_lives(record, url, with_job), record.committed_step)
        match self._supervision.decide(seen, now=time.monotonic()):
            case "leave":
                self._told.pop(url, None)
            case "start":
                self._start(record, url, jobs)
            case "give up":
                self._say(
                    url,
                    f"run {record.name} is not started again: {MOST_STARTS} starts brought no newer checkpoint. See "
                    f"`raynium logs {record.name}`, correct the cause and submit it, or start this supervisor again",
                )
            case "wait":
                pass

    def _own_job_lives(self, record: RunRecord, url: str, with_job: Sequence[JobOf]) -> bool:
        is_listed = any(job == record.job_id for job, _ in with_job)
        if not is_listed or not record.is_orphaned(time.time()):
            self._silent_since.pop(url, None)
            return is_listed
        return time.monotonic() - self._silent_since.setdefault(url, time.monotonic()) < SILENT_JOB_SECONDS

    def _start(self, record: RunRecord, url: str, jobs: Any) -> None:
        why = record.shown_cause(time.time())
        try:
            config = parse_config(json.dumps(record.config), origin=f"the config in the record of {url}")
            job_id = submit_job(jobs, record.name, dump_yaml(config), run_url=url, supervised=True)
        except (ConfigError, LaunchError, OSError, RuntimeError) as error:
            return self._say(url, f"run {record.name} cannot be started: {error}")
        self._supervision.started(url, now=time.monotonic())
        self._say(url, f"run {record.name} is started again, as job {job_id}, from its newest checkpoint: {why}")

    def _say(self, subject: str, line: str) -> None:
        if self._told.get(subject) != line:
            self._told[subject] = line
            self._tell(line)
