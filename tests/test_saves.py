"""What becomes of saves: committed, tried again, or missing with a cause."""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import halves, random_tensor, upload_all
from tiny import job_text

from raynium.checkpoint.catalog import latest, list_checkpoints
from raynium.checkpoint.format.manifest import ShardEntry
from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.errors import StoreError
from raynium.run import saves as saves_module
from raynium.run.fence import Fence
from raynium.run.points import WAITING_FOLDER, PendingPoints, PointsKept, TakesRank0, read_waiting, write_waiting
from raynium.run.protocol import ShardSaved
from raynium.run.saves import COMMITS_TOLD_AGAIN, MOST_COMING_IN, Saves, WholeSave
from raynium.storage.store import Store
from raynium.tracking.tracker import Point

JOB = job_text({"train.steps": 8, "checkpoint.keep_last": 1})


class RefusingStore(Store):
    """Does not do the next few of what is told, or does it and then says that it failed."""

    refused_writes = 0
    lost_answers = 0
    deletes = True

    def write_new(self, key: str, data: bytes) -> None:
        if self.refused_writes:
            self.refused_writes -= 1
            raise StoreError(f"{key}: expired: renew them")
        super().write_new(key, data)
        if self.lost_answers:
            self.lost_answers -= 1
            raise StoreError(f"{key}: the connection broke")

    def delete(self, key: str) -> None:
        if not self.deletes:
            raise StoreError(f"{key}: allow s3:DeleteObject")
        super().delete(key)


@pytest.fixture
def store(tmp_path: Path) -> RefusingStore:
    return RefusingStore(tmp_path / "run")


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def noted() -> list[int]:
    """Steps of incidents."""
    return []


@pytest.fixture
def saves(store: RefusingStore, told: list[str], noted: list[int], monkeypatch: pytest.MonkeyPatch) -> Saves:
    monkeypatch.setattr("raynium.run.saves.pause_before_next_try", lambda tries, _: 0.001 if tries < 4 else None)
    config, fence = parse_config(JOB), Fence(store, 1)
    return Saves(
        config, store, fence, PendingPoints(), life="a", tell=told.append, note=lambda step, cause: noted.append(step)
    )


def of_another_life(saves: Saves, store: Store, told: list[str]) -> Saves:
    """Those of a coordinator after this one."""
    note = saves._note_incident
    return Saves(saves._config, store, Fence(store, 1), PendingPoints(), life="b", tell=told.append, note=note)


def saved(
    saves: Saves, step: int, rank: int, entry: ShardEntry, upload_seconds: float, *, parent: int | None
) -> WholeSave | None:
    world = World.of(parse_config(JOB))
    return saves.shard_saved(ShardSaved(step, rank, entry.to_json(), upload_seconds, parent, world))


def whole(saves: Saves, store: Store, step: int, generation: str = "g1") -> WholeSave:
    """All shards of a step, as they come in."""
    entries = upload_all(store, halves("model/w", random_tensor("float32", (8, 3))), step=step, generation=generation)
    first, last = (saved(saves, step, rank, entry, 2.0 - rank, parent=None) for rank, entry in enumerate(entries))
    assert first is None and last is not None and last.upload_seconds == 2.0
    return last


def first_shard(saves: Saves, store: Store, step: int, generation: str = "g1") -> None:
    """That of rank 0 comes in."""
    entry, _ = upload_all(store, halves("model/w", random_tensor("float32", (8, 3))), step=step, generation=generation)
    assert saved(saves, step, 0, entry, 1.0, parent=None) is None


def steps(store: Store) -> list[int]:
    return [each.step for each in list_checkpoints(store)]


def run_out(saves: Saves, save: WholeSave, living: Sequence[str] = ("g1",)) -> None:
    """Commits it as the last of its run."""

    async def play() -> None:
        if not await saves.commit(save, living=living):
            await saves.commit_last(save.step, living=living)

    asyncio.run(play())


def test_the_last_commit_is_tried_again_until_the_store_takes_it(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    save = whole(saves, store, 8)
    store.refused_writes = 3
    run_out(saves, save)
    assert saves.problem(8) is None and saves.committed_step == 8 and steps(store) == [8]
    assert [commit.step for commit in saves.commits] == [8]
    assert told[0].startswith("checkpoint of step 8 is not saved; training goes on: it could not be committed")
    assert "expired: renew" in told[0] and told[-1] == "checkpoint of step 8 is saved after all"
    assert sum("trying to commit it again" in text for text in told) == 3


def test_a_last_commit_that_never_works_leaves_its_cause(saves: Saves, store: RefusingStore) -> None:
    asyncio.run(saves.commit(whole(saves, store, 6), living=["g1"]))
    store.refused_writes = 9
    run_out(saves, whole(saves, store, 8))
    problem = saves.problem(8)
    assert problem is not None and "training reached step 8" in problem and "expired: renew" in problem
    assert "the run has the checkpoint of step 6 to go on from" in problem
    assert store.refused_writes == 5 and steps(store) == [6]


def test_a_commit_of_which_the_store_did_not_tell_is_found_to_be_ours(saves: Saves, store: RefusingStore) -> None:
    store.lost_answers = 1
    run_out(saves, whole(saves, store, 8))
    assert saves.problem(8) is None and steps(store) == [8]


def test_the_commit_of_another_generation_is_not_tried_again(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    asyncio.run(saves.commit(whole(saves, store, 8, "g1"), living=["g1"]))
    run_out(saves, whole(saves, store, 8, "g2"), living=["g1", "g2"])
    newest = latest(store)
    assert newest is not None and newest.manifest.generation == "g1" and saves.problem(8) is None
    assert len(told) == 1 and "step 8 was already committed by another generation" in told[0]


def test_only_the_save_of_the_last_step_is_tried_again(saves: Saves, store: RefusingStore) -> None:
    store.refused_writes = 2
    asyncio.run(saves.commit(whole(saves, store, 6), living=["g1"]))
    run_out(saves, whole(saves, store, 8))
    assert steps(store) == [8] and store.refused_writes == 0


def test_what_is_not_a_whole_checkpoint_is_not_tried_again(saves: Saves, store: RefusingStore, told: list[str]) -> None:
    save = whole(saves, store, 8)
    store.delete("checkpoints/step-000000008/g1/shard-00001.safetensors")
    run_out(saves, save)
    assert len(told) == 1 and "shard-00001.safetensors is not there" in told[0]
    assert "is not there" in (saves.problem(8) or "")


def test_a_store_that_lets_nothing_be_deleted_keeps_no_commit_from_being_logged(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    for step in (6, 8):
        run_out(saves, whole(saves, store, step))
        store.deletes = False
    assert steps(store) == [6, 8] and [commit.step for commit in saves.commits] == [6, 8]
    places = {each["step"]: each["uri"] for each in json.loads(saves.commits[-1].checkpoints)}
    assert places == {step: f"{store.url}/checkpoints/step-00000000{step}" for step in (6, 8)}
    assert len(told) == 1 and "older ones were not tidied up" in told[0] and "allow s3:DeleteObject" in told[0]


def test_shards_that_are_told_again_commit_nothing_twice(saves: Saves, store: RefusingStore, told: list[str]) -> None:
    entries = upload_all(store, halves("model/w", random_tensor("float32", (8, 3))), step=8, generation="g1")
    first, found = (saved(saves, 8, rank, entry, 1.0, parent=4) for rank, entry in enumerate(entries))
    assert first is None and found is not None
    assert [saved(saves, 8, rank, entry, 1.0, parent=4) for rank, entry in enumerate(entries)] == [None, None]
    run_out(saves, found)
    assert [saved(saves, 8, rank, entry, 1.0, parent=4) for rank, entry in enumerate(entries)] == [None, None]
    saves.shard_failed(8, 0, "denied")
    assert len(saves.commits) == 1 and not told, "another generation's failure costs no checkpoint"


def test_a_store_that_takes_no_checkpoint_is_one_incident_until_it_takes_one(
    saves: Saves, store: RefusingStore, told: list[str], noted: list[int]
) -> None:
    store.refused_writes = 1
    asyncio.run(saves.commit(whole(saves, store, 2), living=["g1"]))
    saves.shard_failed(4, 0, "denied")
    assert noted == [2] and len(told) == 2, "each step is told, and the trouble once"
    run_out(saves, whole(saves, store, 6))
    saves.shard_failed(8, 0, "denied")
    assert noted == [2, 8]


def test_failed_shards_are_told_once_a_step(saves: Saves, told: list[str]) -> None:
    for rank in (0, 1):
        saves.shard_failed(8, rank, "denied")
    assert told == ["checkpoint of step 8 is not saved; training goes on: rank 0's shard could not be uploaded: denied"]
    problem = saves.problem(8)
    assert problem is not None and "rank 1's shard could not be uploaded: denied" in problem
    assert "the run has no checkpoint to go on from" in problem


def test_shards_of_before_a_coordinators_restart_are_not_mixed_with_those_of_the_same_number(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    """It counts generations anew, and agents upload on; what they call generation 1 is then another one."""
    halved = halves("model/w", random_tensor("float32", (8, 3)))
    before, after = (upload_all(store, halved, step=8, generation=each) for each in ("g1-before", "g1-after"))
    found = [
        saved(saves, 8, rank, entries[rank], 1.0, parent=parent)
        for rank, entries, parent in ((0, after, 4), (0, before, None), (1, before, None), (1, after, 4))
    ]
    assert [each and (each.generation_id, each.parent_step) for each in found] == [
        None, None, ("g1-before", None), ("g1-after", 4),
    ]  # fmt: skip
    assert found[-1] is not None and not told
    run_out(saves, found[-1])
    newest = latest(store)
    assert newest is not None and newest.manifest.generation == "g1-after" and saves.problem(8) is None


def test_a_last_checkpoint_that_an_earlier_coordinator_committed_is_found(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    run_out(saves, whole(saves, store, 8))
    restarted = of_another_life(saves, store, told)
    assert restarted.problem(8) is not None
    asyncio.run(restarted.commit_last(8, living=[]))
    assert restarted.problem(8) is None and restarted.committed_step == 8 and restarted.committed_uri is not None
    assert "no shard of it arrived" in (restarted.problem(9) or "")

    taken = of_another_life(saves, store, told)
    run_out(taken, whole(taken, store, 8, "g2"))
    assert taken.problem(8) is None

    manifest = "checkpoints/step-000000008/manifest.json"
    store.replace(manifest, store.read(manifest)[:-1])
    unlucky = of_another_life(saves, store, told)
    asyncio.run(unlucky.commit_last(8, living=[]))
    assert "could not be saved: the store cannot be asked for it" in (unlucky.problem(8) or "")


def test_a_checkpoint_whose_evaluation_is_not_finite_is_saved_without_it(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    saves.note_evaluation(8, {"eval/loss": float("inf"), "eval/bits_per_byte": 3.5, "train/loss": 2.0})
    run_out(saves, whole(saves, store, 8))
    newest = latest(store)
    assert newest is not None and newest.manifest.metrics == {"eval/bits_per_byte": 3.5} and not told


def test_saves_that_lack_a_shard_are_forgotten_in_the_end(saves: Saves, store: RefusingStore) -> None:
    for step in range(3 * MOST_COMING_IN):
        first_shard(saves, store, step)
    assert len(saves._shards) == MOST_COMING_IN
    newest = 3 * MOST_COMING_IN - 1
    entry = saves._shards["g1", newest - 1][0][0]  # its other shard is late
    last = entry.model_copy(update={"file": entry.file.model_copy(update={"key": "g1/shard-00001.safetensors"})})
    found = saved(saves, newest - 1, 1, last, 1.0, parent=None)
    assert found is not None and found.entries == (entry, last)


def test_a_coordinator_that_begins_tells_the_last_commits_again_as_they_were(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    for step in (2, 4, 6, 8):
        run_out(saves, whole(saves, store, step))
    later = of_another_life(saves, store, told)
    asyncio.run(later.catch_up())
    assert later.committed_step == 8
    assert [each.step for each in later.commits] == steps(store)[-COMMITS_TOLD_AGAIN:]
    assert [each.metrics for each in later.commits] == [each.metrics for each in saves.commits][-len(later.commits) :]
    run_out(later, whole(later, store, 10, "g2"))
    asyncio.run(later.catch_up())
    assert [each.step for each in later.unsent()] == [8, 10]


def test_the_lists_for_mlflow_do_not_add_up(saves: Saves, store: RefusingStore) -> None:
    for step in (2, 4, 6):
        run_out(saves, whole(saves, store, step))
    assert [(commit.number, commit.step) for commit in saves.commits] == [(1, 2), (2, 4), (3, 6)]
    assert len({id(commit.checkpoints) for commit in saves.commits}) == 1


# ---- points that MLflow has not got -------------------------------------------------------------------------------


WAITING = [Point(step, 1000 + step, {"train/loss": step / 7, "eval/loss": math.inf}) for step in range(3, 10)]


def some_wait(saves: Saves) -> None:
    saves._points.keep(PointsKept(("a", 1), 1, tuple(WAITING), 14))


def found(saves: Saves, step: int, *, tenure: int = 9) -> list[Point]:
    """By a node that takes rank 0."""
    asyncio.run(saves.find_points())
    return list(saves._points.handed_over(TakesRank0(("a", tenure), step)))


def test_points_that_mlflow_had_not_got_at_a_commit_outlive_the_driver_that_knew_them(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    """Its node's spool may be gone with it, or belong to a node that has not rank 0 any more."""
    some_wait(saves)
    run_out(saves, whole(saves, store, 8))
    later = of_another_life(saves, store, told)
    assert found(later, 8, tenure=2) == WAITING[:-1], "what came after it is computed again"
    # MLflow has got some meanwhile; the rest is known to the driver after that one.
    later._points.keep(PointsKept(("a", 2), 1, (), 4))
    run_out(later, whole(later, store, 10, "g2"))
    assert found(of_another_life(saves, store, told), 10) == WAITING[-3:-1]


def test_an_older_step_that_becomes_whole_late_leaves_none_out_that_the_newest_needs(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    some_wait(saves)
    late = whole(saves, store, 4)
    run_out(saves, whole(saves, store, 8))
    run_out(saves, late)
    assert found(of_another_life(saves, store, told), 8) == WAITING[:-1]


def test_a_coordinator_that_knows_few_of_them_yet_overwrites_none(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    """It was started again, and a commit comes before it was told all."""
    some_wait(saves)
    run_out(saves, whole(saves, store, 8))
    again = of_another_life(saves, store, told)
    assert again._points.keep(PointsKept(("a", 1), 2, (Point(10, 10, {"train/loss": 1.0}),), 15))
    run_out(again, whole(again, store, 10))
    assert found(of_another_life(saves, store, told), 9) == WAITING


def test_points_that_were_sent_since_are_not_found_any_more(
    saves: Saves, store: RefusingStore, told: list[str]
) -> None:
    run_out(saves, whole(saves, store, 2))
    assert not store.list(WAITING_FOLDER).sizes, "nothing waited"
    some_wait(saves)
    run_out(saves, whole(saves, store, 4))
    saves._points.keep(PointsKept(("a", 1), 2, (), 0))
    run_out(saves, whole(saves, store, 6))
    assert found(of_another_life(saves, store, told), 6) == [] and not told


def test_a_driver_that_comes_back_from_the_dead_overwrites_only_what_it_has_left(store: RefusingStore) -> None:
    for claim, points in ((1, WAITING[:1]), (3, WAITING[:3]), (2, [])):
        write_waiting(store, claim, points)
    assert read_waiting(store) == WAITING[:3]
    assert [*store.list(WAITING_FOLDER).sizes] == [f"{WAITING_FOLDER}/000000003.json"], "those of before are gone"
    store.deletes = False
    write_waiting(store, 4, WAITING)
    assert read_waiting(store) == WAITING, "that they stay harms nobody"


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "{", "7", "[7]", "[[1, 2]]", '[["x", 2, {"train/loss": 1.0}]]', "[[1, 2, 3]]", "[[1, 2, {}]]"),
        *('[[1, null, {"train/loss": 1.0}]]', '[[-1, 2, {"train/loss": 1.0}]]', '[[1, 2, {"x": 1.0}]]'),
        *('[[1, 2, {"train/loss": "x"}]]', "\udcff"),
    ],
)
def test_what_is_no_list_of_points_is_told_and_ends_nothing(
    saves: Saves, store: RefusingStore, told: list[str], content: str
) -> None:
    store.replace(f"{WAITING_FOLDER}/000000001.json", content.encode(errors="surrogateescape"))
    assert found(saves, 9) == []
    assert "points that MLflow had not got are missing there" in told[0]
    assert "waiting-points/000000001.json should hold a list of points, and cannot be read" in told[0]
    run_out(saves, whole(saves, store, 8))
    assert len(told) == 1 and steps(store) == [8]


def test_a_store_that_is_away_is_asked_again_for_the_points_before_they_are_overwritten(
    saves: Saves, store: RefusingStore, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some_wait(saves)
    run_out(saves, whole(saves, store, 8))
    later, read = of_another_life(saves, store, told), saves_module.read_waiting

    def silent(_: Store) -> list[Point]:
        time.sleep(0.5)
        raise StoreError("allow s3:ListBucket")

    monkeypatch.setattr(saves_module, "read_waiting", silent)
    assert found(later, 8, tenure=1) == [] and "may come late: allow s3:ListBucket" in told[-1]
    monkeypatch.setattr(saves_module, "POINTS_SECONDS", 0.01)
    assert found(later, 8, tenure=2) == [] and "may come late: the store is silent" in told[-1]
    later._points.keep(PointsKept(("a", 2), 1, (Point(9, 9, {"train/loss": 1.0}),), 1))
    assert not asyncio.run(later.commit(whole(later, store, 10), living=["g1"])), "it would overwrite them"
    monkeypatch.setattr(saves_module, "read_waiting", read)
    assert asyncio.run(later.commit(whole(later, store, 12), living=["g1"]))
    assert found(of_another_life(saves, store, told), 8) == WAITING[:-1]


def test_a_store_that_does_not_take_the_points_refuses_the_commit_which_is_tried_again(
    saves: Saves, store: RefusingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, refused = store.replace, [2]

    def refuses(key: str, data: bytes) -> None:
        if refused[0]:
            refused[0] -= 1
            raise StoreError(f"{key}: expired: renew them")
        replace(key, data)

    monkeypatch.setattr(store, "replace", refuses)
    some_wait(saves)
    run_out(saves, whole(saves, store, 8))
    assert saves.problem(8) is None and steps(store) == [8] and read_waiting(store) == WAITING
