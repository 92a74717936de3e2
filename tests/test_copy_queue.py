"""Of a node's images that wait to be copied, which are sent: whole steps, or none and somebody hears of it."""

from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks
from raynium.config.world import World
from raynium.node.copy_queue import CopyQueue
from raynium.node.images import NodeImages, Snapshot

pytestmark = pytest.mark.quick

RANKS = range(4)
WORLD = World(nodes=2, ranks_per_node=4, tensor=1, pipeline=1, num_micro_batches=1)


def snapshot(step: int) -> Snapshot:
    info = ImageInfo(step=step, path="p", size=1, tensors=SavedBlocks.of(()))
    return Snapshot("g1", WORLD, None, info, info)


def play(num_images: int, sent: list[int]) -> tuple[dict[int, int], list[int]]:
    """sent: images that are sent between two saves. Returns step → ranks that arrived, and the steps given up."""
    images, queue = NodeImages(num_images), CopyQueue()
    images.start_generation(RANKS, None)
    free, arrived, given_up = defaultdict[int, deque[int]](deque), defaultdict[int, set[int]](set), list[int]()
    for step, number in enumerate(sent, start=1):
        for rank, slot in images.take_offers():
            free[rank].append(slot)
        if all(free[rank] for rank in RANKS):
            for rank in RANKS:
                slot, written = free[rank].popleft(), snapshot(step)
                images.complete(rank, slot, written, upload=False)
                queue.offer(rank, images.hold(rank, slot, written))
        for _ in range(number):
            if not queue:
                break
            rank, hold = queue.take()
            # While it is sent its rank may be told to write it again.
            for each, slot in images.take_offers():
                free[each].append(slot)
            if hold.is_there():
                arrived[hold.step].add(rank)
            else:
                given_up.append(hold.step)
                queue.give_up(hold.step)
            hold.release()
    return {step: len(ranks) for step, ranks in arrived.items()}, given_up


@given(st.lists(st.integers(1, 6), min_size=24, max_size=60))
def test_with_an_image_to_spare_every_step_that_is_begun_becomes_whole(sent: list[int]) -> None:
    arrived, given_up = play(3, sent)
    *whole, last = sorted(arrived)
    assert not given_up and len(whole) >= 3 and all(arrived[step] == len(RANKS) for step in whole) and last


def test_without_one_what_takes_too_long_is_given_up_and_what_does_not_is_whole() -> None:
    arrived, given_up = play(2, [1] * 40)
    assert len(given_up) > 5 and len(RANKS) not in arrived.values()
    assert play(2, [4] * 10) == (dict.fromkeys(range(1, 11), len(RANKS)), [])


def test_the_newest_of_each_rank_waits_and_no_other_is_held() -> None:
    images, queue = NodeImages(3), CopyQueue()
    images.start_generation([0], None)
    holds = []
    for step in (1, 2, 3):
        written = snapshot(step)
        images.complete(0, step - 1, written, upload=False)
        holds.append(images.hold(0, step - 1, written))
        queue.offer(0, holds[-1])
    assert [hold.slot.copying for hold in holds] == [False, False, True]
    assert queue.take() == (0, holds[2]) and not queue
    queue.offer(0, holds[2])
    queue.clear()
    assert not queue and not holds[2].slot.copying
