"""Which checkpoints are kept, and what may be deleted when."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from raynium.checkpoint.catalog import (
    apply_retention,
    delete_checkpoint,
    expired,
    latest,
    list_checkpoints,
    open_checkpoint,
    resume_point,
)
from raynium.checkpoint.checksum import checksum, to_text
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.image import ImageFile, plan_image, write_image
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.manifest import CheckpointTooNew, manifest_key
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.store import Store
from raynium.checkpoint.upload import upload_shard
from raynium.errors import CheckpointDamaged


def upload(store: Store, folder: Path, step: int, generation: str = "g1"):
    """One rank's shard: a tensor full of its step."""
    chunks = [Chunk("model/w", (3,), (0,), torch.full((3,), float(step)), saved_here=True)]
    plan = plan_image(chunks)
    with ImageFile(folder / "image") as image:
        write_image(plan, chunks, image.reserve(plan.size))
    return upload_shard(store, plan.info(step=step, path=image.path), generation=generation, rank=0)


def save(store: Store, folder: Path, step: int, generation: str = "g1") -> None:
    entry = upload(store, folder, step, generation)
    commit_checkpoint(store, step=step, generation=generation, entries=[entry], state={}, world_size=1, layout={})


def damage(store: Store, step: int) -> None:
    store.replace(manifest_key(step), store.read(manifest_key(step))[:-9])


def make_newer_format(store: Store, step: int) -> None:
    rest = json.dumps({"next": "generation"}).encode()[1:]
    crc = to_text(checksum(b"2\n" + rest))
    head = f'{{"format":"raynium-checkpoint","version":2,"crc64nvme":"{crc}",\n'
    store.replace(manifest_key(step), head.encode() + rest)


def steps(store: Store) -> list[int]:
    return [summary.step for summary in list_checkpoints(store)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def test_expired_over_a_whole_run() -> None:
    kept: list[int] = []
    history = []
    for step in range(10, 70, 10):
        kept = [s for s in [*kept, step] if s not in expired([*kept, step], keep_last=2)]
        history.append(tuple(kept))
    assert history == [(10,), (10, 20), (20, 30), (30, 40), (40, 50), (50, 60)]
    assert expired([3, 1, 2], keep_last=1) == [1, 2] and expired([], keep_last=3) == []


def test_a_run_keeps_its_newest_checkpoints(store: Store, tmp_path: Path) -> None:
    deleted = []
    for step in (10, 20, 30, 40):
        save(store, tmp_path, step)
        deleted.append(apply_retention(store, keep_last=2, generation="g1"))
    assert deleted == [[], [], [10], [20]] and steps(store) == [30, 40]
    assert sorted({key.split("/")[1] for key in store.list().sizes}) == ["step-000000030", "step-000000040"]
    newest = list_checkpoints(store)[-1]
    assert newest.num_bytes == 4096 + 12 and newest.generation == "g1" and newest.committed_unix > 1.7e9


def test_what_crashed_saves_left_is_collected_once_it_is_safe(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        upload(store, tmp_path, step, "g1")  # the dead generation never committed these
    upload(store, tmp_path, 10, "g2")  # the living one may still be at it
    save(store, tmp_path, 20, "g2")
    apply_retention(store, keep_last=2, generation="g2")
    found = {
        key.removeprefix("checkpoints/step-0000000").removesuffix("/shard-00000.safetensors")
        for key in store.list().sizes
    }
    # of step 10 only the living generation's is left; nothing at or above the newest commit is touched
    assert found == {"10/g2", "20/g1", "20/g2", "20/manifest.json", "30/g1"}

    save(store, tmp_path, 40, "g3")
    apply_retention(store, keep_last=2, generation="g3")
    found = {"/".join(key.split("/")[1:3]) for key in store.list().sizes}
    assert found == {
        "step-000000020/g2", "step-000000020/manifest.json", "step-000000040/g3", "step-000000040/manifest.json",
    }  # fmt: skip
    assert read_tensors(open_checkpoint(store, 20))["model/w"].tolist() == [20.0] * 3


def test_damaged_checkpoints_do_not_count_as_kept(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(store, tmp_path, step)
    damage(store, 10)
    damage(store, 30)
    assert [bool(summary.problem) for summary in list_checkpoints(store)] == [True, False, True, False]
    assert apply_retention(store, keep_last=2, generation="g1") == [10]
    assert steps(store) == [20, 30, 40]  # 30 stays for people to look at until it is older than what is kept

    damage(store, 20)
    damage(store, 40)
    assert latest(store) is None and apply_retention(store, keep_last=1, generation="g1") == []
    assert steps(store) == [20, 30, 40]


def test_a_newer_format_is_neither_skipped_nor_deleted(store: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(store, tmp_path, step)
    make_newer_format(store, 10)
    make_newer_format(store, 30)
    for read in (latest, resume_point):
        with pytest.raises(CheckpointTooNew, match=r"step-000000030/manifest.json has format version 2"):
            read(store)
    assert apply_retention(store, keep_last=1, generation="g9") == [] and steps(store) == [10, 20, 30]


def test_a_damaged_step_can_be_saved_again(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    damage(store, 20)
    with caplog.at_level(logging.WARNING):
        ref = resume_point(store)
    assert ref is not None and ref.step == 10 and steps(store) == [10]
    assert re.search("setting aside the damaged checkpoint .*000000020", caplog.text)
    assert store.exists("checkpoints/step-000000020/manifest-damaged.json")
    save(store, tmp_path, 20, "g2")
    ref = resume_point(store)
    assert ref is not None and ref.manifest.generation == "g2"


def test_a_run_without_checkpoints(store: Store) -> None:
    assert latest(store) is None and resume_point(store) is None and list_checkpoints(store) == []
    assert apply_retention(store, keep_last=1, generation="g1") == []


def test_a_manifest_copied_to_another_step_is_refused(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    store.write_new(manifest_key(11), store.read(manifest_key(10)))
    with pytest.raises(CheckpointDamaged, match="says that it is of step 10"):
        open_checkpoint(store, 11)


def test_an_interrupted_deletion_leaves_no_broken_checkpoint(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    monkeypatch.setattr(store, "delete_prefix", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(store, 10)
    monkeypatch.undo()
    assert steps(store) == [20]
    apply_retention(store, keep_last=5, generation="g2")
    assert not store.list("checkpoints/step-000000010").sizes
