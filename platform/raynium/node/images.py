"""Snapshot images: memory of the node that outlives a rank and ends with its agent, and which of them holds what."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from raynium.checkpoint.format.manifest import ImageInfo, ShardEntry
from raynium.config.images import IMAGE_SLOTS
from raynium.config.world import World
from raynium.run.held_images import HeldImages
from raynium.storage.checksum import FileChecksums


@dataclass(frozen=True)
class Snapshot:
    """One rank's state of one step, complete in this node's memory. parent_step: that its generation started from.

    sums: of `info`'s file, where they were made for a copy.
    """

    generation_id: str
    world: World
    parent_step: int | None
    # The file that is uploaded; and what the rank holds and others save, which a restart from memory needs.
    info: ImageInfo
    replicas: ImageInfo
    taken: float = field(default_factory=time.monotonic)
    sums: FileChecksums | None = None


@dataclass(frozen=True)
class FailedUpload:
    """A rank's newest snapshot, which the store did not take."""

    rank: int
    slot: "Slot"
    snapshot: Snapshot
    failure: str


@dataclass(frozen=True)
class SavedShard:
    """A rank's snapshot, which the store has."""

    rank: int
    snapshot: Snapshot
    entry: ShardEntry
    upload_seconds: float


@dataclass(eq=False)
class Slot:
    """One image. uploading: id of the generation for which an upload runs. offered: its rank may write it: the header
    tells. copying: to another node, or it is to be; no rank waits for that.
    """

    snapshot: Snapshot | None = None
    uploading: str | None = None
    saved: SavedShard | None = None
    failure: str | None = None
    offered: bool = False
    copying: bool = False


@dataclass(frozen=True, eq=False)
class Hold:
    """An image that waits to be copied to another node, or is."""

    slot: Slot
    snapshot: Snapshot

    @property
    def step(self) -> int:
        return self.snapshot.info.step

    def is_there(self) -> bool:
        """Whether the image is still this snapshot's."""
        return self.slot.snapshot is self.snapshot and not self.slot.offered

    def release(self) -> None:
        self.slot.copying = False


class NodeImages:
    """Which images of a node's ranks hold what, across generations. Safe to use from several threads.

    An image may be written once it is uploaded and its rank has a newer one: so a rank always has one to start from.
    """

    def __init__(self, num_images: int = IMAGE_SLOTS):
        self._num_images = num_images
        self._slots: dict[int, list[Slot]] = {}
        self._newest: dict[int, Slot] = {}
        # Of images that later generations do not know, whose uploads still run.
        self._left: set[Slot] = set()
        self._lock = threading.Lock()

    def start_generation(self, ranks: Iterable[int], keep: HeldImages | None) -> list[tuple[int, int]]:
        """No rank runs. All but `keep`, which the next ones start from, is of no use any more.

        ranks: that this node runs from now on. Returns (rank, number) of images whose files nobody may have again:
        of ranks that it runs no more, and those that are uploaded where a rank begins with none of them: whoever
        writes, resizes or fetches a file of that name is to make a new one.
        """
        ranks, gone = set(ranks), list[tuple[int, int]]()
        with self._lock:
            self._newest.clear()
            for rank, slots in list(self._slots.items()):
                goes_on = keep is not None and rank in ranks and any(_holds(slot, keep) for slot in slots)
                left = {number for number, slot in enumerate(slots) if slot.uploading and not goes_on}
                self._left |= {slots[number] for number in left}
                if rank in ranks:
                    self._slots[rank] = [Slot() if number in left else slot for number, slot in enumerate(slots)]
                else:
                    left = set(range(len(slots)))
                    del self._slots[rank]
                gone += [(rank, number) for number in sorted(left)]
            for rank in ranks:
                self._slots.setdefault(rank, [Slot() for _ in range(self._num_images)])
            for rank, slots in self._slots.items():
                for slot in slots:
                    slot.offered = False
                    if keep is not None and rank in ranks and _holds(slot, keep):
                        self._newest[rank] = slot
                    else:
                        slot.snapshot = None
            return gone

    def complete(self, rank: int, slot: int, snapshot: Snapshot, *, upload: bool) -> Slot:
        """The rank has written this image; upload: which begins now, and whose end is told of what this returns."""
        with self._lock:
            found = Slot(snapshot, uploading=snapshot.generation_id if upload else None)
            self._slots[rank][slot] = self._newest[rank] = found
            return found

    def hold(self, rank: int, slot: int, snapshot: Snapshot) -> Hold:
        """Until it is released the rank writes this image only if it has no other."""
        with self._lock:
            found = self._slots[rank][slot] if rank in self._slots else Slot()
            found.copying = True
            return Hold(found, snapshot)

    def uploaded(self, slot: Slot, *, saved: SavedShard | None = None, failure: str | None = None) -> None:
        """The upload has ended: what the store has now, or why it has not."""
        with self._lock:
            slot.uploading, slot.saved, slot.failure = None, saved, failure
            self._left.discard(slot)

    def uploading(self) -> tuple[str, ...]:
        """Ids of the generations for which uploads run, also of those that are over."""
        with self._lock:
            slots = (*self._left, *(slot for slots in self._slots.values() for slot in slots))
            return tuple({slot.uploading for slot in slots if slot.uploading})

    def saved(self) -> list[SavedShard]:
        """Of each rank's newest snapshot, if it is in the store."""
        with self._lock:
            return [slot.saved for slot in self._newest.values() if slot.saved is not None]

    def failed(self) -> list[FailedUpload]:
        """The ranks whose newest snapshot is in this memory only. No upload runs."""
        with self._lock:
            return [
                FailedUpload(rank, slot, slot.snapshot, slot.failure)
                for rank, slots in self._slots.items()
                for slot in slots
                if slot is self._newest.get(rank) and slot.snapshot is not None and slot.failure is not None
            ]

    def take_offers(self) -> list[tuple[int, int]]:
        """(rank, slot) of each image that may be written from now on; each is returned once.

        The oldest first, and written in this order. A rank that dies may have written two of which nothing was heard,
        and no other is further than that: with three images all have one of the same step.
        """
        offers: list[tuple[int, int]] = []
        with self._lock:
            for rank, slots in self._slots.items():
                newest = self._newest.get(rank)
                free = [
                    number
                    for number in sorted(range(len(slots)), key=lambda number: _step(slots[number]))
                    if not (slot := slots[number]).uploading and not slot.offered and slot is not newest
                ]
                unhurried = [number for number in free if not slots[number].copying]
                if not unhurried and any(slot.offered for slot in slots):
                    continue
                for number in unhurried or free[:1]:
                    slots[number].offered = True
                    offers.append((rank, number))
        return offers

    def held(self) -> tuple[HeldImages, ...]:
        """What the ranks of this node could start from."""
        found: dict[tuple[str, int, World], list[int]] = defaultdict(list)
        with self._lock:
            for rank, slots in self._slots.items():
                for slot in slots:
                    if slot.snapshot is not None:
                        of = slot.snapshot
                        found[of.generation_id, of.info.step, of.world].append(rank)
        return tuple(HeldImages(name, step, ranks, world) for (name, step, world), ranks in found.items())

    def snapshots(self, wanted: HeldImages) -> dict[int, Snapshot]:
        """Rank → its own of these."""
        with self._lock:
            return {
                rank: slot.snapshot
                for rank, slots in self._slots.items()
                for slot in slots
                if slot.snapshot is not None and _holds(slot, wanted)
            }

    def find(self, wanted: HeldImages) -> dict[int, list[str]]:
        """Rank → its image and replicas as JSON, for `RankPlan.resume_images`."""
        found = self.snapshots(wanted)
        return {rank: [each.info.to_json(), each.replicas.to_json()] for rank, each in found.items()}


def image_files(folder: Path, rank: int, number: int) -> list[Path]:
    """Of one of a rank's images in there; see `rank/snapshots.py`."""
    return list(folder.glob(f"rank-{rank:05d}.{number}.*"))


def _step(slot: Slot) -> int:
    return -1 if slot.snapshot is None else slot.snapshot.info.step


def _holds(slot: Slot, wanted: HeldImages) -> bool:
    found = slot.snapshot
    return found is not None and (found.generation_id, found.info.step) == (wanted.generation_id, wanted.step)
