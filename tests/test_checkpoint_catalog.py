"""Which checkpoints a run has, which one it goes on from, and their tags."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from raynium.checkpoint.catalog import (
    CheckpointSummary,
    ResumePoint,
    add_tag,
    checkpoint_tags,
    choose_checkpoint,
    latest,
    list_checkpoints,
    open_checkpoint,
    remove_tag,
    resume_point,
    set_aside,
)
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.format.manifest import CheckpointTooNew, manifest_key
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.errors import CheckpointDamaged, CheckpointError
from raynium.storage.checksum import checksum, to_text
from raynium.storage.store import Store


def upload(store: Store, folder: Path, step: int, generation: str = "g1"):
    """One rank's shard: a tensor full of its step."""
    chunks = [Chunk("model/w", (3,), (0,), torch.full((3,), float(step)), saved_here=True)]
    plan = plan_image(chunks)
    with ImageFile(folder / "image") as image:
        write_image(plan, chunks, image.reserve(plan.size), step=step)
    return upload_shard(store, plan.info(step=step, path=image.path), generation=generation, rank=0)


def save(store: Store, folder: Path, step: int, generation: str = "g1", **fields: Any) -> None:
    entry = upload(store, folder, step, generation)
    commit_checkpoint(
        store, step=step, generation=generation, entries=[entry], state={}, world_size=1, layout={}, **fields
    )


def damage(store: Store, step: int) -> None:
    store.replace(manifest_key(step), store.read(manifest_key(step))[:-9])


def lose_data(store: Store, step: int) -> None:
    store.delete(open_checkpoint(store, step).shard_key(0))


def make_newer_format(store: Store, step: int) -> None:
    rest = json.dumps({"next": "generation"}).encode()[1:]
    crc = to_text(checksum(b"9\n" + rest))
    head = f'{{"format":"raynium-checkpoint","version":9,"crc64nvme":"{crc}",\n'
    store.replace(manifest_key(step), head.encode() + rest)


def steps(store: Store) -> list[int]:
    return [summary.step for summary in list_checkpoints(store)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- reading


def test_a_run_without_checkpoints(store: Store) -> None:
    assert latest(store) is None and list_checkpoints(store) == []
    for policy in ("stop", "use_older"):
        assert resume_point(store, if_damaged=policy) == ResumePoint(None)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        choose_checkpoint(store)


def test_the_newest_is_the_highest_step_that_was_committed(store: Store, tmp_path: Path) -> None:
    for step in (20, 100_000, 3):
        save(store, tmp_path, step)
    upload(store, tmp_path, 200_000)
    store.replace("checkpoints/notes", b"somebody else's")
    store.replace("checkpoints/step-7/manifest.json", b"not one of our names")
    ref = latest(store)
    assert ref is not None and ref.step == 100_000 and ref.uri == store.uri("checkpoints/step-000100000")
    assert steps(store) == [3, 20, 100_000]
    assert choose_checkpoint(store).step == 100_000 and choose_checkpoint(store, 3).step == 3


def test_a_listing_tells_what_manifests_and_folders_say(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10, metrics={"eval/loss": 2.5})
    save(store, tmp_path, 20)
    save(store, tmp_path, 30)
    add_tag(store, 10, "b")
    add_tag(store, 10, "a")
    damage(store, 20)
    make_newer_format(store, 30)
    first, damaged, newer = list_checkpoints(store)
    assert first == CheckpointSummary(
        10, "g1", 4096 + 12, open_checkpoint(store, 10).manifest.committed_unix, 1, {"eval/loss": 2.5}, ("a", "b")
    )
    assert (damaged.step, damaged.condition, newer.step, newer.condition) == (20, "damaged", 30, "too new")
    assert "is damaged: its crc64nvme" in str(damaged.problem) and "has format version 9" in str(newer.problem)


def test_a_listing_of_the_same_store_sees_what_changed(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    assert steps(store) == [10, 20]
    set_aside(store, 20)
    save(store, tmp_path, 20, "g2")
    damage(store, 10)
    save(store, tmp_path, 30)
    assert [(each.step, each.generation, each.condition) for each in list_checkpoints(store)] == [
        (10, "", "damaged"), (20, "g2", "whole"), (30, "g1", "whole"),
    ]  # fmt: skip


def test_a_manifest_copied_to_another_step_is_refused(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    store.write_new(manifest_key(11), store.read(manifest_key(10)))
    with pytest.raises(CheckpointDamaged, match="says that it is of step 10"):
        open_checkpoint(store, 11)


# ------------------------------------------------------------------------------------------------- damage


def test_readers_are_not_given_an_older_one_silently(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        save(store, tmp_path, step)
    damage(store, 20)
    damage(store, 30)
    for read in (latest, choose_checkpoint):
        with pytest.raises(
            CheckpointDamaged, match=r"of step 30, is damaged, and so is that of step 20\. That of step 10 is whole: "
        ):
            read(store)
    assert not caplog.records
    ref = latest(store, if_damaged="use_older")
    assert ref is not None and ref.step == 10
    assert caplog.text.count("CHECKPOINT DAMAGED: using step 10 instead of step") == 2
    assert steps(store) == [10, 20, 30], "reading changes nothing"
    damage(store, 10)
    for policy in ("stop", "use_older"):
        with pytest.raises(CheckpointDamaged, match="There is no older whole one"):
            latest(store, if_damaged=policy)


@pytest.mark.parametrize("harm", [damage, lose_data])
def test_a_run_stops_at_damage_and_is_told_what_it_can_do(store: Store, tmp_path: Path, harm: Any) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    harm(store, 20)
    before = store.list().sizes
    with pytest.raises(CheckpointDamaged) as error:
        resume_point(store, if_damaged="stop")
    text = str(error.value)
    assert text.startswith(f"the newest checkpoint of {store.url}, of step 20, is damaged. That of step 10 is whole: ")
    assert "set checkpoint.if_damaged=use_older, or remove the damaged one with" in text
    assert "`raynium checkpoints rm run@20 --force`" in text
    assert ("manifest.json is damaged" if harm is damage else "shard-00000.safetensors is missing") in text
    assert store.list().sizes == before


@pytest.mark.parametrize("harm", [damage, lose_data])
def test_a_run_may_go_on_from_an_older_one_and_save_the_damaged_step_again(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any
) -> None:
    for step in (10, 20, 30):
        save(store, tmp_path, step)
    harm(store, 20)
    harm(store, 30)
    point = resume_point(store, if_damaged="use_older")
    assert point.checkpoint is not None and point.checkpoint.step == 10 and steps(store) == [10]
    newest, older = point.set_aside
    aside = store.uri("checkpoints/step-000000030/manifest-damaged.json")
    assert newest.startswith(f"step 30 is set aside as {aside}, and the run goes on from step 10 ")
    assert older.startswith("step 20 is set aside as ") and caplog.text.count("CHECKPOINT DAMAGED: ") == 2
    assert store.exists("checkpoints/step-000000030/manifest-damaged.json")
    save(store, tmp_path, 20, "g2")
    point = resume_point(store, if_damaged="stop")
    assert point.checkpoint is not None and point.checkpoint.manifest.generation == "g2" and not point.set_aside


@pytest.mark.parametrize("policy", ["stop", "use_older"])
def test_nothing_whole_is_never_a_reason_to_begin_again(store: Store, tmp_path: Path, policy: Any) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    damage(store, 10)
    lose_data(store, 20)
    with pytest.raises(
        CheckpointDamaged, match=r"of step 20, is damaged, and so is that of step 10\. There is no older whole one: put"
    ):
        resume_point(store, if_damaged=policy)
    assert steps(store) == [10, 20]


def test_damage_below_the_newest_is_nobodys_business(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    damage(store, 10)
    point = resume_point(store, if_damaged="stop")
    assert point.checkpoint is not None and point.checkpoint.step == 20 and point.set_aside == ()


def test_a_newer_format_is_not_passed_over(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    save(store, tmp_path, 20)
    make_newer_format(store, 20)
    for policy in ("stop", "use_older"):
        for read in (latest, resume_point):
            with pytest.raises(CheckpointTooNew, match=r"step-000000020/manifest.json has format version 9"):
                read(store, if_damaged=policy)
    assert steps(store) == [10, 20]


def test_two_may_set_aside_the_same_checkpoint(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    assert set_aside(store, 10) == set_aside(store, 10) == store.uri("checkpoints/step-000000010/manifest-damaged.json")
    assert steps(store) == [] and latest(store) is None


# ------------------------------------------------------------------------------------------------- tags


def test_tags_come_and_go(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 10)
    for tag in ("release", "before-the-spike", "release"):
        add_tag(store, 10, tag)
    assert checkpoint_tags(store, 10) == ("before-the-spike", "release")
    assert open_checkpoint(store, 10).step == 10 and list_checkpoints(store)[0].tags == checkpoint_tags(store, 10)
    remove_tag(store, 10, "release")
    assert checkpoint_tags(store, 10) == ("before-the-spike",) and checkpoint_tags(store, 20) == ()
    with pytest.raises(CheckpointError, match=r"step 10 of .* has no tag 'release': it has before-the-spike"):
        remove_tag(store, 10, "release")
    with pytest.raises(CheckpointError, match=r"step 20 of .* has no tag 'release': it has none"):
        remove_tag(store, 20, "release")


@pytest.mark.parametrize("tag", ["", "-a", ".a", "two words", "a/b", "../a", "a\n", "é", "a" * 64])
def test_what_is_no_tag_is_refused(store: Store, tmp_path: Path, tag: str) -> None:
    save(store, tmp_path, 10)
    for change in (add_tag, remove_tag):
        with pytest.raises(CheckpointError, match=re.escape(f"{tag!r} is not a tag: use 1 to 63 letters")):
            change(store, 10, tag)


def test_only_a_checkpoint_can_be_tagged(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(store, tmp_path, 10)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 10: it has none"):
        add_tag(store, 10, "release")
    save(store, tmp_path, 20)
    replace = Store.replace

    def replace_too_late(self: Store, key: str, data: bytes) -> None:
        replace(self, key, data)
        self.delete(manifest_key(20))  # as retention does at the same moment

    monkeypatch.setattr(Store, "replace", replace_too_late)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 20: it has none"):
        add_tag(store, 20, "release")
    assert checkpoint_tags(store, 20) == ()
