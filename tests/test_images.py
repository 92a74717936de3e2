"""Snapshot memory: never overwritten too early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks
from raynium.config.world import World
from raynium.node.images import NodeImages, Snapshot
from raynium.run.held_images import HeldImages

pytestmark = pytest.mark.quick


WORLD = World(nodes=1, ranks_per_node=2, tensor=1, pipeline=1, num_micro_batches=1)


def snapshot(step: int, generation: str = "g1") -> Snapshot:
    info = ImageInfo(step=step, path=f"/dev/shm/{step}", size=1, tensors=SavedBlocks.of(()))
    return Snapshot(generation, WORLD, None, info, info)


def test_a_rank_always_has_one_image_to_write_and_one_to_start_from() -> None:
    images = NodeImages()
    images.start_generation([0], None)
    assert images.take_offers() == [(0, 0), (0, 1)] and images.take_offers() == []

    images.complete(0, 0, snapshot(10), upload=True)
    assert images.take_offers() == [] and images.held() == (HeldImages("g1", 10, (0,), WORLD),)
    images.uploaded(images._slots[0][0], failure=None)
    assert images.take_offers() == [], "the only complete one: a restart needs it"
    images.complete(0, 1, snapshot(20), upload=True)
    assert images.take_offers() == [(0, 0)], "uploaded, and a newer one is complete"

    images.complete(0, 0, snapshot(30), upload=True)
    assert images.take_offers() == [], "the upload of step 20 still runs"
    assert images.uploading() == ("g1",)
    images.uploaded(images._slots[0][1], failure=None)
    assert images.take_offers() == [(0, 1)]
    assert {held.step for held in images.held()} == {20, 30}


def test_a_new_generation_keeps_what_it_starts_from_and_what_is_being_uploaded() -> None:
    images = NodeImages()
    images.start_generation([4, 5], None)
    images.take_offers()
    for rank in (4, 5):
        images.complete(rank, 0, snapshot(10), upload=True)
        images.uploaded(images._slots[rank][0], failure=None)
    images.complete(5, 1, snapshot(20), upload=True)
    kept = HeldImages("g1", 10, (0, 1, 4, 5), WORLD)
    assert set(images.held()) == {HeldImages("g1", 10, (4, 5), WORLD), HeldImages("g1", 20, (5,), WORLD)}

    images.start_generation([4, 5], kept)
    assert images.uploading() == ("g1",)
    assert images.held() == (HeldImages("g1", 10, (4, 5), WORLD),), "step 20 is of a past that did not happen"
    assert {rank: [ImageInfo.from_json(each).step for each in found] for rank, found in images.find(kept).items()} == {
        4: [10, 10],
        5: [10, 10],
    }
    assert images.take_offers() == [(4, 1)], "rank 5's other image is still being uploaded"
    images.uploaded(images._slots[5][1], failure=None)
    assert images.take_offers() == [(5, 1)]
    images.complete(4, 1, snapshot(12, "g2"), upload=True)
    assert images.take_offers() == [(4, 0)]

    assert images.start_generation([4, 5], None) == [(4, 1)] and images.uploading() == ("g2",)
    assert images.held() == () and sorted(images.take_offers()) == [(4, 0), (4, 1), (5, 0), (5, 1)]


def test_snapshots_between_checkpoints_go_into_the_oldest_image_while_another_is_uploaded() -> None:
    images = NodeImages(num_images=3)
    images.start_generation([0], None)
    assert images.take_offers() == [(0, 0), (0, 1), (0, 2)]
    images.complete(0, 0, snapshot(10), upload=True)
    assert images.take_offers() == []
    images.complete(0, 1, snapshot(11), upload=False)
    assert images.take_offers() == [], "the newest, one that is uploaded, and one that may be written"
    for step, slot in ((12, 2), (13, 1), (14, 2)):
        images.complete(0, slot, snapshot(step), upload=False)
        assert images.take_offers() == [(0, 3 - slot)]
        assert images.uploading() == ("g1",) and images.saved() == []
        assert max(held.step for held in images.held()) == step
    images.uploaded(images._slots[0][0], failure=None)
    assert images.take_offers() == [(0, 0)]
    images.complete(0, 1, snapshot(15), upload=False)
    images.complete(0, 0, snapshot(16), upload=False)
    assert images.take_offers() == [(0, 2), (0, 1)], "the oldest first"
    assert {held.step for held in images.held()} == {14, 15, 16} and images.failed() == []


def test_an_image_that_is_copied_to_another_node_is_written_only_if_there_is_no_other() -> None:
    images = NodeImages(num_images=3)
    images.start_generation([0], None)
    images.take_offers()
    copied = snapshot(10)
    images.complete(0, 0, copied, upload=False)
    hold = images.hold(0, 0, copied)
    for step, slot in ((11, 1), (12, 2), (13, 1)):
        images.complete(0, slot, snapshot(step), upload=step == 13)
        assert all(number != 0 for _, number in images.take_offers()) and hold.is_there()
    images.complete(0, 2, snapshot(14), upload=False)
    assert images.take_offers() == [(0, 0)] and not hold.is_there()
    hold.release()
    images.complete(0, 0, snapshot(15), upload=False)
    assert images.take_offers() == [(0, 2)]


@given(
    heard=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=5, max_size=30),
    num_images=st.integers(2, 3),
    uploads=st.sets(st.integers(1, 30)),
)
def test_ranks_of_which_one_is_unheard_for_a_while_have_a_step_in_common(
    heard: list[tuple[int, int]], num_images: int, uploads: set[int]
) -> None:
    """Two ranks write as `rank/snapshots.py` does; what each tells its agent, and is told, comes when it will."""
    nodes = [NodeImages(num_images) for _ in range(2)]
    free: list[list[int]] = [[], []]
    untold: list[list[tuple[int, int]]] = [[], []]

    def offer(rank: int) -> None:
        free[rank] += [slot for _, slot in nodes[rank].take_offers()]

    for rank, node in enumerate(nodes):
        node.start_generation([rank], None)
        offer(rank)
    for step, hears in enumerate(heard, start=1):
        if all(free):
            for rank in range(2):
                untold[rank].append((free[rank].pop(0), step))
        for rank, node in enumerate(nodes):
            for slot, of in untold[rank][: hears[rank]]:
                node.complete(rank, slot, snapshot(of), upload=of in uploads)
                offer(rank)
                if of in uploads:
                    node.uploaded(node._slots[rank][slot])
                    offer(rank)
            del untold[rank][: hears[rank]]
        # What an untold one was written over is gone, whatever the agent believes.
        gone = [{_step_in(node, rank, slot) for slot, _ in untold[rank]} for rank, node in enumerate(nodes)]
        kept = [{each.step for each in node.held()} - gone[rank] for rank, node in enumerate(nodes)]
        assert not all(kept) or kept[0] & kept[1], f"after step {step}: {kept}"


def _step_in(images: NodeImages, rank: int, slot: int) -> int:
    """That it last heard of."""
    found = images._slots[rank][slot].snapshot
    return -1 if found is None else found.info.step


def test_of_failed_uploads_the_newest_of_each_rank_may_be_tried_again() -> None:
    images = NodeImages()
    images.start_generation([0, 1], None)
    images.take_offers()
    for rank in (0, 1):
        images.complete(rank, 0, snapshot(10), upload=True)
        images.uploaded(images._slots[rank][0], failure="denied")
    assert [(each.rank, each.failure) for each in images.failed()] == [(0, "denied"), (1, "denied")]
    assert images.take_offers() == [], "the failed ones are the newest, and the others are offered"

    images.complete(0, 1, snapshot(20), upload=True)
    assert [each.rank for each in images.failed()] == [1], "a newer one of rank 0 is on its way"
    images.uploaded(images._slots[0][1], failure="denied again")
    assert [(each.rank, each.snapshot.info.step) for each in images.failed()] == [(0, 20), (1, 10)]
    images.uploaded(images._slots[1][0], failure=None)
    assert [each.rank for each in images.failed()] == [0]

    images.start_generation([0, 1], HeldImages("g1", 20, (0,), WORLD))
    assert [each.rank for each in images.failed()] == [0], "the next generation starts from it"
    assert images.saved() == []
    images.start_generation([0, 1], None)
    assert images.failed() == []


def test_an_upload_of_before_has_nothing_to_do_with_the_images_of_a_rank_that_begins_with_none() -> None:
    """It was fetched, say: its rank writes all images anew, while the old ones are on their way to a slow store."""
    images = NodeImages()
    images.start_generation([0], None)
    images.take_offers()
    old = [images.complete(0, number, snapshot(10 + number), upload=True) for number in (0, 1)]
    assert images.start_generation([0], HeldImages("g9", 99, (0,), WORLD)) == [(0, 0), (0, 1)], "their files are theirs"
    images.complete(0, 0, snapshot(99, "g9"), upload=False)
    assert images.uploading() == ("g1",) and images.take_offers() == [(0, 1)]
    images.complete(0, 1, snapshot(100, "g9"), upload=True)
    assert images.take_offers() == [(0, 0)]
    newest = images.complete(0, 0, snapshot(101, "g9"), upload=True)
    images.uploaded(old[0], failure="denied")
    images.uploaded(old[1])
    assert images.take_offers() == [] and images.failed() == [], "both are being uploaded"
    images.uploaded(newest)
    assert images.start_generation([], None) == [(0, 0), (0, 1)] and images.uploading() == ("g9",)


def test_a_rank_that_goes_on_from_an_image_here_keeps_its_others_until_they_are_uploaded() -> None:
    images = NodeImages()
    images.start_generation([0], None)
    images.take_offers()
    old = images.complete(0, 0, snapshot(10), upload=True)
    images.complete(0, 1, snapshot(11), upload=True)
    assert images.start_generation([0], HeldImages("g1", 11, (0,), WORLD)) == []
    assert images.take_offers() == []
    images.uploaded(old)
    assert images.take_offers() == [(0, 0)]
