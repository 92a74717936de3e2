"""Snapshot memory: never overwritten too early."""

import pytest

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks
from raynium.config.world import World
from raynium.node.images import NodeImages, Snapshot
from raynium.run.protocol import HeldImages

pytestmark = pytest.mark.quick


WORLD = World(nodes=1, ranks_per_node=2, tensor=1, pipeline=1, num_micro_batches=1)


def snapshot(step: int, generation: str = "g1") -> Snapshot:
    info = ImageInfo(step=step, path=f"/dev/shm/{step}", size=1, tensors=SavedBlocks.of(()))
    return Snapshot(generation, WORLD, None, info, info)


def test_a_rank_always_has_one_image_to_write_and_one_to_start_from() -> None:
    images = NodeImages()
    images.start_generation([0], None)
    assert images.take_offers() == [(0, 0)] and images.take_offers() == []

    images.complete(0, 0, snapshot(10), upload=True)
    assert images.take_offers() == [(0, 1)] and images.held() == (HeldImages("g1", 10, (0,), WORLD),)
    images.uploaded(0, 0, failure=None)
    assert images.take_offers() == [], "the only complete one: a restart needs it"
    images.complete(0, 1, snapshot(20), upload=True)
    assert images.take_offers() == [(0, 0)], "uploaded, and a newer one is complete"

    images.complete(0, 0, snapshot(30), upload=True)
    assert images.take_offers() == [], "the upload of step 20 still runs"
    assert images.uploading() == ("g1",)
    images.uploaded(0, 1, failure=None)
    assert images.take_offers() == [(0, 1)]
    assert {held.step for held in images.held()} == {20, 30}


def test_a_new_generation_keeps_what_it_starts_from_and_what_is_being_uploaded() -> None:
    images = NodeImages()
    images.start_generation([4, 5], None)
    images.take_offers()
    for rank in (4, 5):
        images.complete(rank, 0, snapshot(10), upload=True)
        images.uploaded(rank, 0, failure=None)
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
    images.uploaded(5, 1, failure=None)
    assert images.take_offers() == [(5, 1)]
    images.complete(4, 1, snapshot(12, "g2"), upload=True)
    assert images.take_offers() == [(4, 0)]

    images.start_generation([4, 5], None)
    assert images.held() == () and sorted(images.take_offers()) == [(4, 0), (5, 0)]


def test_snapshots_between_checkpoints_go_into_the_oldest_image_while_another_is_uploaded() -> None:
    images = NodeImages(num_images=3)
    images.start_generation([0], None)
    assert images.take_offers() == [(0, 0)]
    images.complete(0, 0, snapshot(10), upload=True)
    for step, slot, next_slot in ((11, 1, 2), (12, 2, 1), (13, 1, 2)):
        assert images.take_offers() == [(0, slot)]
        images.complete(0, slot, snapshot(step), upload=False)
        assert images.uploading() == ("g1",) and images.saved() == []
        assert max(held.step for held in images.held()) == step
        assert next_slot != slot
    images.uploaded(0, 0, failure=None)
    assert images.take_offers() == [(0, 0)], "step 10 is older than step 12"
    images.complete(0, 0, snapshot(14), upload=False)
    assert {held.step for held in images.held()} == {12, 13, 14} and images.failed() == []


def test_of_failed_uploads_the_newest_of_each_rank_may_be_tried_again() -> None:
    images = NodeImages()
    images.start_generation([0, 1], None)
    images.take_offers()
    for rank in (0, 1):
        images.complete(rank, 0, snapshot(10), upload=True)
        images.uploaded(rank, 0, failure="denied")
    assert [(each.rank, each.slot, each.failure) for each in images.failed()] == [(0, 0, "denied"), (1, 0, "denied")]
    assert images.take_offers() == [(0, 1), (1, 1)], "the failed ones are the newest"

    images.complete(0, 1, snapshot(20), upload=True)
    assert [each.rank for each in images.failed()] == [1], "a newer one of rank 0 is on its way"
    images.uploaded(0, 1, failure="denied again")
    assert [(each.rank, each.snapshot.info.step) for each in images.failed()] == [(0, 20), (1, 10)]
    images.uploaded(1, 0, failure=None)
    assert [each.rank for each in images.failed()] == [0]

    images.start_generation([0, 1], HeldImages("g1", 20, (0,), WORLD))
    assert [each.rank for each in images.failed()] == [0], "the next generation starts from it"
    assert images.saved() == []
    images.start_generation([0, 1], None)
    assert images.failed() == []
