"""Uploads snapshots in a process of its own, so that neither ranks nor agent share an interpreter lock with them.

`Uploader` is the agent's side, `main` the process. If it is killed, another removes what it left, and uploads again.
"""

import contextlib
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any

from raynium.checkpoint.format.manifest import ImageInfo, ShardEntry, shard_key, step_folder
from raynium.checkpoint.upload import upload_shard
from raynium.errors import RayniumError, StoreError
from raynium.node.ranks import start_process
from raynium.rank import entry as rank_entry
from raynium.storage.process import cpu_ticks
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

# Shards, each with several parts in flight; and uploads of one, if the process dies under it.
UPLOADS_AT_ONCE = 4
ATTEMPTS = 3
# Below the ranks: where they share cores, training goes first.
NICENESS = 10
# How often it is looked whether the process still does something: at most, and within the time in which it must.
WATCH_SECONDS = 5.0
LOOKS_IN_A_SILENCE = 20
# How long its end is waited for.
CLOSE_SECONDS = 10.0


class _UploaderDied(Exception):
    """The process ended before it answered."""


class _UploaderSilent(_UploaderDied):
    """It was given up: a signal has stopped it, or a disk or a file system answers nobody."""


class Uploader:
    """The agent's side. `upload` may be called from any thread; the process is started when it is first needed."""

    def __init__(self, run_url: str, *, silence_seconds: float):
        """silence_seconds: an upload is given up when the process did nothing at all for so long."""
        self._run_url = run_url
        self._silence_seconds = silence_seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None
        # An upload has succeeded since it died.
        self._is_well = True

    def upload(
        self,
        info: ImageInfo,
        *,
        generation: str,
        rank: int,
        again: bool = False,
        died: Callable[[str], object] = logger.warning,
    ) -> ShardEntry:
        """Returns once the shard is durable and confirmed; StoreError with the cause otherwise.

        again: an earlier call failed, and may have left something at the shard's key. died: is told in words that the
        process has, once until an upload has succeeded again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            job = {"info": info.to_json(), "generation": generation, "rank": rank, "again": again or attempt > 1}
            try:
                entry = ShardEntry.from_json(self._answer(job))
            except _UploaderSilent as silence:
                raise StoreError(
                    f"nothing of rank {rank}'s shard of step {info.step} moved for {self._silence_seconds:g} s "
                    f"(fault.upload_silence_seconds), so its upload was given up: look whether {self._run_url} "
                    "answers, or whether somebody stopped the process"
                ) from silence
            except _UploaderDied as death:
                with self._lock:
                    was_well, self._is_well = self._is_well, False
                tell = died if was_well else logger.warning
                tell(f"{death} while it saved rank {rank}'s shard of step {info.step}, which is uploaded again")
            else:
                self._is_well = True
                return entry
        raise StoreError(
            f"the process that uploads checkpoints died {ATTEMPTS} times under rank {rank}'s shard of step {info.step} "
            "(out of memory? look for 'oom-kill' in the kernel's log)"
        )

    def _answer(self, job: dict[str, Any]) -> str:
        child = self._living_child()
        # Looks are counted, not seconds: this process may have been stopped together with that one.
        answer, used, quiet_looks = child.ask(job), child.cpu_ticks(), 0
        between = min(WATCH_SECONDS, self._silence_seconds / LOOKS_IN_A_SILENCE)
        while not wait([answer], between).done:
            before, used = used, child.cpu_ticks()
            quiet_looks = quiet_looks + 1 if used is not None and used == before else 0
            if quiet_looks * between >= self._silence_seconds:
                child.give_up()
        return answer.result()

    def pid(self) -> int | None:
        """Of the process, if it runs; for tests and debuggers."""
        return self._child.process.pid if self._child is not None and not self._child.dead else None

    def close(self) -> None:
        """Ends the process; uploads that still run fail."""
        with self._lock:
            if self._child is not None:
                self._child.close()
                self._child = None

    def _living_child(self) -> "_Child":
        with self._lock:
            if self._child is None or self._child.dead:
                try:
                    self._child = _Child(self._run_url)
                except (OSError, EOFError) as error:
                    raise StoreError(
                        f"the process that uploads checkpoints cannot be started: {error or 'it could not be forked'}; "
                        "this node lacks memory, processes or open files (ulimit -u, ulimit -n)"
                    ) from error
            return self._child


class _Child:
    """One life of the process."""

    def __init__(self, run_url: str):
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe(duplex=True)
        self.process = context.Process(target=main, args=(run_url, theirs), name="uploader", daemon=True)
        start_process(self.process)
        theirs.close()
        self.dead = False
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[str]] = {}
        self._count = 0
        threading.Thread(target=self._read_answers, name="uploader-answers", daemon=True).start()

    def ask(self, job: dict[str, Any]) -> "Future[str]":
        """The answer to one job, as it comes; its exception is StoreError, or _UploaderDied."""
        answer: Future[str] = Future()
        with self._lock:
            self._count += 1
            if not self.dead:
                self._waiting[self._count] = answer
                # An error here means that it died a moment ago: the reading thread is about to find out
                with contextlib.suppress(OSError):
                    self._connection.send_bytes(json.dumps(job | {"id": self._count}).encode())
                return answer
        answer.set_exception(_UploaderDied("the uploader was dead"))
        return answer

    def close(self) -> None:
        self.process.kill()
        # One that waits for a dead disk ends only when that answers.
        self.process.join(CLOSE_SECONDS)

    def cpu_ticks(self) -> int | None:
        return cpu_ticks(self.process.pid or 0)

    def give_up(self) -> None:
        """Nothing more is expected of it, though it may not die before a disk answers."""
        self.process.kill()
        self._end(_UploaderSilent("the uploader did nothing"))

    def _end(self, death: _UploaderDied) -> None:
        with self._lock:
            self.dead = True
            waiting, self._waiting = list(self._waiting.values()), {}
        for each in waiting:
            each.set_exception(death)

    def _read_answers(self) -> None:
        while True:
            try:
                answer = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                break
            with self._lock:
                waiting = self._waiting.pop(answer["id"], None)
            if waiting is None:
                continue
            if "entry" in answer:
                waiting.set_result(answer["entry"])
            else:
                waiting.set_exception(StoreError(answer["error"]))
        self.process.join()
        self._end(_UploaderDied(f"the uploader died (exit code {self.process.exitcode})"))


def main(run_url: str, connection: Connection) -> None:
    """Takes jobs until its agent is gone. Ctrl-C reaches the whole terminal group; the agent decides."""
    rank_entry.die_with_the_agent()
    rank_entry.name_this_process("uploader")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(NICENESS)
    store = Store(run_url)
    sending = threading.Lock()

    def work(job: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": job["id"]}
        try:
            answer["entry"] = _save(store, job).to_json()
        except RayniumError as error:
            answer["error"] = str(error)
        except Exception as error:
            # A fault of ours must not leave the agent waiting.
            answer["error"] = f"{type(error).__name__}: {error}"
        with sending:
            connection.send_bytes(json.dumps(answer).encode())

    with ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="upload") as pool:
        while True:
            try:
                pool.submit(work, json.loads(connection.recv_bytes()))
            except (EOFError, OSError):
                os._exit(0)


def _save(store: Store, job: dict[str, Any]) -> ShardEntry:
    info = ImageInfo.from_json(job["info"])
    if job["again"]:
        # Nobody else writes this generation's shard of this rank, and it is not committed: what is there is ours.
        key = f"{step_folder(info.step)}/{shard_key(job['generation'], job['rank'])}"
        store.delete(key)
        store.discard_unfinished(key, older_than_unix=math.inf)
    return upload_shard(store, info, generation=job["generation"], rank=job["rank"])
