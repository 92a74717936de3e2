"""Copies of snapshots between two agents' memories: real sockets and files, no ranks."""

import errno
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import job_text
from waiting import wait_for

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks
from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.node import buddies as buddies_module
from raynium.node.buddies import Buddies, CopyError, buddies_of
from raynium.node.copy_failures import FAILURES_TOLD, CopyFailures, why_not_kept
from raynium.node.images import Hold, NodeImages, Snapshot
from raynium.run.buddies import buddies
from raynium.run.held_images import HeldImages
from raynium.run.protocol import AgentInfo, Said
from raynium.run.recovery import copies_of, newest_images
from raynium.storage import peers
from raynium.storage.peers import CHUNK_BYTES

pytestmark = pytest.mark.quick

HOST, SECRET = "127.0.0.1", b"only the run's agents know it"
WORLD = World(nodes=2, ranks_per_node=1, tensor=1, pipeline=1, num_micro_batches=1)
# More than one message, and not a whole number of them.
IMAGE, REPLICAS = bytes(range(251)) * (CHUNK_BYTES // 200), b"r" * 1000


class Node:
    """One agent's memory."""

    def __init__(
        self, folder: Path, *, secret: bytes = SECRET, bytes_per_second: float = 1e12, ranks: int = 1, slots: int = 2
    ):
        folder.mkdir()
        self.folder, self.images = folder, NodeImages(slots)
        self.images.start_generation(range(ranks), None)
        self.said: list[Said] = []
        self.buddies = Buddies(
            HOST, folder, secret, self.images, bytes_per_second=bytes_per_second, tell=self.said.append
        )

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.buddies.port

    def snapshot(self, step: int, *, slot: int = 0, generation: str = "g1", rank: int = 0) -> Snapshot:
        """Of a rank that has just written it."""
        infos = []
        for name, data in (("image", IMAGE), ("replicas", REPLICAS)):
            path = self.folder / f"{name}-{rank}.{slot}"
            path.write_bytes(data)
            infos.append(ImageInfo(step=step, path=str(path), size=len(data), tensors=SavedBlocks.of(())))
        self.images.take_offers()
        written = Snapshot(generation, WORLD, 3, *infos)
        self.images.complete(rank, slot, written, upload=False)
        return written


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(name: str, **options: object) -> Node:
        made.append(Node(tmp_path / name, **options))  # pyright: ignore[reportArgumentType]
        return made[-1]

    yield make
    for each in made:
        each.buddies.close()


def held(step: int, generation: str = "g1") -> HeldImages:
    return HeldImages(generation, step, (0,), WORLD)


def test_a_snapshot_is_copied_to_the_next_node_and_whoever_follows_the_lost_one_has_its_bytes(
    node: Callable[..., Node],
) -> None:
    first, second, third = node("first"), node("second"), node("third")
    first.buddies.begin_generation(None, second.address)
    for number, step in enumerate((5, 10, 15)):
        first.buddies.offer(0, number % 2, first.snapshot(step, slot=number % 2))
        wait_for(lambda: held(step) in second.buddies.held())  # noqa: B023
    assert set(second.buddies.held()) == {held(10), held(15)}, "the newest, and the one before it"

    third.buddies.fetch(0, held(15), second.address)
    assert third.images.held() == (held(15),)
    image, replicas = (ImageInfo.from_json(text) for text in third.images.find(held(15))[0])
    assert (Path(image.path).read_bytes(), Path(replicas.path).read_bytes()) == (IMAGE, REPLICAS)
    assert {Path(each.path).parent for each in (image, replicas)} == {third.folder}
    assert third.images.take_offers() == [(0, 1)], "the rank starts from the other"

    second.buddies.begin_generation(held(15), None)
    assert second.buddies.held() == (held(15),), "what another past has left is gone"
    second.buddies.begin_generation(None, None)
    assert second.buddies.held() == () and not list(second.folder.glob("copy-*"))


def test_an_image_that_its_rank_writes_again_while_it_is_sent_becomes_no_copy(node: Callable[..., Node]) -> None:
    first, second = node("first", bytes_per_second=len(IMAGE)), node("second")
    first.buddies.begin_generation(None, second.address)
    first.buddies.offer(0, 0, first.snapshot(5, slot=0))
    wait_for(lambda: second.buddies._coming)
    # Another one is complete, so this one may be written.
    newer = first.snapshot(10, slot=1)
    assert first.images.take_offers() == [(0, 0)]
    first.buddies._bytes_per_second = 1e12
    wait_for(lambda: not second.buddies._coming)
    assert second.buddies.held() == ()
    first.buddies.offer(0, 1, newer)
    wait_for(lambda: second.buddies.held() == (held(10),))


def test_a_buddy_has_all_ranks_of_a_step_though_newer_ones_come_while_they_are_sent(node: Callable[..., Node]) -> None:
    first, second = node("first", ranks=3, slots=3), node("second")
    taken, send_one, all_wait = list[int](), first.buddies._send_one, threading.Event()

    def newer_come(rank: int, hold: Hold, to: tuple[str, int]) -> None:
        taken.append(hold.step)
        if len(taken) == 1:
            assert all_wait.wait(60)
            for each in range(3):
                first.buddies.offer(each, 1, first.snapshot(10, slot=1, rank=each))
        send_one(rank, hold, to)

    first.buddies._send_one = newer_come
    first.buddies.begin_generation(None, second.address)
    for rank in range(3):
        first.buddies.offer(rank, 0, first.snapshot(5, rank=rank))
    all_wait.set()
    wait_for(lambda: len(taken) == 6)
    assert taken == [5, 5, 5, 10, 10, 10]
    wait_for(lambda: HeldImages("g1", 10, (0, 1, 2), WORLD) in second.buddies.held())
    assert HeldImages("g1", 5, (0, 1, 2), WORLD) in second.buddies.held()


def test_copies_that_find_no_room_again_and_again_are_told_once_until_they_do(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = node("first"), node("second")
    first.buddies.begin_generation(None, second.address)
    receive = buddies_module._receive
    answers: list[int] = []

    def no_room(connection: Connection, *_: object) -> Snapshot:
        connection.recv_bytes()
        answers.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    def saves(steps: range, *, room: bool) -> None:
        monkeypatch.setattr(buddies_module, "_receive", receive if room else no_room)
        for step in steps:
            known = len(answers)
            first.buddies.offer(0, step % 2, first.snapshot(step, slot=step % 2))
            wait_for(lambda: held(step) in second.buddies.held() if room else len(answers) > known)  # noqa: B023
            wait_for(lambda: not second.buddies._coming)

    saves(range(1, FAILURES_TOLD), room=False)
    assert not first.said
    saves(range(3, 6), room=False)
    wait_for(lambda: first.said)
    (said,) = first.said
    assert (said.what, said.where) == ("node", HOST)
    remedy = "its shared memory has no room for them; enlarge it (`raynium preflight` says to what), or set "
    assert said.text.startswith(f"the last snapshots of rank 0 on {HOST} could not be copied to {HOST}: {remedy}fault.")
    saves(range(6, 7), room=True)
    saves(range(7, 10), room=False)
    wait_for(lambda: len(first.said) == 2)
    assert second.buddies.held() == (held(6),) and len(list(second.folder.glob("copy-*"))) == 2, "no half of a copy"


def test_a_rank_whose_copies_succeed_hides_no_other_whose_copies_fail() -> None:
    failures = CopyFailures()
    told = []
    for _ in range(FAILURES_TOLD + 1):
        failures.copied(0)
        told.append(failures.failed(1))
    assert told == [False] * (FAILURES_TOLD - 1) + [True, False]
    assert not any(failures.failed(2) for _ in range(FAILURES_TOLD)), "known of one rank"
    failures.copied(1)
    assert not failures.failed(2), "one of them still fails"
    failures.copied(2)
    assert [failures.failed(1) for _ in range(FAILURES_TOLD)] == [False] * (FAILURES_TOLD - 1) + [True]


def test_why_a_copy_was_not_kept_is_as_it_was_unless_room_lacks() -> None:
    assert why_not_kept(OSError(errno.EIO, "input/output error")) == "[Errno 5] input/output error"
    assert "no room" in why_not_kept(OSError(errno.ENOMEM, "Cannot allocate memory"))


def test_a_run_on_one_node_or_that_wants_none_makes_no_copies(tmp_path: Path) -> None:
    for changes in ({"cluster.nodes": 1, "fault.buddy_copies": True}, {"cluster.nodes": 2}):
        config = parse_config(job_text(changes | {"cluster.ranks_per_node": 1}))
        assert buddies_of(config, HOST, tmp_path, SECRET, NodeImages(), pytest.fail) is None
    config = parse_config(job_text({"cluster.nodes": 2, "cluster.ranks_per_node": 1, "fault.buddy_copies": True}))
    made = buddies_of(config, HOST, tmp_path, SECRET, NodeImages(), pytest.fail)
    assert made is not None and made._bytes_per_second == 5e8
    made.close()


def test_a_copy_that_comes_in_while_another_generation_begins_is_of_no_use(node: Callable[..., Node]) -> None:
    first, second = node("first"), node("second")
    snapshot = first.snapshot(5)
    with Client(second.address, authkey=SECRET) as connection:
        connection.send_bytes(json.dumps({"do": "put", "rank": 0} | buddies_module._header(snapshot)).encode())
        for data in buddies_module._chunks(snapshot, []):
            connection.send_bytes(data)
        wait_for(lambda: second.buddies._coming)
        second.buddies.begin_generation(None, None)
        connection.send_bytes(b"whole")
        assert connection.recv_bytes() == b"its generation is over"
    assert second.buddies.held() == ()


def test_a_sender_that_falls_silent_is_given_up_and_leaves_no_memory_taken(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 1)
    first, second = node("first"), node("second")
    snapshot = first.snapshot(5)
    with Client(second.address, authkey=SECRET) as connection:
        connection.send_bytes(json.dumps({"do": "put", "rank": 0} | buddies_module._header(snapshot)).encode())
        connection.send_bytes(next(buddies_module._chunks(snapshot, [])))
        wait_for(lambda: list(second.folder.glob("copy-*")))
        wait_for(lambda: not second.buddies._coming)
        assert not list(second.folder.glob("copy-*"))
        first.buddies.begin_generation(None, second.address)
        first.buddies.offer(0, 0, snapshot)
        wait_for(lambda: second.buddies.held() == (held(5),))


def test_a_holder_that_falls_silent_holds_up_its_sender_no_longer_than_that(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 1)
    first, second = node("first"), node("second")
    with socket.create_server((HOST, 0)) as silent:
        first.buddies.begin_generation(None, silent.getsockname())
        first.buddies.offer(0, 0, first.snapshot(5))
        accepted, _ = silent.accept()
        with accepted:
            first.buddies.begin_generation(None, second.address)
            first.buddies.offer(0, 0, first.snapshot(10))
            wait_for(lambda: second.buddies.held() == (held(10),))


def test_bytes_that_were_changed_on_their_way_become_no_copy(node: Callable[..., Node]) -> None:
    first, second = node("first"), node("second")
    snapshot = first.snapshot(5)
    with Client(second.address, authkey=SECRET) as connection:
        connection.send_bytes(json.dumps({"do": "put", "rank": 0} | buddies_module._header(snapshot)).encode())
        for number, data in enumerate(buddies_module._chunks(snapshot, [])):
            connection.send_bytes(data if number else data[:-1] + b"?")
        answer = connection.recv_bytes()
    assert answer == b"the bytes of copy-00000.0.safetensors are not those that were sent"
    assert second.buddies.held() == ()


def test_a_copy_that_is_not_to_be_had_is_an_error_that_says_why(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buddies_module, "FETCH_SECONDS", 0.2)
    first, second, stranger = node("first"), node("second"), node("stranger", secret=b"guessed")
    with pytest.raises(CopyError, match=r"snapshot of step 5 could not be had from 127\.0\.0\.1: it has no such copy"):
        first.buddies.fetch(0, held(5), second.address)
    with pytest.raises(CopyError, match="digest"):
        stranger.buddies.fetch(0, held(5), second.address)
    second.buddies.close()
    with pytest.raises(CopyError, match="could not be had"):
        first.buddies.fetch(0, held(5), second.address)
    assert first.images.held() == ()


def test_a_file_that_is_too_short_is_not_sent(node: Callable[..., Node]) -> None:
    first = node("first")
    snapshot = first.snapshot(5)
    Path(snapshot.info.path).write_bytes(b"short")
    with pytest.raises(CopyError, match="is shorter than its"):
        list(buddies_module._chunks(snapshot, []))


def test_who_connects_and_says_nothing_holds_up_nobody(node: Callable[..., Node]) -> None:
    first, second = node("first"), node("second")
    with socket.create_connection(second.address):
        first.buddies.begin_generation(None, second.address)
        first.buddies.offer(0, 0, first.snapshot(5))
        wait_for(lambda: second.buddies.held() == (held(5),), seconds=10)


# ---- what the coordinator makes of it --------------------------------------------------------------------------------


FIRST = AgentInfo("a", 0, 2, "127.0.0.2", 29500, pid=1, buddy_port=7000)
SECOND = AgentInfo("a", 1, 2, "127.0.0.3", 29500, pid=1, buddy_port=7001)


def test_a_generation_starts_from_memory_and_copies_if_these_are_of_one_step() -> None:
    own, copy = HeldImages("g1", 10, (0,), WORLD), HeldImages("g1", 10, (1,), WORLD)
    stays = replace(FIRST, images=(own,), copies=(copy,))
    assert newest_images((stays, SECOND), WORLD) == HeldImages("g1", 10, (0, 1), WORLD)
    assert copies_of(own, (stays, SECOND)) == {("127.0.0.2", 7000): range(1, 2)}
    assert copies_of(own, (stays, replace(SECOND, images=(copy,)))) == {}, "it lives, and has its own"
    assert newest_images((replace(stays, copies=(replace(copy, step=5),)), SECOND), WORLD) is None
    assert newest_images((stays, SECOND), WORLD, distrusted=[("g1", 10)]) is None


def test_who_runs_no_rank_any_more_lends_its_images_to_ranks_of_an_equal_world() -> None:
    own, its = HeldImages("g1", 10, (0,), WORLD), HeldImages("g1", 10, (1,), WORLD)
    stays, leaves = replace(FIRST, images=(own,)), replace(SECOND, images=(its,))
    spare = replace(SECOND, seat=2, host="127.0.0.4")
    ready = (stays, leaves, spare)
    assert newest_images((stays, spare), WORLD) is None
    whole = HeldImages("g1", 10, (0, 1), WORLD)
    assert newest_images((stays, spare), WORLD, ready=ready) == whole
    assert newest_images((stays, spare), WORLD, ready=ready, before=10) is None
    assert copies_of(whole, (stays, spare), ready=ready) == {("127.0.0.3", 7001): range(1, 2)}
    copied = replace(stays, copies=(its,))
    assert copies_of(whole, (copied, spare), ready=(copied, leaves, spare)) == {("127.0.0.2", 7000): range(1, 2)}, (
        "who stays is asked first"
    )
    deaf = replace(leaves, buddy_port=0)
    assert newest_images((stays, spare), WORLD, ready=(stays, deaf, spare)) is None


def test_a_spare_has_the_bytes_of_the_node_whose_place_it_takes(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buddies_module, "_damage", lambda info: None)
    leaves, spare = node("leaves"), node("spare")
    leaves.snapshot(5, slot=0)
    leaves.snapshot(10, slot=1)
    leaves.buddies.begin_generation(held(10), None, adopts=True)
    assert leaves.images.start_generation([], None) == [(0, 0), (0, 1)]
    spare.buddies.fetch(0, held(10), leaves.address)
    image, replicas = (ImageInfo.from_json(text) for text in spare.images.find(held(10))[0])
    assert (Path(image.path).read_bytes(), Path(replicas.path).read_bytes()) == (IMAGE, REPLICAS)
    assert Path(image.path).parent == spare.folder


def test_what_a_node_holds_takes_as_much_room_in_an_order_whatever_number_of_ranks() -> None:
    large = World(nodes=1024, ranks_per_node=64, tensor=1, pipeline=1, num_micro_batches=1)
    all_of_them = HeldImages("g1", 10, list(range(large.size)), large)
    assert len(pickle.dumps(all_of_them)) < 500 and all_of_them == pickle.loads(pickle.dumps(all_of_them))
    assert HeldImages("g1", 10, (3, 2, 4), large) == HeldImages("g1", 10, range(2, 5), large)
    assert list(HeldImages("g1", 10, (9, 2), large).ranks) == [2, 9] and not HeldImages("g1", 10, (), large).ranks


def test_the_next_node_takes_copies_if_it_takes_any_and_is_another() -> None:
    assert buddies((FIRST, SECOND)) == (("127.0.0.3", 7001), ("127.0.0.2", 7000))
    assert buddies((FIRST, replace(SECOND, buddy_port=0))) == (None, ("127.0.0.2", 7000))
    assert buddies((FIRST,)) == (None,)


def crew(*places: tuple[str, str]) -> list[AgentInfo]:
    """By node rank. places: zone and placement group of each."""
    return [
        replace(FIRST, seat=seat, host=f"10.0.0.{seat}", buddy_port=7000 + seat, zone=zone, placement_group=group)
        for seat, (zone, group) in enumerate(places)
    ]


def pairs_of(agents: list[AgentInfo]) -> list[tuple[AgentInfo, AgentInfo]]:
    """Each with who takes its copies."""
    by_port = {agent.buddy_port: agent for agent in agents}
    return [(agent, by_port[address[1]]) for agent, address in zip(agents, buddies(agents), strict=True) if address]


def most_apart(blocks: list[object]) -> int:
    """How many can have a buddy in another block, if each is the buddy of one: those outside of the largest and as many
    of those inside.
    """
    largest = max(blocks.count(each) for each in blocks)
    return min(len(blocks), 2 * (len(blocks) - largest))


PLACE = st.tuples(st.sampled_from(["", "a", "b", "c"]), st.sampled_from(["", "p", "q"]))


@given(st.lists(PLACE, min_size=2, max_size=24))
def test_every_node_is_the_buddy_of_one_other_and_as_many_as_can_be_are_in_different_zones(
    places: list[tuple[str, str]],
) -> None:
    pairs = pairs_of(crew(*places))
    assert sorted(taker.seat for _, taker in pairs) == list(range(len(places)))
    assert all(giver.seat != taker.seat for giver, taker in pairs)
    zones = [zone for zone, _ in places]
    assert sum(giver.zone != taker.zone for giver, taker in pairs) == most_apart([*zones])


@given(st.lists(st.sampled_from(["", "p", "q", "r"]), min_size=2, max_size=24))
def test_in_one_zone_as_many_as_can_be_are_in_different_placement_groups(groups: list[str]) -> None:
    pairs = pairs_of(crew(*(("a", group) for group in groups)))
    apart = sum(giver.placement_group != taker.placement_group for giver, taker in pairs)
    assert apart == most_apart([*groups])


def test_nodes_that_say_nothing_of_their_place_give_to_the_next_and_a_lone_one_elsewhere_is_used() -> None:
    def takers(*places: tuple[str, str]) -> list[int]:
        return [taker.seat for _, taker in pairs_of(crew(*places))]

    assert takers(*[("", "")] * 5) == [1, 2, 3, 4, 0]
    assert takers(("a", ""), ("b", ""), ("a", ""), ("b", "")) == [1, 0, 3, 2]
    assert takers(("a", "p"), ("a", "p"), ("a", "q")) == [1, 2, 0]


def test_a_thousand_nodes_are_paired_at_once() -> None:
    agents = crew(*((f"zone-{seat % 3}", f"group-{seat % 7}") for seat in range(1024)))
    began = time.process_time()
    assert len(buddies(agents)) == 1024
    assert time.process_time() - began < 0.5
