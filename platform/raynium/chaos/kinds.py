"""The kinds of faults: a small class each, which does to a living run what the world does to it.

`strike` raises NotThere where what it wants to hit does not exist at this moment; it is tried again then.
"""

import contextlib
import ctypes
import math
import os
import resource
import signal
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from raynium.chaos.flaky_s3 import Fault, cut, delay, refuse, swallow
from raynium.chaos.node_kinds import NODE_KINDS
from raynium.chaos.processes import Process, RunProcesses
from raynium.chaos.scene import LASTS_SECONDS, Kind, NotThere, Scene, Struck
from raynium.rank.armed import FULL_NAME, REFUSALS_NAME
from raynium.tracking.client import sqlite_path

# Of a full shared memory: at most, and how often it is refused before that ends. A rank asks once as it starts and once
# in each step.
MEMORY_SECONDS, MEMORY_REFUSALS = 60.0, 10
# From linux/fcntl.h and linux/fs.h.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


# What a kind may need, in words.
NEEDS = {
    "s3": "an http:// store behind AWS_ENDPOINT_URL",
    "folder": "a store in a folder",
    "sqlite": "MLflow in an SQLite file",
    "server": "an http:// MLflow server",
    "silence": "fault.upload_silence_seconds of a minute at most",
    "audits": "one node of two data ranks, and fault.audit_every_steps of 2 to twice checkpoint.every_steps",
    "nodes": "several nodes (cluster.nodes, cluster.spares)",
    "spares": "cluster.spares",
    "leaps": "fault.spike_score, no data.stages, and a fault after a hundred steps",
}


def _one(found: Sequence[Process], what: str, dice: Random) -> Process:
    if not found:
        raise NotThere(f"the run has no {what} now")
    return dice.choice(found)


def _signal(process: Process, number: signal.Signals) -> None:
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        raise NotThere(f"process {process.pid} has just ended") from None


# ---- processes that die ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kill:
    """what: the run has of these, in words. ends_ranks: see `Struck`."""

    name: str
    what: str
    find: Callable[[RunProcesses], Sequence[Process]]
    ends_ranks: bool = False
    needs: str = ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        hit = _one(self.find(scene.processes), self.what, dice)
        _signal(hit, signal.SIGKILL)
        words = hit.name if self.what == "rank" else f"the {self.what}"
        return Struck(f"{words} (process {hit.pid}) is killed", ends_ranks=self.ends_ranks)


KILLS = (
    _Kill("kill-rank", "rank", RunProcesses.ranks, ends_ranks=True),
    _Kill("kill-uploader", "uploader", RunProcesses.uploaders),
    _Kill("kill-agent", "node agent", RunProcesses.agents, ends_ranks=True),
    _Kill("kill-coordinator", "run coordinator", RunProcesses.coordinators),
    _Kill("kill-controller", "controller of Ray Train", RunProcesses.controllers, ends_ranks=True),
)


class KillDriver:
    name, needs = "kill-driver", ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        driver = scene.processes.driver
        os.kill(driver, signal.SIGKILL)
        return Struck(
            f"the driver (process {driver}) is killed, and the run is started again", ends_ranks=True, ends_driver=True
        )


# ---- processes that stand still for a while --------------------------------------------------------------------------


def _halted(process: Process, what: str, dice: Random) -> Struck:
    _signal(process, signal.SIGSTOP)
    seconds = dice.uniform(*LASTS_SECONDS)

    def goes_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)

    return Struck(f"{what} (process {process.pid}) stands still for {seconds:.1f} s", seconds, goes_on)


class SlowRank:
    name, needs = "slow-rank", ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        rank = _one(scene.processes.ranks(), "rank", dice)
        return _halted(rank, rank.name, dice)


class StopRank:
    """Nobody sends SIGCONT: the run has to notice (`fault.hang_seconds`)."""

    name, needs = "stop-rank", ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        rank = _one(scene.processes.ranks(), "rank", dice)
        _signal(rank, signal.SIGSTOP)
        return Struck(f"{rank.name} (process {rank.pid}) is stopped for good", ends_ranks=True)


class SlowUploader:
    name, needs = "slow-uploader", ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        return _halted(_one(scene.processes.uploaders(), "uploader", dice), "the uploader", dice)


class StopUploader:
    """Nobody sends SIGCONT: its agent gives it up (`fault.upload_silence_seconds`)."""

    name, needs = "stop-uploader", "silence"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        uploader = _one(scene.processes.uploaders(), "uploader", dice)
        _signal(uploader, signal.SIGSTOP)
        return Struck(f"the uploader (process {uploader.pid}) is stopped for good")


# ---- a store that fails ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoreFails:
    """Requests of every process of the run, for a while."""

    name: str
    what: str
    faults: tuple[Fault, ...]
    needs: str = "s3"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        assert scene.proxy is not None
        seconds = dice.uniform(*LASTS_SECONDS)
        scene.proxy.set(*self.faults)
        return Struck(f"for {seconds:.1f} s the store {self.what}", seconds, scene.proxy.set)


STORE_KINDS = (
    _StoreFails("store-refuses", "answers with 503 SlowDown", (refuse(503, "SlowDown"),)),
    _StoreFails("store-delays", "answers 2 s late", (delay(2.0),)),
    _StoreFails("store-cuts", "breaks connections", (cut(0, 2**20),)),
    _StoreFails("store-silent", "does what it is asked and says nothing", (swallow(times=None),)),
)


class FolderAway:
    """The store of a run in a folder: a file takes its place, in one step, so that nobody makes it anew."""

    name, needs = "folder-away", "folder"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        assert scene.run_folder is not None
        folder, aside = scene.run_folder, scene.run_folder.with_name(f"{scene.run_folder.name}.away")
        seconds = dice.uniform(*LASTS_SECONDS)
        aside.touch()
        _exchange(folder, aside)

        def comes_back() -> None:
            _exchange(folder, aside)
            aside.unlink()

        return Struck(f"for {seconds:.1f} s the run's folder is not there", seconds, comes_back)


def _exchange(first: Path, second: Path) -> None:
    """Both names at once (Linux)."""
    if ctypes.CDLL(None, use_errno=True).renameat2(AT_FDCWD, bytes(first), AT_FDCWD, bytes(second), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), f"{first} cannot change places with {second}")


# ---- what is full, or away -------------------------------------------------------------------------------------------


class DiskFull:
    """For the run alone: its driver, coordinator, agent and uploader may write no byte to a file.

    A limit of the kernel's for each process (RLIMIT_FSIZE), which spares everybody else on this machine; a write fails
    with EFBIG in place of ENOSPC.
    """

    name, needs = "disk-full", ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        processes = scene.processes
        agent = _one(processes.agents(), "agent with ranks", dice)
        pids = [processes.driver, agent.pid]
        pids += [each.pid for each in (*processes.coordinators(), *processes.uploaders())]
        seconds = dice.uniform(*LASTS_SECONDS)
        _limit_files(pids, 0)

        def has_room() -> None:
            _limit_files(pids, resource.RLIM_INFINITY)

        return Struck(f"for {seconds:.1f} s nothing of the run can write to a file", seconds, has_room)


def _limit_files(pids: Sequence[int], num_bytes: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes if num_bytes == 0 else most, most))


class MemoryFull:
    """Shared memory, for the run's ranks alone. What they have they keep, so a new agent's ranks are those that want.

    It lasts until they have been refused it, and through some steps of theirs.
    """

    name, needs = "memory-full", ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        agent = _one(scene.processes.agents(), "node agent", dice)
        refusals = scene.armed / REFUSALS_NAME
        refusals.write_bytes(b"")
        (scene.armed / FULL_NAME).touch()
        _signal(agent, signal.SIGKILL)
        return Struck(
            f"shared memory is full, and the node agent (process {agent.pid}) is killed",
            MEMORY_SECONDS,
            (scene.armed / FULL_NAME).unlink,
            has_shown=lambda: refusals.stat().st_size >= MEMORY_REFUSALS,
            ends_ranks=True,
        )


class ServerAway:
    """Connections to the MLflow server break."""

    name, needs = "server-away", "server"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        assert scene.mlflow_proxy is not None
        seconds = dice.uniform(*LASTS_SECONDS)
        scene.mlflow_proxy.cut()
        return Struck(f"for {seconds:.1f} s nobody reaches the MLflow server", seconds, scene.mlflow_proxy.mend)


class MlflowAway:
    """Its database is locked by somebody else."""

    name, needs = "mlflow-away", "sqlite"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        seconds = dice.uniform(*LASTS_SECONDS)
        # Another thread ends it.
        path = sqlite_path(scene.mlflow_uri)
        database = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            database.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            database.close()
            raise NotThere(f"MLflow's database is in use: {error}") from None
        return Struck(f"for {seconds:.1f} s MLflow's database is locked", seconds, database.close)


# ---- steps that go wrong ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadStep:
    """Of one rank in the fault's own step, each time that it is taken: its slopes are multiplied by `factor`.

    The ranks know the step beforehand (`rank/armed.py`): by the time it is struck it has happened. The run without
    faults is told to leave the same steps out.
    """

    name: str
    factor: float
    what: str
    needs: str = ""

    def strike(self, scene: Scene, dice: Random) -> Struck:
        return Struck(self.what)


NOT_FINITE = BadStep("not-finite", math.nan, "the gradient is not a number")
SPIKE = BadStep("spike", 1e4, "the gradient norm leaps by 10,000", needs="leaps")


class FlippedBit:
    """Of one rank's gradient in the audited step at or after the fault's, the first time that it is taken."""

    name, needs = "flipped-bit", "audits"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        return Struck("a bit of rank 0's gradient is flipped", ends_ranks=True)


KINDS: tuple[Kind, ...] = (
    *KILLS,
    *(KillDriver(), StopRank(), StopUploader(), SlowRank(), SlowUploader()),
    *STORE_KINDS,
    *(FolderAway(), DiskFull(), MemoryFull(), MlflowAway(), ServerAway(), NOT_FINITE, SPIKE, FlippedBit()),
    *NODE_KINDS,
)


def kinds_for(has: Collection[str]) -> tuple[list[Kind], list[Kind]]:
    """Those that can happen to a run, and those that cannot. has: names of `NEEDS`."""
    can = [kind for kind in KINDS if not kind.needs or kind.needs in has]
    return can, [kind for kind in KINDS if kind not in can]
