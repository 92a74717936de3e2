"""From where a generation starts: a snapshot in the nodes' memory, a checkpoint, or the first step."""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from raynium.checkpoint.catalog import IfDamaged, resume_point, set_aside
from raynium.checkpoint.format.manifest import CHECKPOINTS_FOLDER
from raynium.checkpoint.ref import CheckpointRef
from raynium.config.world import World
from raynium.errors import CheckpointDamaged, StoreError
from raynium.run.protocol import AgentInfo, HeldImages
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store

# In the run's store: a list of steps whose loss leapt.
UNDONE_NAME = "undone-steps.json"
# Ranks that can start from memory wait for that no longer.
STORE_SECONDS = 2.0


@dataclass(frozen=True)
class Origin:
    """images: what all ranks have in their nodes' memory; else checkpoint; else the run begins. undone_steps: of the
    run, those that are to be left out.
    """

    images: HeldImages | None = None
    checkpoint: CheckpointRef | None = None
    undone_steps: tuple[int, ...] = ()

    @property
    def step(self) -> int | None:
        """None: the initial weights."""
        if self.images is not None:
            return self.images.step
        return self.checkpoint.step if self.checkpoint is not None else None

    def __str__(self) -> str:
        if self.images is not None:
            return f"the snapshot of step {self.step} in memory"
        return f"the checkpoint of step {self.step}" if self.checkpoint is not None else "step 0"


class Recovery:
    """Knows which states have proved bad, and reads the store. One per life of the coordinator, on its loop."""

    def __init__(self, store: Store, *, if_damaged: IfDamaged, tell: Callable[[str], None]):
        """tell: a line for the user's terminal."""
        # Held while a checkpoint is chosen to go on from, or older ones are deleted.
        self.choosing = asyncio.Lock()
        self._store = store
        self._if_damaged: IfDamaged = if_damaged
        self._tell = tell
        self._reading: int | None = None
        self._damaged: int | None = None
        self._distrusted: set[tuple[str, int]] = set()
        # The newest of the run, and those that the store has: None until it was asked.
        self._undone: set[int] = set()
        self._undone_kept: set[int] | None = None

    @property
    def reading(self) -> list[int]:
        """Steps whose checkpoint ranks may be reading."""
        return [] if self._reading is None else [self._reading]

    def stepped(self) -> None:
        """A rank has made a step, so none reads a checkpoint any more."""
        self._reading = None

    async def origin(self, agents: Sequence[AgentInfo], world: World, *, uploading: Collection[str]) -> Origin:
        """Of the next generation. uploading: as the roster says. Raises StoreError and CheckpointError."""
        images = newest_images(agents, world, distrusted=self._distrusted)
        if images is not None:
            # It is as new as any checkpoint, since every checkpoint was such an image. Nor does it wait for a silent
            # store: a step that is not known to have leapt leaps again, and is undone again.
            try:
                await asyncio.wait_for(self._keep_undone(), STORE_SECONDS)
            except (StoreError, TimeoutError) as error:
                problem = str(error) or "the store is silent"
                self._tell(f"{UNDONE_NAME}, the steps that leapt, is not up to date: {problem}")
            return Origin(images, undone_steps=tuple(sorted(self._undone)))
        await self._keep_undone()
        async with self.choosing:
            if not uploading:
                # No agent of an earlier attempt lives: what is open will never be finished.
                await asyncio.to_thread(self._store.discard_unfinished, CHECKPOINTS_FOLDER, older_than_unix=math.inf)
            if self._damaged is not None:
                self._tell(f"CHECKPOINT DAMAGED: {await asyncio.to_thread(set_aside, self._store, self._damaged)}")
                self._damaged = None
            point = await asyncio.to_thread(resume_point, self._store, if_damaged=self._if_damaged)
            for note in point.set_aside:
                self._tell(f"CHECKPOINT DAMAGED: {note}")
            origin = Origin(checkpoint=point.checkpoint, undone_steps=tuple(sorted(self._undone)))
            self._reading = origin.step
            return origin

    def distrust(self, images: HeldImages) -> None:
        """Ranks that started from them made no step: they are not tried again."""
        self._distrusted.add((images.generation_id, images.step))

    def undo(self, step: int) -> None:
        """The run leaves it out from now on, whatever it goes on from: known to drivers to come, too."""
        self._undone.add(step)

    async def _keep_undone(self) -> None:
        """Reads and writes the store where there is need. Raises StoreError."""
        if self._undone_kept is None:
            self._undone_kept = await asyncio.to_thread(self._read_undone)
            self._undone |= self._undone_kept
        if self._undone != self._undone_kept:
            wanted = set(self._undone)
            await asyncio.to_thread(self._store.replace, UNDONE_NAME, json.dumps(sorted(wanted)).encode())
            self._undone_kept = wanted

    def _read_undone(self) -> set[int]:
        try:
            return set(json.loads(self._store.read(UNDONE_NAME, max_bytes=2**20)))
        except KeyMissing:
            return set()

    def refuses(self, step: int | None, images: HeldImages | None, error: str | None) -> bool:
        """Whether the run must end because its ranks found, only while they read it, that their checkpoint is damaged.

        step, images: that they started from; error: the class of what ended them. Where the policy allows an older
        checkpoint, this one is set aside before the next generation.
        """
        if error != CheckpointDamaged.__name__ or images is not None:
            return False
        if self._if_damaged == "stop":
            self._tell(
                f"the checkpoint of step {step} is damaged: look at it with `raynium checkpoints verify --deep`, then "
                "set checkpoint.if_damaged=use_older to go on from the next older one"
            )
            return True
        self._damaged = step
        return False


def newest_images(
    agents: Sequence[AgentInfo], world: World, *, distrusted: Collection[tuple[str, int]] = ()
) -> HeldImages | None:
    """The newest snapshot that every rank of a world like this one has in its node's memory. Pure."""
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for agent in agents:
        for held in agent.images:
            if held.world == world:
                found[held.generation_id, held.step].update(held.ranks)
    whole = [key for key, ranks in found.items() if len(ranks) == world.size and key not in distrusted]
    if not whole:
        return None
    generation_id, step = max(whole, key=lambda key: key[1])
    return HeldImages(generation_id, step, tuple(range(world.size)), world)
