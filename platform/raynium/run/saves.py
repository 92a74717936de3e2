"""The run's saves as its coordinator sees them: shards come in, whole ones are committed, what failed keeps its cause.

All methods run on the coordinator's loop, so each runs unbroken between its awaits.
"""

import asyncio
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raynium.checkpoint.catalog import latest, list_checkpoints, open_checkpoint, step_folders
from raynium.checkpoint.commit import StepTaken, commit_checkpoint
from raynium.checkpoint.format.manifest import Manifest, ShardEntry, generation_of, step_folder
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.retention import Retention, apply_retention
from raynium.checkpoint.state import checkpoint_state
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import CheckpointDamaged, CheckpointError, RunInUse, StoreError
from raynium.run.fence import Fence
from raynium.run.last_save import pause_before_next_try
from raynium.run.points import PendingPoints, read_waiting, write_waiting
from raynium.run.protocol import Commit, ShardSaved
from raynium.storage.store import Store

# Saves whose shards still come in. A rank has two images, so a generation has no more than three; what is older lacks a
# shard that failed or whose rank died, and the checksums of a terabyte's shards take hundreds of megabytes
MOST_COMING_IN = 8
# A node that takes rank 0 waits no longer for what the store has for it.
POINTS_SECONDS = 10.0
# Commits of an earlier coordinator that a new one tells again, since it may have died before they were sent to MLflow,
# which keeps a point once. No more were on their way: a rank's images are two.
COMMITS_TOLD_AGAIN = 3


@dataclass(frozen=True)
class WholeSave:
    """All ranks' shards of one step are in the store, verified: only the manifest is missing."""

    generation_id: str
    step: int
    parent_step: int | None
    entries: tuple[ShardEntry, ...]
    # Of the slowest shard.
    upload_seconds: float
    world: World


class Saves:
    """What became of each save."""

    def __init__(
        self,
        config: Config,
        store: Store,
        fence: Fence,
        points: PendingPoints,
        *,
        life: str,
        tell: Callable[[str], None],
        note: Callable[[int, str], None],
    ):
        """fence: of the driver's claim. points: that MLflow has not got. life: the coordinator's name. tell: a line for
        the user's terminal. note: of the incident that steps become no checkpoints, its first step and the cause.
        """
        self._fence = fence
        self._points = points
        # Whether those of before are read from the store, and it may have some.
        self._knows_points_of_before, self._has_kept_points = False, False
        self._points_lock = asyncio.Lock()
        self._life = life
        self._config = config
        self._store = store
        self._tell, self._note_incident = tell, note
        # No step has become a checkpoint since one failed.
        self._fails = False
        # Step → eval/… metrics, until its checkpoint is committed.
        self._evaluations: dict[int, dict[str, float]] = {}
        # (generation, step) → rank → its shard, and how long that took
        self._shards: dict[tuple[str, int], dict[int, tuple[ShardEntry, float]]] = {}
        # (generation, step) of those that came in.
        self._whole: deque[tuple[str, int]] = deque(maxlen=MOST_COMING_IN)
        # The newest of those that the store did not let us commit.
        self._uncommitted: WholeSave | None = None
        # Step → why it is not committed.
        self._causes: dict[int, str] = {}
        self.caught_up = False
        self._sent = 0
        self.commits: list[Commit] = []
        self.committed_step: int | None = None
        self.committed_uri: str | None = None

    def note_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of rank 0's report; the checkpoint of that step keeps those of its evaluation, where finite."""
        found = {name: value for name, value in metrics.items() if name.startswith("eval/") and math.isfinite(value)}
        if found:
            self._evaluations[step] = found

    def resumed(self, checkpoint: CheckpointRef) -> None:
        """The run goes on from here: its newest checkpoint, until there is a newer one."""
        self.committed_step, self.committed_uri = checkpoint.step, checkpoint.uri

    def shard_saved(self, shard: ShardSaved) -> WholeSave | None:
        """The save, if this was its last shard."""
        entry = ShardEntry.from_json(shard.entry)
        save = generation_of(entry.file.key), shard.step
        # Told again, by an agent whose ranks start from it.
        if save in self._whole:
            return None
        shards = self._shards.setdefault(save, {})
        shards[shard.rank] = entry, shard.upload_seconds
        if len(shards) < shard.world.size:
            if len(self._shards) > MOST_COMING_IN:
                del self._shards[next(iter(self._shards))]
            return None
        found = [shards[rank] for rank in sorted(shards)]
        del self._shards[save]
        self._whole.append(save)
        entries = tuple(entry for entry, _ in found)
        return WholeSave(*save, shard.parent_step, entries, max(seconds for _, seconds in found), shard.world)

    def shard_failed(self, step: int, rank: int, cause: str) -> None:
        """Told once a step: where one shard fails, the others mostly do."""
        if self.committed_step is not None and step <= self.committed_step:
            # Another generation committed it.
            return
        told = step in self._causes
        self._causes[step] = f"rank {rank}'s shard could not be uploaded: {cause}"
        if not told:
            self._tell_failure(step)

    def problem(self, step: int) -> str | None:
        """Why a run that ended well at this step has no checkpoint of it; None: it has, or never saves."""
        if self._config.checkpoint.save == "never" or (self.committed_step is not None and self.committed_step >= step):
            return None
        newest = "no checkpoint" if self.committed_step is None else f"the checkpoint of step {self.committed_step}"
        return (
            f"training reached step {step}, but its checkpoint could not be saved: "
            f"{self._causes.get(step, 'no shard of it arrived')}. Its state in the nodes' memory is gone with this "
            f"attempt, and the run has {newest} to go on from: correct the cause and start the run again"
        )

    async def commit(self, whole: WholeSave, *, living: Sequence[str], reading: Sequence[int] = ()) -> bool:
        """Makes it a checkpoint and tidies up. True if it is the newest one now.

        living: generations that may still upload. reading: steps whose checkpoint ranks may still read. What goes wrong
        is told: training goes on without this checkpoint. Raises RunInUse if the run is another driver's by now.
        """
        step = whole.step
        try:
            await self._keep_points()
            reference = await asyncio.to_thread(
                commit_checkpoint,
                self._store,
                step=step,
                generation=whole.generation_id,
                entries=whole.entries,
                state=checkpoint_state(self._config, step),
                world_size=whole.world.size,
                layout=whole.world.degrees(),
                parent_step=whole.parent_step,
                metrics=self._evaluations.get(step, {}),
                upload_seconds=whole.upload_seconds,
                check=self._fence.check,
            )
        except RunInUse as error:
            self._causes[step] = str(error)
            raise
        except (StoreError, CheckpointError) as error:
            self._commit_failed(whole, error)
            return False
        self._evaluations.pop(step, None)
        self._fails = False
        if self._causes.pop(step, None) is not None:
            self._tell(f"checkpoint of step {step} is saved after all")
        newest = self.committed_step is None or step > self.committed_step
        if newest:
            self.committed_step, self.committed_uri = step, reference.uri
        await self._tidy_up(step, living, reading)
        await self._note([reference])
        return newest

    async def find_points(self) -> None:
        """Before they are handed over: what a coordinator that has died knew at its last commit.

        Ranks do not wait long for a metric: a store that is away or silent is asked again before the next commit.
        """
        try:
            await asyncio.wait_for(self._read_points(), POINTS_SECONDS)
        except (StoreError, TimeoutError) as error:
            self._tell(f"points that MLflow had not got may come late: {str(error) or 'the store is silent'}")

    async def _read_points(self) -> None:
        if self._knows_points_of_before:
            return
        async with self._points_lock:
            if self._knows_points_of_before:
                return
            self._has_kept_points = True
            try:
                found = await asyncio.to_thread(read_waiting, self._store)
                self._points.finds(found)
                self._has_kept_points = bool(found)
            except CheckpointDamaged as error:
                self._tell(f"points that MLflow had not got are missing there: {error}")
            self._knows_points_of_before = True

    async def _keep_points(self) -> None:
        """What MLflow has not got goes into the store before what is gone on from. Raises StoreError, RunInUse."""
        await self._read_points()
        async with self._points_lock:
            points = self._points.all()
            if points or self._has_kept_points:
                await asyncio.to_thread(self._fence.check)
                await asyncio.to_thread(write_waiting, self._store, self._fence.number, points)
                self._has_kept_points = bool(points)

    async def commit_last(self, step: int, *, living: Sequence[str]) -> None:
        """At the run's end, if its last save is whole and was not committed: tries that again for a while."""
        if self.problem(step) is not None:
            await self._look_for(step)
        began, tries = time.monotonic(), 1
        while (whole := self._uncommitted) is not None and whole.step == step:
            pause = pause_before_next_try(tries, time.monotonic() - began)
            if pause is None:
                return
            self._tell(f"checkpoint of step {step}: trying to commit it again in {pause:.0f} s")
            await asyncio.sleep(pause)
            self._uncommitted = None
            await self.commit(whole, living=living)
            tries += 1

    async def _look_for(self, step: int) -> None:
        """Another generation may have committed it, or a coordinator that died before the run's end."""
        try:
            newest = await asyncio.to_thread(latest, self._store)
        except (StoreError, CheckpointError) as error:
            self._causes.setdefault(step, f"the store cannot be asked for it: {error}")
            return
        if newest is not None and newest.step == step:
            self.resumed(newest)

    def _commit_failed(self, whole: WholeSave, error: Exception) -> None:
        self._causes[whole.step] = f"it could not be committed: {error}"
        if isinstance(error, StepTaken):
            self._tell(f"step {whole.step} was already committed by another generation: {error}")
            return
        self._tell_failure(whole.step)
        # What is not one whole checkpoint will not become one; what the store refused it may take later
        may_succeed = isinstance(error, StoreError)
        if may_succeed and (self._uncommitted is None or whole.step > self._uncommitted.step):
            self._uncommitted = whole

    def _tell_failure(self, step: int) -> None:
        """A store that is away for hours is one incident, however many steps it costs."""
        self._tell(f"checkpoint of step {step} is not saved; training goes on: {self._causes[step]}")
        if not self._fails:
            self._fails = True
            self._note_incident(step, self._causes[step])

    async def _tidy_up(self, step: int, living: Sequence[str], reading: Sequence[int]) -> None:
        try:
            await asyncio.to_thread(
                apply_retention,
                self._store,
                policy=Retention.of(self._config.checkpoint),
                living=living,
                reading=reading,
                now_unix=time.time(),
            )
        except (StoreError, CheckpointError) as error:
            self._tell(f"checkpoint of step {step} is committed, but older ones were not tidied up: {error}")

    async def catch_up(self) -> None:
        """Once, when the first agent watches its ranks: what coordinators before this one have committed."""
        if self.caught_up or self._config.checkpoint.save == "never":
            return
        self.caught_up = True
        try:
            found = await asyncio.to_thread(_newest, self._store)
        except (StoreError, CheckpointError) as error:
            self._tell(f"checkpoints of before may be missing on the MLflow page: {error}")
            return
        if found and found[-1].step > (self.committed_step or -1):
            self.resumed(found[-1])
        if found:
            await self._note(found)

    def sent(self, last: Commit) -> None:
        """An agent has sent this one and those before it to MLflow; it may be of a coordinator that has died."""
        if last.life == self._life:
            self._sent = max(self._sent, last.number)

    def unsent(self) -> list[Commit]:
        return self.commits[self._sent :]

    async def _note(self, committed: Sequence[CheckpointRef]) -> None:
        """For whoever writes it into MLflow."""
        try:
            found = await asyncio.to_thread(list_checkpoints, self._store)
        except (StoreError, CheckpointError) as error:
            steps = ", ".join(str(each.step) for each in committed)
            self._tell(f"checkpoint of step {steps} is committed, but missing on the MLflow page: {error}")
            return
        listed = [vars(each) | {"uri": self._store.uri(step_folder(each.step))} for each in found]
        text = json.dumps(listed, indent=2)
        # One list for all: of a run that keeps thousands, a list for each commit would take gigabytes.
        self.commits = [replace(each, checkpoints=text) for each in self.commits]
        known = {each.step for each in self.commits}
        for each in committed:
            if each.step not in known and each.manifest.timing is not None:
                number = len(self.commits) + 1
                self.commits.append(Commit(self._life, number, each.step, _metrics(each.manifest), text))


def _newest(store: Store) -> list[CheckpointRef]:
    """The last few checkpoints that can be read, oldest first."""
    steps = [folder.step for folder in step_folders(store) if folder.manifest is not None][-COMMITS_TOLD_AGAIN:]
    found = []
    for step in steps:
        # One that is damaged, or was deleted a moment ago, is no point on a page.
        with contextlib.suppress(CheckpointError):
            found.append(open_checkpoint(store, step))
    return found


def _metrics(manifest: Manifest) -> dict[str, float]:
    """checkpoint/…: from the manifest alone, so that whoever tells of a commit tells the same."""
    assert manifest.timing is not None
    return {
        "checkpoint/bytes": float(manifest.num_bytes),
        "checkpoint/longest_stall_seconds": manifest.timing.stall_seconds,
        "checkpoint/upload_seconds": manifest.timing.upload_seconds,
        "checkpoint/commit_seconds": manifest.timing.commit_seconds,
    }
