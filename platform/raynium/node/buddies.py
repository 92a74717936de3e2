"""Copies of snapshots in another node's memory: a lost node's ranks start from there, and not from the store.

After each snapshot an agent sends its ranks' images to the next node of the crew; whoever takes the place of a lost
node fetches them from there. Both ends prove to know the run's secret (an HMAC challenge of multiprocessing's), and
every byte is checked against a CRC64NVME. No pickle is read. As the collectives beside them, the bytes travel in clear.
The ranks wait for none of it: a copy whose image its rank begins to write again is given up for the next one.
"""

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import cast

from raynium.checkpoint.format.manifest import ImageInfo
from raynium.config.world import World
from raynium.node.images import NodeImages, Snapshot
from raynium.run.protocol import Address, HeldImages
from raynium.storage.checksum import checksum

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20
# Of one rank: the newest that is complete, and the one that comes in.
SLOTS = 2
# A holder may hear of a generation a moment later than who fetches from it.
FETCH_SECONDS = 5.0
FETCH_PAUSE_SECONDS = 0.1
# A machine that was lost in the middle of a copy closes no connection.
SILENCE_SECONDS = 30


class CopyError(Exception):
    """A copy could not be sent or fetched."""


class Buddies:
    """Of one agent: what it holds for another node, and what it sends to one. Methods from the agent's thread."""

    def __init__(self, host: str, folder: Path, secret: bytes, images: NodeImages, *, bytes_per_second: float):
        """folder: shared memory of this agent, which ends with it. images: of this node's ranks."""
        self._folder, self._secret, self._images = folder, secret, images
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        # Rank → its copies here, by slot.
        self._copies: dict[int, dict[int, Snapshot]] = defaultdict(dict)
        self._coming: set[int] = set()
        # Counts generations: what comes in across the end of one is of no use.
        self._generation = 0
        self._to: Address | None = None
        # Rank → its newest snapshot, which is to be sent.
        self._waiting: dict[int, tuple[int, Snapshot]] = {}
        self._changed = threading.Condition(self._lock)
        self._closed = False
        # Without its key: whoever connects and says nothing would hold up all others.
        self._listener = Listener((host, 0))
        self.port: int = self._listener.address[1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        for name, work in (("buddy-server", self._serve), ("buddy-sender", self._send_all)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._listener.close()

    def begin_generation(self, keep: HeldImages | None, to: Address | None) -> None:
        """keep: what the ranks start from; all else is of a past that did not happen. to: who holds our copies."""
        with self._changed:
            self._to, self._generation = to, self._generation + 1
            self._waiting.clear()
            self._coming.clear()
            for rank, copies in self._copies.items():
                for slot in [slot for slot, each in copies.items() if keep is None or not _is(each, keep)]:
                    del copies[slot]
                    for path in self._paths(rank, slot):
                        path.unlink(missing_ok=True)

    def held(self) -> tuple[HeldImages, ...]:
        """What ranks of another node could start from, once it is fetched."""
        found: dict[tuple[str, int, World], list[int]] = defaultdict(list)
        with self._lock:
            for rank, copies in self._copies.items():
                for each in copies.values():
                    found[each.generation_id, each.info.step, each.world].append(rank)
        return tuple(HeldImages(name, step, tuple(ranks), world) for (name, step, world), ranks in found.items())

    def offer(self, rank: int, slot: int, snapshot: Snapshot) -> None:
        """This rank's newest snapshot. An older one that still waits is not sent any more."""
        with self._changed:
            self._waiting[rank] = slot, snapshot
            self._changed.notify_all()

    def fetch(self, rank: int, wanted: HeldImages, holder: Address) -> None:
        """Makes the copy that `holder` has an image of this node's. CopyError if that is not to be had."""
        deadline = time.monotonic() + FETCH_SECONDS
        asked = {"rank": rank, "generation_id": wanted.generation_id, "step": wanted.step}
        paths = [self._folder / f"rank-{rank:05d}.0{kind}.safetensors" for kind in ("", ".replicas")]
        while True:
            try:
                with contextlib.closing(self._connect(holder)) as connection:
                    connection.send_bytes(json.dumps(asked | {"do": "get"}).encode())
                    answer = json.loads(connection.recv_bytes())
                    if "absent" not in answer:
                        self._images.complete(rank, 0, _receive(connection, answer, paths), upload=False)
                        return
                    problem = answer["absent"]
            except (OSError, EOFError, ValueError, AuthenticationError) as error:
                problem = str(error) or type(error).__name__
            if time.monotonic() >= deadline:
                raise CopyError(f"the snapshot of step {wanted.step} could not be had from {holder[0]}: {problem}")
            time.sleep(FETCH_PAUSE_SECONDS)

    def _connect(self, to: Address) -> Connection:
        connection = cast(Connection, Client(to))
        _limit(connection)
        answer_challenge(connection, self._secret)
        deliver_challenge(connection, self._secret)
        return connection

    # ---- sending -----------------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and self._to is not None))
                if self._closed:
                    return
                rank = next(iter(self._waiting))
                (slot, snapshot), to = self._waiting.pop(rank), self._to
            assert to is not None
            try:
                self._send_one(rank, slot, snapshot, to)
            except (OSError, EOFError, ValueError, AuthenticationError, CopyError) as error:
                # The next snapshot is sent again, perhaps to another node; the store has the checkpoints.
                logger.info("rank %d's snapshot of step %d was not copied: %s", rank, snapshot.info.step, error)

    def _send_one(self, rank: int, slot: int, snapshot: Snapshot, to: Address) -> None:
        with (
            self._images.copying(rank, slot, snapshot) as still_there,
            contextlib.closing(self._connect(to)) as connection,
        ):
            connection.send_bytes(json.dumps({"do": "put", "rank": rank} | _header(snapshot)).encode())
            for data in _paced(_chunks(snapshot), self._bytes_per_second):
                connection.send_bytes(data)
            if not still_there():
                raise CopyError("its rank writes that image again")
            connection.send_bytes(b"whole")
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
            _limit(connection)
            try:
                deliver_challenge(connection, self._secret)
                answer_challenge(connection, self._secret)
            except AuthenticationError:
                logger.warning("somebody who does not know the run's secret has asked for snapshots")
                return
            asked = json.loads(connection.recv_bytes())
            if asked["do"] == "get":
                self._give(connection, asked)
            else:
                self._keep(connection, asked)

    def _give(self, connection: Connection, asked: dict[str, object]) -> None:
        with self._lock:
            found = [
                each
                for each in self._copies.get(int(str(asked["rank"])), {}).values()
                if (each.generation_id, each.info.step) == (asked["generation_id"], asked["step"])
            ]
        if not found:
            connection.send_bytes(b'{"absent": "it has no such copy"}')
            return
        connection.send_bytes(json.dumps(_header(found[0])).encode())
        for data in _chunks(found[0]):
            connection.send_bytes(data)

    def _keep(self, connection: Connection, asked: dict[str, object]) -> None:
        rank = int(str(asked["rank"]))
        with self._lock:
            copies = self._copies[rank]
            if rank in self._coming:
                connection.send_bytes(b"another copy of that rank comes in")
                return
            self._coming.add(rank)
            slot = min(range(SLOTS), key=lambda each: copies[each].info.step if each in copies else -1)
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
            connection.send_bytes(str(error).encode())
        finally:
            with self._lock:
                if generation == self._generation:
                    self._coming.discard(rank)

    def _paths(self, rank: int, slot: int) -> list[Path]:
        return [self._folder / f"copy-{rank:05d}.{slot}{kind}.safetensors" for kind in ("", ".replicas")]


# ---- on the wire -----------------------------------------------------------------------------------------------------


def _limit(connection: Connection) -> None:
    """From now on a read or write of it that takes longer fails with an OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SILENCE_SECONDS, 0))


def _header(snapshot: Snapshot) -> dict[str, object]:
    files = (snapshot.info, snapshot.replicas)
    return {
        "generation_id": snapshot.generation_id,
        "world": snapshot.world.to_json(),
        "parent_step": snapshot.parent_step,
        "files": [each.to_json() for each in files],
    }


def _chunks(snapshot: Snapshot) -> Iterator[bytes]:
    """The bytes of both files, each followed by their checksum."""
    for info in (snapshot.info, snapshot.replicas):
        crc, left = 0, info.size
        with Path(info.path).open("rb", buffering=0) as file:
            while left:
                data = file.read(min(CHUNK_BYTES, left))
                if not data:
                    raise CopyError(f"{info.path} is shorter than its {info.size} bytes")
                crc, left = checksum(data, crc), left - len(data)
                yield data
        yield crc.to_bytes(8, "little")


def _receive(connection: Connection, header: dict[str, object], paths: Sequence[Path]) -> Snapshot:
    """Writes the files; CopyError if they are not what was sent. Reads no more than the header says."""
    texts = header["files"]
    assert isinstance(texts, list)
    infos = [ImageInfo.from_json(str(text)) for text in texts]
    found = []
    for info, path in zip(infos, paths, strict=True):
        crc, left = 0, info.size
        # Whoever still writes the file of before, from a sender that is silent, writes another.
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            while left:
                data = connection.recv_bytes(min(CHUNK_BYTES, left))
                crc, left = checksum(data, crc), left - len(data)
                file.write(data)
        if connection.recv_bytes(8) != crc.to_bytes(8, "little"):
            raise CopyError(f"the bytes of {path.name} are not those that were sent")
        found.append(info.model_copy(update={"path": str(path)}))
    world, parent = header["world"], header["parent_step"]
    assert isinstance(world, dict) and (parent is None or isinstance(parent, int))
    return Snapshot(str(header["generation_id"]), World.from_json(world), parent, *found)


def _paced(chunks: Iterator[bytes], bytes_per_second: float) -> Iterator[bytes]:
    began, sent = time.monotonic(), 0
    for data in chunks:
        yield data
        sent += len(data)
        time.sleep(max(0.0, began + sent / bytes_per_second - time.monotonic()))


def _is(snapshot: Snapshot, wanted: HeldImages) -> bool:
    return (snapshot.generation_id, snapshot.info.step) == (wanted.generation_id, wanted.step)
