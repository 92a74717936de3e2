"""Copies of snapshots in another node's memory: a lost node's ranks start from there, and not from the store.

After each snapshot an agent sends its ranks' images to the next node of the crew; whoever takes the place of a lost
node fetches them from there. Every byte is checked against a CRC64NVME. The ranks wait for none of it: a copy whose
image its rank begins to write again is given up for the next one. Where ranks of another world go on from a snapshot,
what a node has of it, copies or not, is kept here until the new ones have taken two: they read what they need of it.
"""

import contextlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TypeVar

from raynium.checkpoint.commit import build_manifest
from raynium.checkpoint.format.image_header import check_header
from raynium.checkpoint.format.manifest import FileEntry, ImageInfo, ShardEntry, shard_key
from raynium.checkpoint.held import Place, held_key, keep_held
from raynium.config.images import COPY_SLOTS, copy_slots
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import CheckpointError
from raynium.node.copy_failures import WRITTEN_AGAIN, CopyFailures, told, why_not_kept
from raynium.node.copy_queue import CopyQueue
from raynium.node.images import Hold, NodeImages, Snapshot
from raynium.run.held_images import HeldImages
from raynium.run.protocol import Address, Said
from raynium.storage.checksum import UNIT_BYTES, FileChecksums, checksum_units, list_to_text, to_text
from raynium.storage.local_files import mapped
from raynium.storage.peers import BROKEN, CHUNK_BYTES, admit, connect, paced, receive, send

logger = logging.getLogger(__name__)

# A slot beside those of copies: what this node's own rank has left, which nothing that still comes in may touch.
ADOPTED = COPY_SLOTS
# A holder may hear of a generation a moment later than who fetches from it.
FETCH_SECONDS = 5.0
FETCH_PAUSE_SECONDS = 0.1
# Ranks of another world that begin read from all nodes at once, each over several connections.
WAITING_CONNECTIONS = 4096
# Nodes of which it is asked at a time what they hold.
ASKED_AT_ONCE = 8

T = TypeVar("T")


class CopyError(Exception):
    """A copy could not be sent or fetched."""


class _Absent(ValueError):
    """Who was asked has no such snapshot, or not yet."""


def buddies_of(
    config: Config, host: str, folder: Path, secret: bytes, images: NodeImages, tell: Callable[[Said], object]
) -> "Buddies | None":
    """See `Buddies`; None where the run makes no copies."""
    if not copy_slots(config):
        return None
    speed = config.fault.buddy_megabytes_per_second * 1e6
    return Buddies(host, folder, secret, images, bytes_per_second=speed, tell=tell)


class Buddies:
    """Of one agent: what it holds for another node, and what it sends to one. Methods from the agent's thread."""

    def __init__(
        self,
        host: str,
        folder: Path,
        secret: bytes,
        images: NodeImages,
        *,
        bytes_per_second: float,
        tell: Callable[[Said], object],
    ):
        """folder: shared memory of this agent, which ends with it. images: of this node's ranks. tell: the user."""
        self._host, self._folder, self._secret, self._images = host, folder, secret, images
        self._bytes_per_second, self._tell, self._failures = bytes_per_second, tell, CopyFailures()
        self._lock = threading.Lock()
        # Rank → its copies here, by slot.
        self._copies: dict[int, dict[int, Snapshot]] = defaultdict(dict)
        # What this generation's ranks have written snapshots of.
        self._steps: set[int] = set()
        # Rank → what was sent of it last, with the checksums that had to be made for that.
        self._sums: dict[int, tuple[Snapshot, FileChecksums]] = {}
        # Of copies that ranks of another world read.
        self._described: dict[str, ShardEntry] = {}
        self._describing = threading.Lock()
        self._coming: set[int] = set()
        # Counts generations: what comes in across the end of one is of no use.
        self._generation = 0
        self._to: Address | None = None
        self._queue = CopyQueue()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        # Without its key: whoever connects and says nothing would hold up all others.
        self._listener = Listener((host, 0), backlog=WAITING_CONNECTIONS)
        self.port: int = self._listener.address[1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        for name, work in (("buddy-server", self._serve), ("buddy-sender", self._send_all)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._listener.close()

    def begin_generation(self, keep: HeldImages | None, to: Address | None, *, adopts: bool = False) -> None:
        """No rank runs. keep: what the ranks start from; all else is of a past that did not happen. to: who holds our
        copies. adopts: this node's own images of `keep` become copies, since its ranks are another world's from now on,
        and write files of the same names: to be called before the images begin theirs.
        """
        with self._changed:
            self._to, self._generation = to, self._generation + 1
            self._queue.clear()
            self._coming.clear()
            self._steps.clear()
            self._described.clear()
            self._drop(lambda each: keep is None or not _is(each, keep))
            own = self._images.snapshots(keep) if adopts and keep is not None else {}
            for rank, snapshot in own.items():
                if (problem := _damage(snapshot.info)) is not None:
                    # Checksums are made of what is adopted: then nothing would show it any more.
                    logger.warning("%s", problem)
                    continue
                infos = []
                # An upload goes on: its file is open.
                for info, path in zip((snapshot.info, snapshot.replicas), self._paths(rank, ADOPTED), strict=True):
                    infos.append(info.model_copy(update={"path": str(Path(info.path).rename(path))}))
                sent, sums = self._sums.get(rank, (None, None))
                sums = sums if sent is snapshot else None
                self._copies[rank][ADOPTED] = replace(snapshot, info=infos[0], replicas=infos[1], sums=sums)
            self._sums.clear()

    def held(self) -> tuple[HeldImages, ...]:
        """What ranks of another node could start from, once it is fetched."""
        found: dict[tuple[str, int, World], list[int]] = defaultdict(list)
        with self._lock:
            for rank, copies in self._copies.items():
                for each in copies.values():
                    found[each.generation_id, each.info.step, each.world].append(rank)
        return tuple(HeldImages(name, step, ranks, world) for (name, step, world), ranks in found.items())

    def offer(self, rank: int, slot: int, snapshot: Snapshot) -> None:
        """This rank's newest snapshot. An older one that still waits is sent only to make its step whole."""
        with self._changed:
            self._queue.offer(rank, self._images.hold(rank, slot, snapshot))
            self._changed.notify_all()
            self._steps.add(snapshot.info.step)
            if len(self._steps) == 2:
                # Every rank has the one before, which is newer than what those of another world have left.
                self._drop(lambda each: each.world != snapshot.world)

    def fetch(self, rank: int, wanted: HeldImages, holder: Address) -> None:
        """Makes the copy that `holder` has an image of this node's. CopyError if that is not to be had."""
        asked = {"do": "get", "rank": rank, "generation_id": wanted.generation_id, "step": wanted.step}
        paths = [self._folder / f"rank-{rank:05d}.0{kind}.safetensors" for kind in ("", ".replicas")]

        def get() -> Snapshot:
            with contextlib.closing(connect(holder, self._secret)) as connection:
                send(connection, asked)
                return _receive(connection, _not_absent(receive(connection)), paths)

        self._images.complete(rank, 0, _tried(get, wanted, holder), upload=False)

    def gather(self, held: HeldImages, holders: Mapping[Address, Sequence[int]]) -> Path:
        """Writes down for this node's ranks, which are of another world, what lies where; returns the file.

        holders: who has which ranks' images. CopyError where something is missing, or is not one whole snapshot.
        """
        own, ranks_of, places = (self._host, self.port), defaultdict[Address, list[int]](list), dict[int, Place]()
        for holder, ranks in holders.items():
            for rank in ranks:
                ranks_of[own if self._has(rank, held) else holder].append(rank)
                places[rank] = holder

        def ask(holder: Address) -> list[ShardEntry]:
            if holder == own:
                return [self._entry(rank, self._copy(rank, held)) for rank in ranks_of[holder]]
            with contextlib.closing(connect(holder, self._secret)) as connection:
                asked = {"generation_id": held.generation_id, "step": held.step, "ranks": ranks_of[holder]}
                send(connection, {"do": "describe"} | asked)
                _not_absent(receive(connection))
                return [ShardEntry.from_json(connection.recv_bytes()) for _ in ranks_of[holder]]

        try:
            with ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="buddy-asks") as pool:
                found = list(pool.map(lambda holder: _tried(lambda: ask(holder), held, holder), ranks_of))
            places |= {rank: self._copy(rank, held).info.path for rank in ranks_of.get(own, ())}
            manifest = build_manifest(
                step=held.step,
                generation=held.generation_id,
                entries=[entry for entries in found for entry in entries],
                world_size=held.world.size,
                parent_step=None,
                layout=held.world.degrees(),
                state={},
                metrics={},
                timing=None,
            )
            keep_held(path := self._folder / "held.json", manifest, places, self._secret)
        except (CheckpointError, OSError) as error:
            raise CopyError(f"the snapshot of step {held.step} in memory is of no use: {error}") from error
        return path

    # ---- sending -----------------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._queue and self._to is not None))
                if self._closed:
                    return
                (rank, hold), to = self._queue.take(), self._to
            assert to is not None
            try:
                self._send_one(rank, hold, to)
            except (*BROKEN, CopyError) as error:
                # The next snapshot is sent again, perhaps to another node; the store has the checkpoints.
                logger.info("rank %d's snapshot of step %d was not copied: %s", rank, hold.step, error)
                if not hold.is_there():
                    with self._lock:
                        self._queue.give_up(hold.step)
                if self._failures.failed(rank):
                    self._tell(Said(told(rank, self._host, to[0], str(error) or type(error).__name__), "node", to[0]))
            else:
                self._failures.copied(rank)
            finally:
                hold.release()

    def _send_one(self, rank: int, hold: Hold, to: Address) -> None:
        snapshot = hold.snapshot
        if not hold.is_there():
            raise CopyError(WRITTEN_AGAIN)
        with contextlib.closing(connect(to, self._secret)) as connection:
            connection.send_bytes(json.dumps({"do": "put", "rank": rank} | _header(snapshot)).encode())
            sums: list[FileChecksums] = []
            try:
                for data in paced(_chunks(snapshot, sums), self._bytes_per_second):
                    connection.send_bytes(data)
                if not hold.is_there():
                    raise CopyError(WRITTEN_AGAIN)
                self._sums[rank] = snapshot, sums[0]
                connection.send_bytes(b"whole")
            except OSError:
                # Who finds no room hears no more, and has said so.
                if not connection.poll():
                    raise
            if (answer := connection.recv_bytes()) != b"kept":
                raise CopyError(answer.decode(errors="replace"))

    # ---- holding -----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                # Of one that has gone again, or of no free descriptor.
                time.sleep(FETCH_PAUSE_SECONDS)
                continue
            threading.Thread(target=self._answer, args=(connection,), name="buddy", daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with contextlib.closing(connection), contextlib.suppress(OSError, EOFError):
            try:
                admit(connection, self._secret)
            except AuthenticationError:
                logger.warning("somebody who does not know the run's secret has asked for snapshots")
                return
            asked = receive(connection)
            match asked["do"]:
                case "get":
                    self._give(connection, asked)
                case "describe":
                    self._describe(connection, asked)
                case "read":
                    self._read(connection, asked)
                case "put":
                    self._keep(connection, asked)
                case _:
                    logger.warning("another agent asked for %r, which this one does not know", asked["do"])

    def _give(self, connection: Connection, asked: dict[str, object]) -> None:
        try:
            found = self._copy(int(str(asked["rank"])), asked)
        except _Absent as absent:
            return send(connection, {"absent": str(absent)})
        send(connection, _header(found))
        for data in _chunks(found, []):
            connection.send_bytes(data)

    def _describe(self, connection: Connection, asked: dict[str, object]) -> None:
        ranks = asked["ranks"]
        assert isinstance(ranks, list)
        try:
            found = {rank: self._copy(rank, asked) for rank in ranks}
        except _Absent as absent:
            return send(connection, {"absent": str(absent)})
        send(connection, {"ranks": len(ranks)})
        for rank, snapshot in found.items():
            connection.send_bytes(self._entry(rank, snapshot).to_json().encode())

    def _read(self, connection: Connection, asked: dict[str, object]) -> None:
        with self._lock:
            copies = [(rank, each) for rank, slots in self._copies.items() for each in slots.values()]
        found = [each for rank, each in copies if held_key(each.generation_id, each.info.step, rank) == asked["key"]]
        if not found:
            return send(connection, {"absent": "it is not held any more"})
        begin, end = int(str(asked["begin"])), int(str(asked["end"]))
        send(connection, {"size": found[0].info.size})
        with Path(found[0].info.path).open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end and (data := file.read(min(CHUNK_BYTES, end - begin))):
                connection.send_bytes(data)
                begin += len(data)

    def _has(self, rank: int, wanted: HeldImages) -> bool:
        with self._lock:
            return any(_is(each, wanted) for each in self._copies.get(rank, {}).values())

    def _copy(self, rank: int, wanted: HeldImages | Mapping[str, object]) -> Snapshot:
        if isinstance(wanted, HeldImages):
            wanted = {"generation_id": wanted.generation_id, "step": wanted.step}
        key = wanted["generation_id"], wanted["step"]
        with self._lock:
            for each in self._copies.get(rank, {}).values():
                if (each.generation_id, each.info.step) == key:
                    return each
        raise _Absent("it has no such copy")

    def _entry(self, rank: int, snapshot: Snapshot) -> ShardEntry:
        """What the store would know of it: computed once, whoever asks."""
        info = snapshot.info
        with self._describing:
            if (known := self._described.get(info.path)) is None:
                if (sums := snapshot.sums) is None:
                    # Of the newest image that was not sent to a buddy before the ranks died.
                    with Path(info.path).open("rb") as file:
                        sums = checksum_units(mapped(file, info.size), UNIT_BYTES)
                entry = FileEntry(
                    key=shard_key(snapshot.generation_id, rank),
                    size=sums.size,
                    crc64nvme=to_text(sums.crc),
                    unit_bytes=UNIT_BYTES,
                    unit_crc64nvme=list_to_text(sums.unit_crcs),
                )
                known = ShardEntry(step=info.step, file=entry, tensors=info.tensors)
                self._described[info.path] = known
            return known

    def _keep(self, connection: Connection, asked: dict[str, object]) -> None:
        rank = int(str(asked["rank"]))
        with self._lock:
            copies = self._copies[rank]
            if rank in self._coming:
                connection.send_bytes(b"another copy of that rank comes in")
                return
            self._coming.add(rank)
            slot = min(range(COPY_SLOTS), key=lambda each: copies[each].info.step if each in copies else -1)
            copies.pop(slot, None)
            generation = self._generation
        paths = self._paths(rank, slot)
        try:
            snapshot = _receive(connection, asked, paths)
            if connection.recv_bytes() != b"whole":
                raise CopyError("it was given up")
            with self._lock:
                if generation != self._generation:
                    raise CopyError("its generation is over")
                copies[slot] = snapshot
            connection.send_bytes(b"kept")
        except (CopyError, ValueError, OSError, EOFError) as error:
            # Half a copy takes memory that the ranks of this node may need.
            with self._lock:
                if generation == self._generation:
                    for path in paths:
                        path.unlink(missing_ok=True)
            logger.info("a copy of rank %d's snapshot is not kept: %s", rank, error or "its sender has gone")
            connection.send_bytes(why_not_kept(error).encode())
        finally:
            with self._lock:
                if generation == self._generation:
                    self._coming.discard(rank)

    def _drop(self, useless: Callable[[Snapshot], bool]) -> None:
        """Called with the lock held."""
        for rank, copies in self._copies.items():
            for slot in [slot for slot, each in copies.items() if useless(each)]:
                del copies[slot]
                for path in self._paths(rank, slot):
                    path.unlink(missing_ok=True)

    def _paths(self, rank: int, slot: int) -> list[Path]:
        return [self._folder / f"copy-{rank:05d}.{slot}{kind}.safetensors" for kind in ("", ".replicas")]


# ---- on the wire -----------------------------------------------------------------------------------------------------


def _tried(ask: Callable[[], T], wanted: HeldImages, holder: Address) -> T:
    """Again for a while: who is asked may hear of a generation a moment later than who asks. CopyError."""
    deadline = time.monotonic() + FETCH_SECONDS
    while True:
        try:
            return ask()
        except BROKEN as error:
            if time.monotonic() >= deadline:
                problem = str(error) or type(error).__name__
                raise CopyError(
                    f"the snapshot of step {wanted.step} could not be had from {holder[0]}: {problem}"
                ) from error
        time.sleep(FETCH_PAUSE_SECONDS)


def _not_absent(answer: dict[str, object]) -> dict[str, object]:
    if "absent" in answer:
        raise _Absent(answer["absent"])
    return answer


def _header(snapshot: Snapshot) -> dict[str, object]:
    files = (snapshot.info, snapshot.replicas)
    return {
        "generation_id": snapshot.generation_id,
        "world": snapshot.world.to_json(),
        "parent_step": snapshot.parent_step,
        "files": [each.to_json() for each in files],
    }


def _chunks(snapshot: Snapshot, sums: list[FileChecksums]) -> Iterator[bytes]:
    """The bytes of both files, each followed by the checksum of all. sums: gets those of each file's units."""
    for info in (snapshot.info, snapshot.replicas):
        crcs: list[int] = []
        with Path(info.path).open("rb", buffering=0) as file:
            for length in _lengths(info.size):
                data = file.read(length)
                if len(data) != length:
                    raise CopyError(f"{info.path} is shorter than its {info.size} bytes")
                crcs += checksum_units(data, UNIT_BYTES).unit_crcs
                yield data
        sums.append(FileChecksums(info.size, UNIT_BYTES, crcs))
        yield sums[-1].crc.to_bytes(8, "little")


def _receive(connection: Connection, header: dict[str, object], paths: Sequence[Path]) -> Snapshot:
    """Writes the files; CopyError if they are not what was sent. Reads no more than the header says."""
    texts = header["files"]
    assert isinstance(texts, list)
    infos, sums = [ImageInfo.from_json(str(text)) for text in texts], list[FileChecksums]()
    for info, path in zip(infos, paths, strict=True):
        crcs: list[int] = []
        # Whoever still writes the file of before, from a sender that is silent, writes another.
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            for length in _lengths(info.size):
                data = connection.recv_bytes(length)
                crcs += checksum_units(data, UNIT_BYTES).unit_crcs
                file.write(data)
            size = file.tell()
        if size == info.size:
            sums.append(FileChecksums(size, UNIT_BYTES, crcs))
        if size != info.size or connection.recv_bytes(8) != sums[-1].crc.to_bytes(8, "little"):
            raise CopyError(f"the bytes of {path.name} are not those that were sent")
    world, parent = header["world"], header["parent_step"]
    assert isinstance(world, dict) and (parent is None or isinstance(parent, int))
    info, replicas = (info.model_copy(update={"path": str(path)}) for info, path in zip(infos, paths, strict=True))
    return Snapshot(str(header["generation_id"]), World.from_json(world), parent, info, replicas, sums=sums[0])


def _lengths(size: int) -> Iterator[int]:
    """Of the messages that a file is sent in."""
    return (min(CHUNK_BYTES, size - begin) for begin in range(0, size, CHUNK_BYTES))


def _damage(info: ImageInfo) -> Exception | None:
    """Why an image of ranks that have ended is not that snapshot, if it is not: one that died may have been writing."""
    try:
        with Path(info.path).open("rb") as file:
            check_header(info, mapped(file, info.size))
    except (CheckpointError, OSError, ValueError) as error:
        return error
    return None


def _is(snapshot: Snapshot, wanted: HeldImages) -> bool:
    return (snapshot.generation_id, snapshot.info.step) == (wanted.generation_id, wanted.step)
