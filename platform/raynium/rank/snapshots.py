"""This rank's training state, to and from images in shared memory, and from checkpoints.

A rank has two images, or three: while one is being uploaded the next snapshot goes into another, and the newest one
that is complete stays until a newer one is, so that a generation that dies can be followed by one from memory.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from raynium.checkpoint.base import BaseRef
from raynium.checkpoint.format.image import ImageFile, plan_image, read_image, write_image
from raynium.checkpoint.format.manifest import ImageInfo
from raynium.checkpoint.held import HeldRef
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import MODEL_PREFIX, Chunk
from raynium.config.images import IMAGE_SLOTS
from raynium.engines.base import Engine
from raynium.errors import CheckpointDamaged, CheckpointMismatch, SnapshotMemoryShort
from raynium.models.adapter import is_adapters
from raynium.train.guard import Guard
from raynium.train.link import Link
from raynium.train.patience import Patience

logger = logging.getLogger(__name__)

# A run that goes on trains so long without a snapshot, where something else has filled the memory.
MEMORY_SECONDS = 600.0


class NoSnapshots:
    """For a run that keeps nothing (checkpoint.save=never)."""

    def __init__(self, link: Link):
        self._link = link

    def wants_to_skip(self, *, upload: bool) -> bool:
        return False

    def save(self, step: int, *, upload: bool) -> None:
        self._link.phase("fetch", step + 1)


class Snapshots:
    """Saves and restores one rank. Every rank builds its own, after its engine; CheckpointError if memory is short."""

    def __init__(
        self,
        engine: Engine,
        link: Link,
        folder: Path,
        guard: Guard,
        patience: Patience,
        *,
        if_busy: Literal["wait", "skip"],
        num_images: int = IMAGE_SLOTS,
        if_short: Literal["refuse", "skip"] = "refuse",
        has_memory: Callable[[], bool] = lambda: True,
    ):
        """folder: shared memory that outlives the rank. All of it is taken here, before the first step.

        if_short: of memory; "skip": saves are left out until there is enough, for MEMORY_SECONDS at most. has_memory:
        False: there is none at this moment.
        """
        self._engine = engine
        self._link = link
        self._if_busy = if_busy
        self._guard, self._patience = guard, patience
        self._rank = dist.get_rank()
        # uint8 [5056], the same tensor each time: chunks hold it.
        self._random_state = torch.get_rng_state()
        chunks = self._chunks()
        self._plan = plan_image(chunks)
        # What another rank saves and this one holds too is not uploaded, but a restart from memory needs it.
        self._replica_plan = plan_image(chunks, of="replicas")
        names = [f"rank-{self._rank:05d}.{slot}" for slot in range(num_images)]
        self._images = [ImageFile(folder / f"{name}.safetensors") for name in names]
        self._replicas = [ImageFile(folder / f"{name}.replicas.safetensors") for name in names]
        self._has_memory = has_memory
        # Since when memory is short; None: all is taken.
        self._short_since: float | None = time.monotonic()
        if (short := self._take_memory()) is not None:
            if if_short == "refuse":
                raise short
            logger.warning("no snapshot is taken until there is memory for it: %s", short)

    def wants_to_skip(self, *, upload: bool) -> bool:
        """Whether the policy would leave out a save that came now: nothing waits for a snapshot that is not uploaded.

        Ranks may differ: they agree in the step. Raises SnapshotMemoryShort where it was short for too long.
        """
        if self._short_since is not None and (short := self._take_memory()) is not None:
            if time.monotonic() - self._short_since > MEMORY_SECONDS:
                raise short
            return True
        return (self._if_busy == "skip" or not upload) and not self._link.has_free_image()

    def save(self, step: int, *, upload: bool) -> None:
        """Copies the state into a free image, reports what that cost, and hands the image to the agent.

        Waits only if all images are still being uploaded. All ranks call it after the same step, without talking.
        """
        if self._short_since is not None and (short := self._take_memory()) is not None:
            raise short
        began = time.perf_counter()
        slot = self._link.wait_free_image()
        free = time.perf_counter()
        self._random_state.copy_(torch.get_rng_state())
        chunks = self._chunks()
        for image, plan in ((self._images[slot], self._plan), (self._replicas[slot], self._replica_plan)):
            write_image(plan, chunks, image.reserve(plan.size), step=step)
        stall_seconds = time.perf_counter() - began
        info = self._plan.info(step=step, path=self._images[slot].path, stall_seconds=stall_seconds)
        replicas = self._replica_plan.info(step=step, path=self._replicas[slot].path)
        cost = {"snapshot/stall_seconds": stall_seconds}
        if upload:
            cost = {"checkpoint/stall_seconds": stall_seconds, "checkpoint/wait_seconds": free - began}
        # Before the image leaves: whoever goes on from it does not take this step again.
        self._link.step(step, cost)
        self._link.image(slot, info.to_json(), replicas.to_json(), upload=upload)

    def _take_memory(self) -> SnapshotMemoryShort | None:
        """All images; what they lack otherwise."""
        try:
            if not self._has_memory():
                raise SnapshotMemoryShort("a snapshot needs shared memory, and chaos has filled it")
            for image in self._images:
                image.reserve(self._plan.size)
            for image in self._replicas:
                image.reserve(self._replica_plan.size)
        except SnapshotMemoryShort as short:
            return short
        self._short_since = None
        return None

    def restore(self, ref: CheckpointRef | HeldRef) -> int:
        """Reads a checkpoint, or what ranks of another world left in memory, in whatever layout; returns its step."""
        loaded = load_checkpoint(ref, self._chunks())
        # A rank that did not exist when it was saved keeps its fresh seed.
        if not any(name.startswith("rng/") for name in loaded.absent):
            torch.set_rng_state(self._random_state)
        what = "checkpoint" if isinstance(ref, CheckpointRef) else "snapshot in memory"
        logger.info("resumed from the %s of step %d, %.1f MB read", what, ref.step, loaded.num_bytes_read / 1e6)
        return self._restored(ref.step)

    def restore_images(self, images: Sequence[ImageInfo]) -> int:
        """Copies back what this rank's predecessor left in memory: its image and its replicas, of one step."""
        step = images[0].step
        missing = self._chunks()
        for image in images:
            missing = read_image(image, missing)
        assert not missing, f"the images of rank {self._rank} lack {missing[0].name} of {len(missing)}"
        torch.set_rng_state(self._random_state)
        logger.info("resumed from the snapshot of step %d in this node's memory", step)
        return self._restored(step)

    def read_frozen(self, base: BaseRef) -> None:
        """Reads this rank's parts of the weights that do not learn: in every generation, since nothing saves them.

        CheckpointMismatch as `begin_with`.
        """
        num_bytes = _read(base, self._engine.frozen_state(), field="model.init", until="as long as the run trains")
        logger.info("trains an adapter of the weights of %s, %.1f MB read", base.uri, num_bytes / 1e6)

    def begin_with_adapter(self, adapter: BaseRef) -> None:
        """Reads this rank's parts of the adapter that the run begins with. CheckpointMismatch as `begin_with`."""
        names = {entry.name for entry in adapter.manifest.tensors}
        chunks = [chunk for chunk in self._engine.state() if chunk.name in names]
        num_bytes = _read(adapter, chunks, field="adapter.init", until=_UNTIL_SAVED)
        logger.info("begins with the adapter of %s, %.1f MB read", adapter.uri, num_bytes / 1e6)

    def begin_with(self, base: BaseRef) -> int:
        """Reads this rank's parts of the weights that the run begins with; returns the step, 0.

        CheckpointMismatch if they are not there, or not those that the driver saw.
        """
        own = [chunk for chunk in self._engine.state() if chunk.name.startswith(MODEL_PREFIX)]
        chunks = [chunk for chunk in own if not is_adapters(chunk.name)]
        num_bytes = _read(base, chunks, field="model.init", until=_UNTIL_SAVED)
        logger.info("begins with the weights of %s, %.1f MB read", base.uri, num_bytes / 1e6)
        return self._restored(0)

    def _restored(self, step: int) -> int:
        self._engine.set_updates(self._guard.updates(step))
        return step

    def _chunks(self) -> list[Chunk]:
        name = f"rng/rank-{self._rank:05d}"
        random = Chunk(name, tuple(self._random_state.shape), (0,), self._random_state, saved_here=True)
        kept = (self._guard, self._patience)
        return [*self._engine.state(), random, *(c for each in kept for c in each.chunks(saved_here=self._rank == 0))]


_UNTIL_SAVED = "until the run has a checkpoint of its own"


def _read(base: BaseRef, chunks: Sequence[Chunk], *, field: str, until: str) -> int:
    """Fills the chunks; returns the bytes read. field: that names the place."""
    try:
        return load_checkpoint(base, chunks, dtypes="converted").num_bytes_read
    except CheckpointDamaged as error:
        # No other try would find them.
        raise CheckpointMismatch(
            f"{error}. All nodes must see the weights at {field} = {base.uri!r}, unchanged, {until}: put them at s3:// "
            "or on a shared file system"
        ) from error
