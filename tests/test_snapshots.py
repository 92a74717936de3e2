"""A rank's snapshots where shared memory is short: refused to a run that begins, left out by one that goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from raynium.engines.base import FakeEngine
from raynium.errors import SnapshotMemoryShort
from raynium.rank import snapshots as snapshots_module
from raynium.rank.snapshots import NoSnapshots, Snapshots
from raynium.train.guard import Guard
from raynium.train.link import MemoryLink
from raynium.train.patience import Patience


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Memory:
    """What the node has, as the test says."""

    is_there = True

    def __call__(self) -> bool:
        return self.is_there


def test_a_run_that_begins_is_refused_memory_that_is_not_there(tmp_path: Path) -> None:
    memory = Memory()
    memory.is_there = False
    with pytest.raises(SnapshotMemoryShort, match="a snapshot needs shared memory"):
        Snapshots(FakeEngine(), MemoryLink(), tmp_path, Guard(), Patience(), if_busy="wait", has_memory=memory)


def test_a_run_that_goes_on_leaves_saves_out_until_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory, link = Memory(), MemoryLink()
    memory.is_there = False
    snapshots = Snapshots(
        FakeEngine(), link, tmp_path, Guard(), Patience(), if_busy="wait", if_short="skip", has_memory=memory
    )
    assert "no snapshot is taken until there is memory for it" in caplog.text
    assert [snapshots.wants_to_skip(upload=upload) for upload in (True, False)] == [True, True]
    # The last save is not left out.
    with pytest.raises(SnapshotMemoryShort):
        snapshots.save(5, upload=True)
    memory.is_there = True
    assert not snapshots.wants_to_skip(upload=True)
    memory.is_there = False
    assert not snapshots.wants_to_skip(upload=True), "what it has it keeps"
    snapshots.save(6, upload=True)
    assert len(link.images) == 1
    assert link.steps[6].keys() == {"checkpoint/stall_seconds", "checkpoint/wait_seconds"}


def test_what_a_save_cost_is_told_before_its_image_may_leave_the_node(tmp_path: Path) -> None:
    """Whoever goes on from it does not take the step again."""
    told = list[str]()

    class Link(MemoryLink):
        def step(self, step: int, metrics: dict[str, float]) -> None:
            told.append(f"{step}: {', '.join(metrics)}")

        def image(self, slot: int, info: str, replicas: str, *, upload: bool) -> None:
            told.append("image")

    snapshots = Snapshots(FakeEngine(), Link(), tmp_path, Guard(), Patience(), if_busy="wait")
    snapshots.save(3, upload=False)
    assert told == ["3: snapshot/stall_seconds", "image"]


def test_ranks_that_save_nothing_do_not_seem_to_save() -> None:
    link = MemoryLink()
    link.phase("save", 3)
    NoSnapshots(link).save(3, upload=True)
    assert link.phases[-1] == ("fetch", 4)


def test_a_run_that_goes_on_without_memory_for_too_long_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    memory.is_there = False
    snapshots = Snapshots(
        FakeEngine(), MemoryLink(), tmp_path, Guard(), Patience(), if_busy="skip", if_short="skip", has_memory=memory
    )
    monkeypatch.setattr(snapshots_module, "MEMORY_SECONDS", 0.0)
    with pytest.raises(SnapshotMemoryShort):
        snapshots.wants_to_skip(upload=True)
