"""From where a generation starts: a snapshot in the nodes' memory, a checkpoint, or the first step."""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from raynium.checkpoint.catalog import IfDamaged, resume_point, set_aside, step_folders
from raynium.checkpoint.format.manifest import CHECKPOINTS_FOLDER
from raynium.checkpoint.ref import CheckpointRef
from raynium.config.world import World
from raynium.errors import CheckpointDamaged, StoreError
from raynium.run.held_images import HeldImages, as_range
from raynium.run.leaps import LeftOut, Undo
from raynium.run.protocol import Address, AgentInfo
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store

# In the run's store: the steps that leapt, and those that are suspected with them.
UNDONE_NAME = "undone-steps.json"
# Ranks that can start from memory wait for that no longer.
STORE_SECONDS = 2.0


@dataclass(frozen=True)
class Origin:
    """images: what all ranks have in nodes' memory; else checkpoint; else the run begins."""

    images: HeldImages | None = None
    checkpoint: CheckpointRef | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    # Of images that ranks of another world left: who has which ranks'.
    holders: dict[Address, Sequence[int]] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """None: the initial weights."""
        if self.images is not None:
            return self.images.step
        return self.checkpoint.step if self.checkpoint is not None else None

    def copies(self, agents: Sequence[AgentInfo], *, ready: Sequence[AgentInfo]) -> dict[Address, Sequence[int]]:
        """As `Order` has them."""
        return self.holders if self.images is None or self.holders else copies_of(self.images, agents, ready=ready)

    def __str__(self) -> str:
        if self.images is not None:
            of = f" of {self.images.world.size} ranks" if self.holders else ""
            return f"the snapshot of step {self.step} in memory{of}"
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
        # Of the run, and what the store has of it: None until it was asked.
        self._left_out = LeftOut()
        self._left_out_kept: LeftOut | None = None
        # States from this step on are not gone on from; None: all may be.
        self._before: int | None = None
        # Generation → the step from which on what it saved is spoilt.
        self._spoilt_from: dict[str, int] = {}

    @property
    def reading(self) -> list[int]:
        """Steps whose checkpoint ranks may be reading."""
        return [] if self._reading is None else [self._reading]

    def stepped(self) -> None:
        """A rank has made a step, so none reads a checkpoint any more."""
        self._reading = None

    async def origin(
        self, agents: Sequence[AgentInfo], world: World, *, ready: Sequence[AgentInfo], uploading: Collection[str]
    ) -> Origin:
        """Of the next generation. agents: by node rank. ready: they, and those that no rank of it runs on.

        uploading: as the roster says. Raises StoreError and CheckpointError.
        """
        found = self._in_memory(agents, world, ready)
        if self._before is not None:
            async with self.choosing:
                if not await self._set_spoilt_aside(self._before, even_all=found.images is not None):
                    self._before = None
                    found = self._in_memory(agents, world, ready)
        if found.images is not None and not found.holders:
            # It is as new as any checkpoint, since every checkpoint was such an image. Nor does it wait for a silent
            # store: a step that is not known to have leapt leaps again, and is undone again.
            try:
                await asyncio.wait_for(self._keep_left_out(), STORE_SECONDS)
            except (StoreError, TimeoutError) as error:
                problem = str(error) or "the store is silent"
                self._tell(f"{UNDONE_NAME}, the steps that leapt, is not up to date: {problem}")
            self._before = None
            return replace(found, left_out=self._left_out)
        await self._keep_left_out()
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
            self._before = None
            # Ranks of another world may have gone on from it, and have left a newer checkpoint.
            if found.images is not None and (point.checkpoint is None or point.checkpoint.step <= found.images.step):
                return replace(found, left_out=self._left_out)
            origin = Origin(checkpoint=point.checkpoint, left_out=self._left_out)
            self._reading = origin.step
            return origin

    def _in_memory(self, agents: Sequence[AgentInfo], world: World, ready: Sequence[AgentInfo]) -> Origin:
        """The newest snapshot there; of two of one step the one that no rank needs another's image of."""
        images = newest_images(agents, world, ready=ready, distrusted=self._distrusted, before=self._before)
        others = newest_of_other_worlds(ready, world, distrusted=self._distrusted, before=self._before)
        if others.images is not None and (images is None or others.images.step > images.step):
            return others
        return Origin(images)

    def distrust(self, images: HeldImages) -> None:
        """Ranks that started from them made no step: they are not tried again."""
        self._distrusted.add((images.generation_id, images.step))

    def undo(self, undo: Undo, *, generations: Collection[str]) -> None:
        """The run leaves these steps out from now on, whatever it goes on from: known to drivers to come, too.

        generations: until now, whose later saves are spoilt if that is what the undoing says.
        """
        self._left_out = self._left_out.with_those_of(LeftOut((undo.leapt,), tuple(undo.suspected)))
        if undo.before is not None:
            self._before = undo.before
            for each in generations:
                self._spoilt_from[each] = min(undo.before, self._spoilt_from.get(each, undo.before))
            self._tell(
                f"the leap of step {undo.leapt} is one that came back: steps {undo.before} to {undo.leapt} are left "
                f"out, and all go back to a state before them"
            )

    def is_spoilt(self, generation_id: str, step: int) -> bool:
        """Whether what this generation saved at this step is not to become a checkpoint any more."""
        return step >= self._spoilt_from.get(generation_id, math.inf)

    async def _set_spoilt_aside(self, before: int, *, even_all: bool) -> bool:
        """Checkpoints of this step and later ones. False, and none is: no other would be left. Raises StoreError.

        even_all: an older state is in memory.
        """
        folders = await asyncio.to_thread(step_folders, self._store)
        steps = [each.step for each in folders if each.manifest is not None]
        if steps and min(steps) >= before and not even_all:
            self._tell(f"there is no state of a step before {before}, so the newest one is used again")
            return False
        for step in steps:
            if step >= before:
                aside = await asyncio.to_thread(set_aside, self._store, step)
                self._tell(f"the checkpoint of step {step} was saved before a leap that came back: it is now {aside}")
        return True

    async def _keep_left_out(self) -> None:
        """Reads and writes the store where there is need. Raises StoreError."""
        if self._left_out_kept is None:
            self._left_out_kept = await asyncio.to_thread(self._read_left_out)
            self._left_out = self._left_out.with_those_of(self._left_out_kept)
        if self._left_out != self._left_out_kept:
            wanted = self._left_out
            await asyncio.to_thread(self._store.replace, UNDONE_NAME, json.dumps(asdict(wanted)).encode())
            self._left_out_kept = wanted

    def _read_left_out(self) -> LeftOut:
        try:
            found = json.loads(self._store.read(UNDONE_NAME, max_bytes=2**20))
        except KeyMissing:
            return LeftOut()
        return LeftOut(tuple(found["undone"]), tuple(found["suspected"]))

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
    agents: Sequence[AgentInfo],
    world: World,
    *,
    ready: Sequence[AgentInfo] = (),
    distrusted: Collection[tuple[str, int]] = (),
    before: int | None = None,
) -> HeldImages | None:
    """The newest snapshot that every rank of a world like this one has in its node's memory, or somebody in another
    node's. Pure.

    agents: by node rank. ready: they, and those that no rank of it runs on. before: of an earlier step than this; None:
    of any.
    """
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for node_rank, agent in enumerate(agents):
        for held in agent.images:
            if held.world == world and (before is None or held.step < before):
                found[held.generation_id, held.step].update(set(held.ranks) & set(world.ranks_of(node_rank)))
    for _, held in _lent(agents, ready):
        if held.world == world and (before is None or held.step < before):
            found[held.generation_id, held.step].update(held.ranks)
    whole = [key for key, ranks in found.items() if len(ranks) == world.size and key not in distrusted]
    if not whole:
        return None
    generation_id, step = max(whole, key=lambda key: key[1])
    return HeldImages(generation_id, step, range(world.size), world)


def newest_of_other_worlds(
    ready: Sequence[AgentInfo],
    world: World,
    *,
    distrusted: Collection[tuple[str, int]] = (),
    before: int | None = None,
) -> Origin:
    """The newest snapshot that ranks of another world than this have left whole, and who has which image. Pure.

    ready: agents without ranks, of which only those that take copies can be read from.
    """
    found: dict[tuple[int, str, World], dict[int, Address]] = defaultdict(dict)
    readable = [agent for agent in ready if agent.buddy_port]
    # Who has a rank's own image is asked before who has the copy: then each node is asked for as much.
    own = [(agent, held) for agent in readable for held in agent.images]
    copies = [(agent, held) for agent in readable for held in agent.copies]
    for agent, held in (*own, *copies):
        if held.world != world and (before is None or held.step < before):
            for rank in held.ranks:
                found[held.step, held.generation_id, held.world].setdefault(rank, agent.address)
    whole = [key for key, of in found.items() if len(of) == key[2].size and (key[1], key[0]) not in distrusted]
    if not whole:
        return Origin()
    newest = max(whole, key=lambda key: key[:2])
    step, generation_id, of = newest
    return Origin(HeldImages(generation_id, step, range(of.size), of), holders=_by_holder(found[newest]))


def _lent(agents: Sequence[AgentInfo], ready: Sequence[AgentInfo]) -> Iterator[tuple[AgentInfo, HeldImages]]:
    """Who has what for ranks of other nodes; last those that stay, since a lender may be about to leave. Pure.

    agents: that run the next generation. ready: they, and those that do not, who lend what their last ranks left.
    """
    crew = {agent.agent_id for agent in agents}
    for agent in ready:
        if agent.buddy_port and agent.agent_id not in crew:
            yield from ((agent, held) for held in (*agent.images, *agent.copies))
    for agent in agents:
        yield from ((agent, held) for held in agent.copies)


def copies_of(
    images: HeldImages, agents: Sequence[AgentInfo], *, ready: Sequence[AgentInfo] = ()
) -> dict[Address, Sequence[int]]:
    """Who has images of which ranks, of those whose own nodes lack them. Pure. agents, ready: as above."""
    key = images.generation_id, images.step
    own = {
        rank
        for node_rank, agent in enumerate(agents)
        for held in agent.images
        if (held.generation_id, held.step) == key
        for rank in set(held.ranks) & set(images.world.ranks_of(node_rank))
    }
    return _by_holder(
        {
            rank: agent.address
            for agent, held in _lent(agents, ready)
            if (held.generation_id, held.step) == key
            for rank in held.ranks
            if rank not in own
        }
    )


def _by_holder(of_ranks: Mapping[int, Address]) -> dict[Address, Sequence[int]]:
    """As an order says it: whatever number of ranks a node has, they are mostly neighbours."""
    found: dict[Address, list[int]] = defaultdict(list)
    for rank, holder in of_ranks.items():
        found[holder].append(rank)
    return {holder: as_range(ranks) for holder, ranks in found.items()}
