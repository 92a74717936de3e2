"""Ranks of another world begin with a snapshot in the nodes' memory: real files, sockets and loaders, no ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import commit, random_tensor, rows_of, same_bits
from waiting import wait_for

from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.held import find_held, held_key
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.config.world import World
from raynium.errors import CheckpointDamaged, StoreError
from raynium.node import buddies
from raynium.node.buddies import Buddies, CopyError
from raynium.node.images import NodeImages, Snapshot
from raynium.run.held_images import HeldImages
from raynium.run.protocol import Address, AgentInfo
from raynium.run.recovery import newest_of_other_worlds
from raynium.storage.backend import KeyMissing
from raynium.storage.peers import PeerFiles
from raynium.storage.store import Store

HOST, SECRET, STEP = "127.0.0.1", b"only the run's agents know it", 7


def world(nodes: int) -> World:
    return World(nodes=nodes, ranks_per_node=2, tensor=1, pipeline=1, num_micro_batches=12 // nodes)


@dataclass(frozen=True)
class Node:
    """One agent's memory, without the agent."""

    folder: Path
    images: NodeImages
    buddies: Buddies

    def begins(self, ranks: Sequence[int], *, to: "Node | None" = None, keep: HeldImages | None = None) -> None:
        """A generation, as its agent would. keep: another world's."""
        address = None if to is None else (HOST, to.buddies.port)
        self.buddies.begin_generation(keep, address, adopts=keep is not None)
        self.images.start_generation(ranks, None)

    def writes(self, rank: int, chunks: Sequence[Chunk], of: World, *, step: int = STEP, slot: int = 0) -> Snapshot:
        """As that rank would, and its agent would hear of it."""
        infos = []
        for kind in ("", ".replicas"):
            plan = plan_image(chunks, of="replicas" if kind else "saved")
            with ImageFile(self.folder / f"rank-{rank:05d}.{slot}{kind}.safetensors") as image:
                write_image(plan, chunks, image.reserve(plan.size), step=step)
            infos.append(plan.info(step=step, path=image.path))
        snapshot = Snapshot("g1", of, None, *infos)
        self.images.take_offers()
        self.images.complete(rank, slot, snapshot, upload=False)
        self.buddies.offer(rank, slot, snapshot)
        return snapshot

    def info(self) -> AgentInfo:
        images, copies = self.images.held(), self.buddies.held()
        return AgentInfo("a", 0, 3, HOST, 29500, pid=1, buddy_port=self.buddies.port, images=images, copies=copies)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    made: list[Node] = []

    def make(name: str) -> Node:
        (tmp_path / name).mkdir()
        images = NodeImages()
        made.append(
            Node(
                tmp_path / name,
                images,
                Buddies(HOST, tmp_path / name, SECRET, images, bytes_per_second=1e12, tell=pytest.fail),
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.buddies.close()


def state() -> dict[str, torch.Tensor]:
    """Of more than one unit a rank, in shares that no two worlds cut alike; and what only rank 0 saves."""
    return {
        "model/embedding.weight": random_tensor("float32", (1009, 256), 1),
        "optimizer/embedding.weight.exp_avg": random_tensor("float32", (1009, 256), 2),
        "model/norm.weight": random_tensor("bfloat16", (77,), 3),
    }


def chunks_of(tensors: dict[str, torch.Tensor], rank: int, of: World) -> list[Chunk]:
    random = torch.full((8,), rank, dtype=torch.uint8)
    guard = torch.tensor([3, 5], dtype=torch.int64)
    return [
        *rows_of(tensors, rank, of.size),
        Chunk(f"rng/rank-{rank:05d}", (8,), (0,), random, saved_here=True),
        Chunk("guard/left-out", (2,), (0,), guard, saved_here=rank == 0),
    ]


def loaded(ref: object, rank: int, of: World) -> list[tuple[Chunk, bool]]:
    """A rank's state of that world, loaded; and whether it was there."""
    empty = {name: torch.zeros_like(each) for name, each in state().items()}
    chunks = [
        Chunk(each.name, each.global_shape, each.offsets, torch.zeros_like(each.tensor), each.saved_here)
        for each in chunks_of(empty, rank, of)
    ]
    absent = load_checkpoint(ref, chunks).absent  # pyright: ignore[reportArgumentType]
    return [(each, each.name in absent) for each in chunks]


@dataclass(frozen=True)
class Held:
    """Three nodes have taken a snapshot, and sent it to each other; the store has it as a checkpoint too."""

    nodes: list[Node]
    checkpoint: CheckpointRef
    images: HeldImages


@pytest.fixture
def held(node: Callable[[str], Node], tmp_path: Path) -> Held:
    tensors, of = state(), world(3)
    nodes = [node(f"node-{number}") for number in range(3)]
    for number, each in enumerate(nodes):
        each.begins(of.ranks_of(number), to=nodes[(number + 1) % 3])
    store, entries = Store(tmp_path / "run"), []
    for number, each in enumerate(nodes):
        for rank in of.ranks_of(number):
            snapshot = each.writes(rank, chunks_of(tensors, rank, of), of)
            entries.append(upload_shard(store, snapshot.info, generation="g1", rank=rank))
    for each in nodes:
        wait_for(lambda: sum(len(held.ranks) for held in each.buddies.held()) == 2)  # noqa: B023
    return Held(nodes, commit(store, entries), HeldImages("g1", STEP, tuple(range(6)), of))


def holders_of(nodes: Sequence[Node], of: World) -> dict[Address, Sequence[int]]:
    found = newest_of_other_worlds([each.info() for each in nodes], of)
    assert found.images is not None and found.images.step == STEP
    return found.holders


def test_a_smaller_world_begins_with_what_the_survivors_hold_bit_for_bit_as_from_the_store(held: Held) -> None:
    survivors, smaller = [held.nodes[0], held.nodes[2]], world(2)
    holders = holders_of(survivors, smaller)
    held.nodes[1].buddies.close()
    for number, each in enumerate(survivors):
        each.begins(smaller.ranks_of(number), to=survivors[1 - number], keep=held.images)
    for number, each in enumerate(survivors):
        ref = find_held(each.buddies.gather(held.images, holders))
        assert [type(place) for place in ref.places].count(str) == 4, "its own, and the copies that it has"
        for rank in smaller.ranks_of(number):
            pairs = zip(loaded(ref, rank, smaller), loaded(held.checkpoint, rank, smaller), strict=True)
            for (mine, is_absent), (theirs, was_absent) in pairs:
                assert same_bits(mine.tensor, theirs.tensor) and is_absent == was_absent, mine.name


def test_a_node_that_is_new_reads_all_it_needs_from_the_others(held: Held, node: Callable[[str], Node]) -> None:
    new, larger = node("new"), world(4)
    holders = holders_of(held.nodes, larger)
    for number, each in enumerate((*held.nodes, new)):
        each.begins(larger.ranks_of(number), keep=held.images)
    ref = find_held(new.buddies.gather(held.images, holders))
    ours = loaded(ref, 7, larger)
    for (mine, is_absent), (theirs, _) in zip(ours, loaded(held.checkpoint, 7, larger), strict=True):
        assert same_bits(mine.tensor, theirs.tensor), mine.name
        assert is_absent == mine.name.startswith("rng/"), "a rank that did not exist keeps its seed"


def test_a_snapshot_that_no_buddy_has_is_begun_with_too(node: Callable[[str], Node]) -> None:
    one, new, tensors = node("one"), node("new"), state()
    one.begins([0, 1])
    for rank in (0, 1):
        one.writes(rank, chunks_of(tensors, rank, world(1)), world(1))
    images = one.images.held()[0]
    one.begins([0, 1], keep=images)
    new.begins([2, 3], keep=images)
    ref = find_held(new.buddies.gather(images, {(HOST, one.buddies.port): (0, 1)}))
    wanted = chunks_of(tensors, 2, world(2))
    for (mine, is_absent), theirs in zip(loaded(ref, 2, world(2)), wanted, strict=True):
        assert is_absent or same_bits(mine.tensor, theirs.tensor), mine.name


def test_what_ranks_of_another_world_left_stays_until_the_new_ones_have_taken_two(held: Held) -> None:
    one, smaller, tensors = held.nodes[0], world(1), state()
    one.begins([0, 1], keep=held.images)
    assert one.images.held() == () and not list(one.folder.glob("rank-*")), "new ranks write files of these names"
    before = set(one.buddies.held())
    assert {rank for each in before for rank in each.ranks} == {0, 1, 4, 5}
    one.writes(0, chunks_of(tensors, 0, smaller), smaller, step=8)
    one.writes(1, chunks_of(tensors, 1, smaller), smaller, step=8)
    assert set(one.buddies.held()) == before, "if these ranks die before all have one, others begin with it again"
    one.writes(0, chunks_of(tensors, 0, smaller), smaller, step=9, slot=1)
    assert one.buddies.held() == () and not list(one.folder.glob("copy-*"))


def test_a_snapshot_of_which_a_part_is_lost_or_changed_is_not_begun_with(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buddies, "FETCH_SECONDS", 0.2)
    first, second, third = held.nodes
    holders = holders_of([first, second, third], world(1))
    for each in (first, second):
        each.begins([0, 1], keep=held.images)
    third.begins([0, 1])
    with pytest.raises(CopyError, match=r"step 7 could not be had from 127\.0\.0\.1: it has no such copy"):
        first.buddies.gather(held.images, holders | {(HOST, third.buddies.port): [2]})
    with pytest.raises(CopyError, match=r"of step 7 in memory is of no use: .* 4 shards for 6 ranks"):
        first.buddies.gather(held.images, {(HOST, first.buddies.port): (0, 1, 4, 5)})

    path = first.buddies.gather(held.images, holders)
    ref = find_held(path)
    image = next(second.folder.glob("copy-00002.*[0-9].safetensors"))
    changed = bytearray(image.read_bytes())
    changed[-1] ^= 1
    image.write_bytes(changed)
    with pytest.raises(CheckpointDamaged, match=r"g1/7/2 in the memory of 127\.0\.0\.1 is damaged in bytes"):
        loaded(ref, 0, world(1))
    second.begins([0, 1])
    with pytest.raises(CheckpointDamaged, match=r"g1/7/2 in the memory of 127\.0\.0\.1 is missing"):
        loaded(ref, 0, world(1))
    second.buddies.close()
    wait_for(lambda: not is_reached(second))
    with pytest.raises(StoreError, match=r"cannot read g1/7/2 in the memory of .* goes on from its newest checkpoint"):
        loaded(ref, 0, world(1))
    path.unlink()
    with pytest.raises(CheckpointDamaged, match="which says where the snapshot is, cannot be read"):
        find_held(path)


@pytest.mark.parametrize("left", ["half of another", "less"])
def test_an_image_that_its_rank_was_writing_when_it_died_is_not_begun_with(
    node: Callable[[str], Node], monkeypatch: pytest.MonkeyPatch, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No buddy has it, so nothing but its header tells: checksums would be made of what is there."""
    monkeypatch.setattr(buddies, "FETCH_SECONDS", 0.2)
    one, of = node("one"), world(1)
    one.begins([0, 1])
    for rank in (0, 1):
        written = one.writes(rank, chunks_of(state(), rank, of), of)
    images = one.images.held()[0]
    with open(written.info.path, "r+b") as image:
        image.write(bytes(8))
        image.truncate(written.info.size if left == "half of another" else 100)
    one.begins([0, 1], keep=images)
    with pytest.raises(CopyError, match="it has no such copy"):
        one.buddies.gather(images, {(HOST, one.buddies.port): (0, 1)})
    assert left == "less" or "its writer died while writing it" in caplog.text


def is_reached(node: Node) -> bool:
    try:
        PeerFiles((HOST, node.buddies.port), SECRET).size("none")
    except KeyMissing:
        return True
    except StoreError:
        return False
    raise AssertionError("it has no such file")


def test_an_agent_lends_only_what_it_holds_and_only_to_those_who_know_the_secret(held: Held) -> None:
    one = held.nodes[0]
    one.begins([0, 1], keep=held.images)
    key, address = held_key("g1", STEP, 0), (HOST, one.buddies.port)
    assert PeerFiles(address, SECRET).size(key) > 0
    for other in ("../../run/x", held_key("g1", STEP, 2), held_key("g2", STEP, 0)):
        with pytest.raises(KeyMissing, match="it is not held any more"):
            PeerFiles(address, SECRET).size(other)
    with pytest.raises(StoreError, match="cannot read"):
        PeerFiles(address, b"a guess").size(key)


# ---- what the coordinator makes of it --------------------------------------------------------------------------------


def test_the_newest_snapshot_of_another_world_is_that_which_is_whole_among_all_who_can_be_read_from() -> None:
    old, now = world(2), world(1)

    def agent(number: int, *, images: tuple[HeldImages, ...] = (), copies: tuple[HeldImages, ...] = (), port: int = 7):
        return AgentInfo("a", number, 2, f"127.0.0.{number}", 1, pid=1, buddy_port=port, images=images, copies=copies)

    def part(step: int, *ranks: int, of: World = old) -> HeldImages:
        return HeldImages("g1", step, ranks, of)

    both = agent(2, images=(part(5, 0, 1), part(6, 0, 1), part(9, 0, 1, of=now)), copies=(part(5, 2, 3),))
    found = newest_of_other_worlds([both], now)
    assert found.images == part(5, 0, 1, 2, 3), "step 6 lacks two ranks, and step 9 is of the same world"
    assert found.holders == {("127.0.0.2", 7): range(4)}
    spare = agent(3, images=(part(5, 2, 3),), copies=(part(6, 2, 3),))
    found = newest_of_other_worlds([both, spare], now)
    assert found.images == part(6, 0, 1, 2, 3) and found.holders["127.0.0.3", 7] == range(2, 4)
    found = newest_of_other_worlds([both, spare], now, before=6)
    assert found.holders["127.0.0.3", 7] == range(2, 4), "who has its own image and not a copy"
    assert newest_of_other_worlds([both, spare], now, before=6).images == part(5, 0, 1, 2, 3)
    assert newest_of_other_worlds([both, spare], now, distrusted=[("g1", 6), ("g1", 5)]).images is None
    assert newest_of_other_worlds([agent(2, images=both.images, copies=both.copies, port=0)], now).images is None
