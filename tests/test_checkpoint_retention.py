"""Which checkpoints are kept, what may be deleted when, and that nothing else is."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import job_text

from raynium.checkpoint.catalog import (
    CheckpointSummary,
    Condition,
    add_tag,
    delete_checkpoint,
    latest,
    list_checkpoints,
    open_checkpoint,
    remove_tag,
    resume_point,
)
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.format.manifest import CheckpointTooNew, manifest_key
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.retention import Removed, Retention, apply_retention, expired, reasons_to_keep
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.config.load import parse_config
from raynium.errors import CheckpointDamaged, StoreError
from raynium.storage.checksum import checksum, to_text
from raynium.storage.store import Store

LAST_TWO = Retention(keep_last=2)
HOUR = 3600.0


# ------------------------------------------------------------------------------------------------- the policy


def checkpoint(
    step: int, loss: float | None = None, *tags: str, bits: float | None = None, condition: Condition = "whole"
) -> CheckpointSummary:
    found = {"eval/loss": loss, "eval/bits_per_byte": bits}
    metrics = {name: value for name, value in found.items() if value is not None}
    return CheckpointSummary(step, "g1", 0, 0.0, 1, metrics=metrics, tags=tags, condition=condition)


def kept_over_time(policy: Retention, run: list[CheckpointSummary]) -> list[list[int]]:
    """The steps that are there after each save of a run that deletes what expires."""
    history, there = [], []
    for each in run:
        there.append(each)
        gone = expired(there, policy)
        there = [one for one in there if one.step not in gone]
        history.append([one.step for one in there])
    return history


def test_the_last_are_kept() -> None:
    run = [checkpoint(step) for step in range(10, 60, 10)]
    assert kept_over_time(LAST_TWO, run) == [[10], [10, 20], [20, 30], [30, 40], [40, 50]]
    assert expired([checkpoint(3), checkpoint(1), checkpoint(2)], Retention(1)) == [1, 2]
    assert expired([], Retention(3)) == []


def test_multiples_and_tagged_ones_are_kept_for_ever() -> None:
    policy = Retention(keep_last=2, keep_every_steps=30)
    run = [checkpoint(step, None, *(["release"] if step == 40 else [])) for step in range(0, 100, 10)]
    assert kept_over_time(policy, run) == [
        [0], [0, 10], [0, 10, 20], [0, 20, 30], [0, 30, 40], [0, 30, 40, 50], [0, 30, 40, 50, 60],
        [0, 30, 40, 60, 70], [0, 30, 40, 60, 70, 80], [0, 30, 40, 60, 80, 90],
    ]  # fmt: skip


def test_where_high_is_good_the_highest_are_kept() -> None:
    policy = Retention(keep_last=1, keep_best=1, best_metric="eval/bits_per_byte", best_is="highest")
    run = [checkpoint(step, bits=bits) for step, bits in ((10, 0.5), (20, 0.75), (30, 0.25), (40, 0.75), (50, 0.5))]
    # Of equals the newer is kept.
    assert kept_over_time(policy, run) == [[10], [20], [20, 30], [40], [40, 50]]
    assert reasons_to_keep(run, policy)[40] == ("best eval/bits_per_byte",)
    section = parse_config(job_text({"checkpoint.best_metric": "eval/arc/acc"})).checkpoint
    assert Retention.of(section).best_is == "highest"


def test_the_best_are_kept_until_better_ones_come() -> None:
    policy = Retention(keep_last=1, keep_best=2)
    losses = [(10, 5.0), (20, None), (30, 3.0), (40, 4.0), (50, 3.0), (60, None), (70, 2.0), (80, 9.0)]
    assert kept_over_time(policy, [checkpoint(step, loss) for step, loss in losses]) == [
        [10],
        [10, 20],  # the newest, and the only one that was evaluated
        [10, 30],
        [30, 40],
        [30, 50],  # equal ones both fit
        [30, 50, 60],
        [50, 70],  # of equals the newer stays
        [50, 70, 80],
    ]
    by_bits = Retention(keep_last=1, keep_best=1, best_metric="eval/bits_per_byte")
    run = [checkpoint(1, 1.0, bits=9.0), checkpoint(2, 2.0, bits=8.0)]
    assert reasons_to_keep([*run, checkpoint(3)], by_bits) == {1: (), 2: ("best eval/bits_per_byte",), 3: ("last",)}


def test_a_run_that_gets_worse_does_not_push_its_best_checkpoint_out_by_default() -> None:
    policy = Retention.of(parse_config(job_text()).checkpoint)
    run = [checkpoint(step, loss) for step, loss in ((10, 3.0), (20, 2.0), (30, 4.0), (40, 7.0))]
    # Where its evaluations are no numbers any more there are none.
    run += [checkpoint(50), checkpoint(60)]
    assert kept_over_time(policy, run) == [[10], [10, 20], [20, 30], [20, 30, 40], [20, 40, 50], [20, 50, 60]]


def test_every_reason_is_told() -> None:
    policy = Retention(keep_last=1, keep_every_steps=1000, keep_best=1)
    found = [checkpoint(1000), checkpoint(1500, 2.0, "v1", "v2"), checkpoint(1700), checkpoint(2000, 1.0)]
    assert reasons_to_keep(found, policy) == {
        1000: ("every 1,000 steps",),
        1500: ("tag v1", "tag v2"),
        1700: (),
        2000: ("last", "every 1,000 steps", "best eval/loss"),
    }


def test_what_cannot_be_used_does_not_count_and_damage_stays_as_long_as_it_is_recent() -> None:
    run = [checkpoint(step, condition="damaged" if step in (10, 30) else "whole") for step in range(10, 70, 10)]
    assert kept_over_time(LAST_TWO, run) == [[10], [20], [20, 30], [20, 30, 40], [40, 50], [50, 60]]
    found = [checkpoint(1, condition="damaged"), checkpoint(2, None, "why", condition="damaged"), checkpoint(3)]
    assert expired(found, Retention(1)) == [1]
    assert reasons_to_keep([checkpoint(5, condition="damaged")], LAST_TWO) == {5: ("damaged",)}
    newer = [checkpoint(1, condition="too new"), checkpoint(2), checkpoint(3)]
    assert reasons_to_keep(newer, Retention(1)) == {1: ("newer format",), 2: (), 3: ("last",)}


def test_the_policy_is_the_configs() -> None:
    section = parse_config("""
        run: {name: first}
        model: {vocab_size: 64, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16,
                ffn_size: 64, max_seq_len: 16}
        data: {path: /nowhere, seq_len: 16}
        train: {steps: 6, global_batch_size: 4}
        checkpoint: {keep_last: 3, keep_every_steps: 500, keep_best: 4, best_metric: eval/bits_per_byte}
    """).checkpoint
    assert Retention.of(section) == Retention(3, 500, 4, "eval/bits_per_byte")
    with pytest.raises(AssertionError, match="never deleted"):
        Retention(keep_last=0)


checkpoints = st.lists(
    st.builds(
        checkpoint,
        st.integers(0, 60),
        st.none() | st.floats(-5, 5),
        condition=st.sampled_from(["whole", "whole", "whole", "damaged", "too new"]),
    ),
    unique_by=lambda each: each.step,
    max_size=20,
)
policies = st.builds(Retention, st.integers(1, 4), st.none() | st.integers(1, 20), st.integers(0, 4))


@given(checkpoints, policies)
def test_whatever_a_run_has(found: list[CheckpointSummary], policy: Retention) -> None:
    gone = expired(found, policy)
    whole = sorted(each.step for each in found if each.condition == "whole")
    assert gone == sorted(gone) and not set(gone) & set(whole[-policy.keep_last :])
    assert not any(each.condition == "too new" for each in found if each.step in gone)
    left = [each for each in found if each.step not in gone]
    assert expired(left, policy) == [], "what was kept is kept again"
    assert expired(found[::-1], policy) == gone, "order does not matter"
    scores = sorted(each.metrics["eval/loss"] for each in found if each.condition == "whole" and each.metrics)
    left_scores = sorted(each.metrics["eval/loss"] for each in left if each.condition == "whole" and each.metrics)
    assert left_scores[: policy.keep_best] == scores[: policy.keep_best], "no better one was deleted"


@given(checkpoints, policies, st.integers(61, 99))
def test_one_more_save_never_brings_an_older_one_into_need(
    found: list[CheckpointSummary], policy: Retention, step: int
) -> None:
    """Else deleting after each save would differ from deciding at the end."""
    after = [*found, checkpoint(step)]
    assert set(expired([each for each in found if each.condition == "whole"], policy)) <= set(expired(after, policy))


# ------------------------------------------------------------------------------------------------- deleting


def upload(store: Store, folder: Path, step: int, generation: str = "g1", rank: int = 0):
    """One rank's shard: a tensor full of its step."""
    chunks = [Chunk(f"model/w{rank}", (3,), (0,), torch.full((3,), float(step)), saved_here=True)]
    plan = plan_image(chunks)
    with ImageFile(folder / f"image-{generation}-{rank}") as image:
        write_image(plan, chunks, image.reserve(plan.size), step=step)
        try:
            return upload_shard(store, plan.info(step=step, path=image.path), generation=generation, rank=rank)
        finally:
            image.unlink()


def save(store: Store, folder: Path, step: int, generation: str = "g1", **fields: Any) -> None:
    entries = [upload(store, folder, step, generation, rank) for rank in range(fields.pop("num_ranks", 1))]
    commit_checkpoint(
        store, step=step, generation=generation, entries=entries, state={}, world_size=len(entries), layout={}, **fields
    )


def retain(store: Store, policy: Retention = LAST_TWO, *living: str, later: float = 0.0) -> Removed:
    """Right after a save of generation g1, or `later` seconds after it."""
    return apply_retention(store, policy=policy, living=living or ["g1"], now_unix=time.time() + later)


def found_in(store: Store) -> set[str]:
    """What is there, in short: "20/manifest.json", "20/g1" for its shards."""
    keys = (key.removeprefix("checkpoints/step-0000000").rpartition("/shard-") for key in store.list().sizes)
    return {folder or name for folder, _, name in keys}


def steps(store: Store) -> list[int]:
    return [each.step for each in list_checkpoints(store)]


def path_of(store: Store, key: str) -> Path:
    return Path(store.uri(key).removeprefix("file://"))


def age(store: Store, step: int, generation: str, seconds: float) -> None:
    """Makes the files of a save look as old as that."""
    then = time.time() - seconds
    for path in path_of(store, f"checkpoints/step-{step:09d}/{generation}").iterdir():
        os.utime(path, (then, then))


def damage(store: Store, step: int) -> None:
    store.replace(manifest_key(step), store.read(manifest_key(step))[:-9])


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty run's store, of each kind."""
    if request.param == "file":
        return Store(tmp_path / "run")
    server = request.getfixturevalue("s3_server")
    bucket = f"retention-{abs(hash(request.node.name)) % 10**9}"
    return Store(f"{server.create_bucket(bucket)}/runs/first", options=server.options)


def test_a_run_keeps_what_its_policy_says(store: Store, tmp_path: Path) -> None:
    policy = Retention(keep_last=1, keep_every_steps=30, keep_best=1)
    losses = {10: 4.0, 20: 3.0, 30: 5.0, 40: 6.0, 50: 2.0}
    removed = []
    for step, loss in losses.items():
        save(store, tmp_path, step, metrics={"eval/loss": loss})
        removed.append(retain(store, policy).steps)
        if step == 30:
            add_tag(store, 20, "release")
    assert removed == [(), (10,), (), (), (40,)]
    assert found_in(store) == {
        "20/g1", "20/manifest.json", "20/tag-release", "30/g1", "30/manifest.json", "50/g1", "50/manifest.json",
    }  # fmt: skip
    for step in (20, 30, 50):
        assert read_tensors(open_checkpoint(store, step))["model/w0"].tolist() == [float(step)] * 3


def test_what_crashed_saves_left_goes_after_its_grace(local: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        upload(local, tmp_path, step, "dead")
    upload(local, tmp_path, 10, "living")
    upload(local, tmp_path, 40, "living")
    save(local, tmp_path, 20, "winner")
    everything = found_in(local)
    assert retain(local, LAST_TWO, "winner", "living") == Removed() and found_in(local) == everything
    age(local, 30, "dead", 2 * HOUR)
    age(local, 10, "living", 2 * HOUR)
    age(local, 20, "winner", 2 * HOUR)
    assert retain(local, LAST_TWO, "living").abandoned == ("checkpoints/step-000000030/dead",)
    assert found_in(local) == everything - {"30/dead"}
    assert retain(local, LAST_TWO, "living", later=2 * HOUR).abandoned == (
        "checkpoints/step-000000010/dead",
        "checkpoints/step-000000020/dead",
    )
    assert found_in(local) == {"10/living", "20/winner", "20/manifest.json", "40/living"}
    assert retain(local, LAST_TWO, "living", later=21 * HOUR) == Removed()
    assert retain(local, LAST_TWO, "living", later=23 * HOUR).abandoned == ("checkpoints/step-000000010/living",)
    assert found_in(local) == {"20/winner", "20/manifest.json", "40/living"}
    assert read_tensors(open_checkpoint(local, 20))["model/w0"].tolist() == [20.0] * 3


@pytest.mark.parametrize("name", ["notes/plan.txt", "my notes/plan.txt", "g1/notes.txt", "notes/shard-1.safetensors"])
def test_what_people_put_beside_a_checkpoint_is_no_unfinished_save(local: Store, tmp_path: Path, name: str) -> None:
    save(local, tmp_path, 20)
    theirs = path_of(local, "checkpoints/step-000000020") / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("keep")
    upload(local, tmp_path, 20, "dead")
    assert retain(local, LAST_TWO, later=48 * HOUR).abandoned == ("checkpoints/step-000000020/dead",)
    assert theirs.exists()


def test_one_recent_file_keeps_a_whole_generation(local: Store, tmp_path: Path) -> None:
    for rank in (0, 2):
        upload(local, tmp_path, 10, "slow", rank)
    age(local, 10, "slow", 5 * HOUR)
    upload(local, tmp_path, 10, "slow", 1)  # one rank has just ended
    assert retain(local) == Removed()
    age(local, 10, "slow", 5 * HOUR)
    assert retain(local).abandoned == ("checkpoints/step-000000010/slow",) and found_in(local) == set()


def test_a_run_that_never_committed_is_cleaned_too(store: Store, tmp_path: Path) -> None:
    upload(store, tmp_path, 10, "dead")
    assert retain(store, LAST_TWO) == Removed() and found_in(store) == {"10/dead"}
    assert retain(store, LAST_TWO, later=2 * HOUR).abandoned == ("checkpoints/step-000000010/dead",)
    assert found_in(store) == set() and latest(store) is None


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_nothing_is_deleted_while_the_newest_is_not_whole(local: Store, tmp_path: Path, harm: str) -> None:
    for step in (10, 20, 30):
        save(local, tmp_path, step)
    upload(local, tmp_path, 5, "dead")
    shard = path_of(local, "checkpoints/step-000000030/g1/shard-00000.safetensors")
    data = shard.read_bytes()
    shard.unlink()
    if harm == "cut":
        shard.write_bytes(data[:-1])
    everything = found_in(local)
    with pytest.raises(CheckpointDamaged, match=r"no older checkpoint is deleted, .*\n.*step-000000030/g1/shard-00000"):
        retain(local, Retention(1), "g9", later=9 * HOUR)
    assert found_in(local) == everything
    shard.write_bytes(data)
    assert retain(local, Retention(1)).steps == (10, 20)


@pytest.mark.s3
def test_a_replaced_object_of_the_newest_is_noticed_by_the_servers_checksum(s3_server: Any, tmp_path: Path) -> None:
    store = Store(f"{s3_server.create_bucket('replaced')}/runs/first", options=s3_server.options)
    for step in (10, 20):
        save(store, tmp_path, step)
    key = open_checkpoint(store, 20).shard_key(0)
    store.replace(key, store.read(key)[:-1] + b"x")  # the size is the same
    with pytest.raises(CheckpointDamaged, match="is stored with CRC64NVME"):
        retain(store, Retention(1))
    with pytest.raises(CheckpointDamaged, match=r"step 10 is whole: .*if_damaged=use_older"):
        resume_point(store, if_damaged="stop")
    assert steps(store) == [10, 20]
    point = resume_point(store, if_damaged="use_older")
    assert point.checkpoint is not None and point.checkpoint.step == 10 and len(point.set_aside) == 1


def make_newer_format(store: Store, step: int) -> None:
    rest = json.dumps({"next": "generation"}).encode()[1:]
    crc = to_text(checksum(b"9\n" + rest))
    store.replace(
        manifest_key(step), f'{{"format":"raynium-checkpoint","version":9,"crc64nvme":"{crc}",\n'.encode() + rest
    )


def test_a_newest_of_a_newer_format_deletes_nothing(local: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(local, tmp_path, step)
    make_newer_format(local, 10)
    assert retain(local, Retention(1)).steps == (20,) and steps(local) == [10, 30]
    save(local, tmp_path, 40)
    make_newer_format(local, 40)
    with pytest.raises(CheckpointTooNew, match="step-000000040"):
        retain(local, Retention(1))
    assert steps(local) == [10, 30, 40]


def test_a_manifest_that_cannot_be_read_protects_its_files(local: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(local, tmp_path, step)
    damage(local, 20)
    upload(local, tmp_path, 20, "dead")
    assert retain(local, LAST_TWO, "g9", later=9 * HOUR) == Removed()
    save(local, tmp_path, 40)
    assert retain(local, LAST_TWO, "g9").steps == (10, 20), "all of the last are newer"
    assert found_in(local) == {"30/g1", "30/manifest.json", "40/g1", "40/manifest.json"}


def test_what_was_set_aside_stays_as_long_as_it_is_recent(local: Store, tmp_path: Path) -> None:
    for step in (10, 20):
        save(local, tmp_path, step)
    damage(local, 20)
    resume_point(local, if_damaged="use_older")
    aside = {"20/g1", "20/manifest-damaged.json"}
    assert retain(local, LAST_TWO, "g2", later=9 * HOUR) == Removed() and aside <= found_in(local)
    save(local, tmp_path, 20, "g2")
    save(local, tmp_path, 30, "g2")
    assert retain(local, Retention(3), "g2", later=9 * HOUR) == Removed() and aside <= found_in(local)
    assert retain(local, Retention(2, keep_every_steps=20), "g2", later=9 * HOUR).steps == (10,)
    save(local, tmp_path, 40, "g2")
    add_tag(local, 20, "look")
    assert retain(local, Retention(2, keep_every_steps=20), "g2", later=9 * HOUR) == Removed()
    remove_tag(local, 20, "look")
    removed = retain(local, Retention(2, keep_every_steps=20), "g2", later=9 * HOUR)
    assert removed == Removed(abandoned=("checkpoints/step-000000020/g1",))
    assert {name for name in found_in(local) if name.startswith("20/")} == {"20/g2", "20/manifest.json"}


def test_what_a_living_generation_writes_into_an_expired_step_stays_and_may_be_committed(
    store: Store, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        save(store, tmp_path, step, "old")
    upload(store, tmp_path, 10, "dead")
    entry = upload(store, tmp_path, 10, "new")
    assert retain(store, LAST_TWO, "old", "new") == Removed(steps=(10,))
    assert {name for name in found_in(store) if name.startswith("10/")} == {"10/new"}
    commit_checkpoint(store, step=10, generation="new", entries=[entry], state={}, world_size=1, layout={})
    assert read_tensors(open_checkpoint(store, 10))["model/w0"].tolist() == [10.0] * 3
    assert retain(store, LAST_TWO, "old", "new") == Removed(steps=(10,))
    assert not {name for name in found_in(store) if name.startswith("10/")}


def test_what_a_generation_may_still_read_stays_until_it_has(local: Store, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(local, tmp_path, step)
    assert apply_retention(local, policy=LAST_TWO, living=["g1"], now_unix=time.time(), reading=[10]).steps == (20,)
    assert retain(local).steps == (10,)


def test_a_tag_given_at_the_last_moment_counts(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        save(local, tmp_path, step)
    listed = Store.list

    def list_then_tag(self: Store, folder: str = "", *, recursive: bool = True) -> Any:
        found = listed(self, folder, recursive=recursive)
        if folder == "checkpoints":
            add_tag(self, 10, "keep")
        return found

    monkeypatch.setattr(Store, "list", list_then_tag)
    assert retain(local) == Removed() and steps(local) == [10, 20, 30]


def test_two_that_delete_at_once_do_not_disturb_each_other(local: Store, tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        save(local, tmp_path, step, num_ranks=4)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(retain, [Store(local.url) for _ in range(4)]))) == 4
    assert steps(local) == [80, 90] and latest(local) is not None


def test_manifests_are_read_once(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Retention(keep_last=3, keep_best=1)
    read: list[str] = []
    original = Store.read

    def counted(self: Store, key: str, **options: Any) -> bytes:
        read.append(key)
        return original(self, key, **options)

    monkeypatch.setattr(Store, "read", counted)
    for step in (10, 20, 30, 40):
        save(local, tmp_path, step)
        retain(local, policy)
    assert read == [manifest_key(step) for step in (10, 20, 30, 40)]


def test_a_step_that_is_committed_again_in_the_same_second_is_read_again(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's times are whole seconds."""
    monkeypatch.setattr("raynium.checkpoint.commit.time", SimpleNamespace(time=lambda: 1e9, perf_counter=lambda: 0.0))
    sizes = set()
    for generation in ("old", "new"):
        save(local, tmp_path, 10, generation)
        manifest = path_of(local, manifest_key(10))
        os.utime(manifest, (1e9, 1e9))
        [found] = list_checkpoints(local)
        assert found.generation == generation
        sizes.add(manifest.stat().st_size)
        delete_checkpoint(local, 10)
    assert len(sizes) == 1


def test_more_files_than_one_listing_shows(store: Store, tmp_path: Path) -> None:
    for number in range(1100):
        store.replace(f"checkpoints/step-000000010/dead/shard-{number:05d}.safetensors", b"x")
    for step in (20, 30, 40):
        save(store, tmp_path, step)
    assert len(store.list().sizes) == 1106
    removed = retain(store, LAST_TWO, "g1", later=2 * HOUR)
    assert removed == Removed((20,), ("checkpoints/step-000000010/dead",)) and len(store.list().sizes) == 4


def test_an_interrupted_deletion_leaves_no_broken_checkpoint(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(local, tmp_path, 10)
    save(local, tmp_path, 20)
    monkeypatch.setattr(Store, "delete_prefix", lambda self, folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retain(local, Retention(1))
    monkeypatch.undo()
    assert steps(local) == [20] and found_in(local) == {"10/g1", "20/g1", "20/manifest.json"}
    assert retain(local, Retention(1), "g2", later=2 * HOUR).abandoned == ("checkpoints/step-000000010/g1",)


def test_a_store_that_refuses_is_an_error_and_not_a_loss(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        save(local, tmp_path, step)
    monkeypatch.setattr(Store, "delete", lambda self, key: (_ for _ in ()).throw(StoreError("no permission")))
    with pytest.raises(StoreError, match="no permission"):
        retain(local)
    assert steps(local) == [10, 20, 30]


def test_temporary_files_of_dead_writers_go_after_their_grace(local: Store, tmp_path: Path) -> None:
    save(local, tmp_path, 10)
    folder = path_of(local, "checkpoints/step-000000020/dead")
    folder.mkdir(parents=True)
    (folder / ".tmp-0123").write_bytes(b"half")
    age(local, 20, "dead", 2 * HOUR)
    assert retain(local) == Removed(), "a living generation may be slow"
    age(local, 20, "dead", 30 * HOUR)
    assert retain(local) == Removed(unfinished=1) and not list(folder.iterdir())


@pytest.mark.s3
def test_multipart_uploads_of_dead_writers_are_aborted(s3_server: Any, tmp_path: Path) -> None:
    import boto3

    store = Store(f"{s3_server.create_bucket('unfinished')}/runs/first", options=s3_server.options)
    client = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        aws_access_key_id=s3_server.options["key"],
        aws_secret_access_key=s3_server.options["secret"],
        region_name="us-east-1",
    )

    def begin(name: str) -> None:
        target = {"Bucket": "unfinished", "Key": f"{name}/checkpoints/step-000000020/dead/shard-00001.safetensors"}
        started = client.create_multipart_upload(**target)
        client.upload_part(**target, UploadId=started["UploadId"], PartNumber=1, Body=b"x" * 100)

    def left() -> list[str]:
        found = client.list_multipart_uploads(Bucket="unfinished").get("Uploads", [])
        return [each["Key"].split("/")[1] for each in found]

    begin("runs/first")
    begin("runs/second")
    save(store, tmp_path, 10)
    upload(store, tmp_path, 20, "dead")  # rank 0 of the same save had ended
    assert retain(store) == Removed() and sorted(left()) == ["first", "second"]
    dead = ("checkpoints/step-000000020/dead",)
    assert retain(store, LAST_TWO, later=2 * HOUR) == Removed(abandoned=dead, unfinished=1)
    assert left() == ["second"], "another run's are not ours"
    begin("runs/first")
    assert retain(store, LAST_TWO, later=2 * HOUR) == Removed(), "nothing says that it is not the living generation's"
    assert retain(store, LAST_TWO, later=30 * HOUR) == Removed(unfinished=1) and left() == ["second"]
