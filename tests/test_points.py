"""What of a run's points outlives the node that had them for MLflow, and that none of them is sent twice."""

import math
import sqlite3
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import job_text
from waiting import wait_for

from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.errors import StoreError
from raynium.node import node_zero
from raynium.node.node_zero import NodeZero, WitnessedTracker, refuse_displaced
from raynium.run import points as points_module
from raynium.run.points import PendingPoints, PointsKept, TakesRank0, Tenure
from raynium.run.protocol import AgentEvent, Commit, Coordinator, MaySend, News, Order
from raynium.tracking.ledger import Ledger
from raynium.tracking.runs import open_run, read_metric
from raynium.tracking.sender import MlflowTracker, _LoggedSteps
from raynium.tracking.tracker import MemoryTracker, Point

WORLD = World.of(parse_config(job_text({"cluster.ranks_per_node": 1})))

pytestmark = pytest.mark.quick


def point(step: int, values: int = 1) -> Point:
    return Point(step, 1000 + step, {f"metric-{number}": float(step) for number in range(values)})


def point_of(step: int) -> Point:
    """As a tracker of these tests is given it."""
    return Point(step, step, {"train/loss": step / 7})


def tenure(generation: int) -> Tenure:
    return "a", generation


def order(generation: int, resume_step: int | None) -> Order:
    return Order(WORLD, (0,), (0,), generation, f"g{generation}", "127.0.0.1", 1, resume_step=resume_step)


def values_of(points: list[Point]) -> int:
    return sum(len(each.metrics) for each in points)


class Keeper:
    """The coordinator's part."""

    def __init__(self) -> None:
        self.pending, self.said = PendingPoints(), list[PointsKept]()
        self.displaced = set[MaySend]()

    def commits(self, sent: Commit | None) -> "Future[list[Commit] | None]":
        answer = Future[list[Commit] | None]()
        answer.set_result(None)
        return answer

    def tell(self, event: AgentEvent) -> "Future[News]":
        found, wants_all, displaced = tuple[Point, ...](), False, isinstance(event, MaySend) and event in self.displaced
        if isinstance(event, PointsKept):
            self.said.append(event)
            wants_all = self.pending.keep(event)
            found = self.pending.found(event.tenure)
        elif isinstance(event, TakesRank0):
            found = self.pending.handed_over(event)
        answer = Future[News]()
        answer.set_result(News(Ledger(), {}, points=found, displaced=displaced, wants_all_points=wants_all))
        return answer


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=40), st.integers(0, 40))
def test_whatever_mlflow_has_not_got_is_handed_over_in_its_order(
    appended: list[tuple[int, int]], resume_step: int
) -> None:
    """appended: values of each step's point, and how many points MLflow has taken since the one before."""
    pending, waiting = PendingPoints(), list[Point]()
    for step, (values, taken) in enumerate(appended, start=1):
        del waiting[:taken]
        waiting.append(point(step, values))
        word = PointsKept(tenure(1), step, (waiting[-1],), values_of(waiting), are_all=step == 1)
        assert not pending.keep(word), "it knows all"
    wanted = [each for each in waiting if each.step <= resume_step]
    assert list(pending.handed_over(TakesRank0(tenure(2), resume_step))) == wanted
    assert list(pending.handed_over(TakesRank0(tenure(3), 10**6))) == wanted, "others are gone"


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=12),
    st.lists(st.integers(0, 11), max_size=8),
    st.randoms(),
)
def test_words_that_overtake_each_other_or_are_said_again_are_taken_as_they_were_meant(
    appended: list[tuple[int, int]], again: list[int], order: Random
) -> None:
    words, waiting = list[PointsKept](), list[Point]()
    for step, (values, taken) in enumerate(appended, start=1):
        del waiting[:taken]
        waiting.append(point(step, values))
        # Each third tells all, as when a coordinator was started again.
        are_all = step % 3 == 0
        words.append(
            PointsKept(
                tenure(1), step, tuple(waiting) if are_all else (waiting[-1],), values_of(waiting), are_all=are_all
            )
        )
    said = [*words, *(words[number] for number in again if number < len(words))]
    order.shuffle(said)
    pending = PendingPoints()
    for word in said:
        pending.keep(word)
    assert list(pending.all()) == waiting


def test_of_an_mlflow_that_is_away_for_long_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_module, "MOST_VALUES", 6)
    pending = PendingPoints()
    for step in range(1, 10):
        pending.keep(PointsKept(tenure(1), step, (point(step, 2),), 2 * step))
    assert [each.step for each in pending.handed_over(TakesRank0(tenure(2), 9))] == [7, 8, 9]


def test_the_coordinator_is_told_now_and_then_and_when_a_snapshot_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_zero, "TELL_SECONDS", 3600)
    keeper, inner = Keeper(), MemoryTracker()
    tracker = WitnessedTracker(inner, cast(Coordinator, keeper), tenure=tenure(1), resume_step=None)
    for step in (1, 2, 3):
        tracker.append({"train/loss": 1.0}, step=step, unix_ms=step)
    assert [each.are_all for each in keeper.said] == [True], "what an agent before it has left here"
    tracker.tell()
    tracker.tell()
    assert [each.step for said in keeper.said for each in said.points] == [1, 2, 3]
    assert [each.step for each in inner.points] == [1, 2, 3]
    tracker.artifact("a.txt", "a")
    assert inner.artifacts == {"a.txt": "a"}


def test_no_point_of_a_lost_node_is_lost_and_none_of_one_that_comes_back_is_doubled(tmp_path: Path) -> None:
    """It had rank 0 and was cut off, from MLflow first. Another goes on from step 4, of whose disk it knows nothing."""
    uri, keeper = f"sqlite:///{tmp_path}/mlflow.db", Keeper()
    run_id = open_run(uri, experiment="tests", run_name="cut", run_id=None, params={}, tags={}).run_id
    is_cut = [False]

    def node(name: str, resume_step: int | None) -> WitnessedTracker:
        def may_send() -> None:
            if name == "first" and is_cut[0]:
                raise StoreError("no route to host")

        tracker = MlflowTracker(tmp_path / name, uri=uri, run_id=run_id, flush_seconds=0.05, may_send=may_send)
        turn = tenure(1 if name == "first" else 2)
        return WitnessedTracker(tracker, cast(Coordinator, keeper), tenure=turn, resume_step=resume_step)

    def append(tracker: WitnessedTracker, step: int, node: int) -> None:
        tracker.append({"train/loss": step / 7}, step=step, unix_ms=10 * step + node)
        tracker.tell()

    first = node("first", None)
    append(first, 1, 1)
    wait_for(lambda: not first.status().points_pending)
    is_cut[0] = True
    for step in (2, 3, 4, 5, 6):
        append(first, step, 1)
    wait_for(lambda: first.status().last_error)
    second = node("second", 4)
    for step in (5, 6, 7):
        append(second, step, 2)
    assert second.close(timeout_seconds=60).points_pending == 0
    whole = [(step, step / 7) for step in range(1, 8)]
    assert [(each.step, each.value) for each in read_metric(uri, run_id, "train/loss")] == whole
    is_cut[0] = False
    assert first.close(timeout_seconds=60).points_pending == 0
    assert [(each.step, each.value) for each in read_metric(uri, run_id, "train/loss")] == whole


def test_a_node_that_was_frozen_as_it_was_about_to_send_sends_nothing_once_another_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has asked MLflow what is there, and stands still until the other has sent the same step."""
    uri, keeper, holds = f"sqlite:///{tmp_path}/mlflow.db", Keeper(), _LoggedSteps.holds
    run_id = open_run(uri, experiment="tests", run_name="frozen", run_id=None, params={}, tags={}).run_id
    coordinator = cast(Coordinator, keeper)

    def node(seat: int) -> MlflowTracker:
        who = MaySend("a", seat, 0)
        may_send = partial(refuse_displaced, coordinator, who)
        return MlflowTracker(tmp_path / f"{seat}", uri=uri, run_id=run_id, flush_seconds=0.05, may_send=may_send)

    def stands_still(self: _LoggedSteps, *arguments: Any, **named: Any) -> bool:
        monkeypatch.setattr(_LoggedSteps, "holds", holds)
        found = holds(self, *arguments, **named)
        keeper.displaced.add(MaySend("a", 0, 0))
        second.append({"train/loss": 0.5}, step=1, unix_ms=2)
        assert second.close(timeout_seconds=60).points_pending == 0
        return found

    second = node(1)
    monkeypatch.setattr(_LoggedSteps, "holds", stands_still)
    first = node(0)
    first.append({"train/loss": 0.5}, step=1, unix_ms=1)
    wait_for(lambda: first.status().last_error)
    left = first.close(timeout_seconds=60)
    assert left.points_pending == 1 and "another took its place" in str(left.last_error)
    assert [(each.step, each.unix_ms) for each in read_metric(uri, run_id, "train/loss")] == [(1, 2)]


def test_values_that_nothing_is_sent_of_are_not_counted_as_sent(tmp_path: Path) -> None:
    """Of STEADY, while nothing changes: each point has some, and the oldest that waits would be taken for sent."""
    uri, keeper = "http://127.0.0.1:9", Keeper()
    tracker = WitnessedTracker(
        MlflowTracker(tmp_path / "spool", uri=uri, run_id="id", flush_seconds=3600),
        cast(Coordinator, keeper),
        tenure=tenure(1),
        resume_step=None,
    )
    for step in range(1, 30):
        tracker.append({"train/loss": 1.0, "train/left_out_steps": 0.0, "run/generation": 1.0}, step=step, unix_ms=step)
        tracker.tell()
    tracker.append({"run/generation": 1.0}, step=30, unix_ms=30)
    handed_over = keeper.pending.handed_over(TakesRank0(tenure(2), 30))
    assert [(each.step, list(each.metrics)) for each in handed_over] == [
        (step, ["train/loss"]) for step in range(1, 30)
    ]
    tracker.close(timeout_seconds=0.1)


def test_a_coordinator_that_was_started_again_is_told_all_that_waits_not_only_what_is_new(tmp_path: Path) -> None:
    """Else a commit would leave the older ones to the spool of a node that may be lost after it."""
    keeper, tenures = Keeper(), list[int]()

    def node() -> WitnessedTracker:
        inner = MlflowTracker(tmp_path / "spool", uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)
        tenures.append(len(tenures) + 1)
        return WitnessedTracker(inner, cast(Coordinator, keeper), tenure=tenure(tenures[-1]), resume_step=None)

    def known() -> list[int]:
        return [each.step for each in keeper.pending.all()]

    tracker = node()
    for step in range(1, 5):
        tracker.append({"train/loss": step / 7}, step=step, unix_ms=step)
    tracker.tell()
    assert known() == [1, 2, 3, 4] and [said.are_all for said in keeper.said] == [True, False]

    keeper.pending = PendingPoints()
    for step in (5, 6, 7):
        tracker.append({"train/loss": 5.0}, step=step, unix_ms=step)
        tracker.tell()
    assert known() == [1, 2, 3, 4, 5, 6, 7]
    assert [len(said.points) for said in keeper.said if said.are_all] == [0, 6], "asked for once"

    # The driver died, and this node has rank 0 again: its spool knows what nobody else does.
    tracker.close(timeout_seconds=0.1)
    keeper.pending = PendingPoints()
    tracker = node()
    assert known() == [1, 2, 3, 4, 5, 6, 7]
    tracker.close(timeout_seconds=0.1)


def test_who_takes_rank_0_is_known_to_have_all_that_it_was_handed_before_its_ranks_begin(tmp_path: Path) -> None:
    """It may be lost while they do, and a checkpoint of before may become whole then."""
    keeper = Keeper()
    waiting = tuple(point_of(step) for step in range(2, 6))
    keeper.pending.keep(PointsKept(tenure(1), 1, waiting, 4))
    for turn, folder in enumerate("bc", start=2):
        inner = MlflowTracker(tmp_path / folder, uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)
        tracker = WitnessedTracker(inner, cast(Coordinator, keeper), tenure=tenure(turn), resume_step=4)
        assert keeper.pending.all() == tuple(tracker.waiting(most_values=100)) == waiting[:3]
        tracker.close(timeout_seconds=0.1)


def test_a_node_that_has_not_rank_0_any_more_is_not_listened_to() -> None:
    pending = PendingPoints()
    pending.keep(PointsKept(tenure(1), 1, (point(1), point(2)), 2))
    assert pending.handed_over(TakesRank0(tenure(5), 2)) == (point(1), point(2))
    assert not pending.keep(PointsKept(tenure(1), 2, (point(3),), 9))
    assert not pending.keep(PointsKept(tenure(1), 3, (), 0, are_all=True))
    assert pending.handed_over(TakesRank0(tenure(4), 9)) == ()
    assert pending.all() == (point(1), point(2))
    # A coordinator that was started again hears of tenures it did not give, and not from their beginning.
    assert pending.keep(PointsKept(tenure(6), 4, (point(4),), 1)) and pending.all() == (point(4),)
    assert not pending.keep(PointsKept(tenure(6), 5, (point(5),), 2)), "it has asked"
    # Generations of a coordinator that was started again may count from before, attempts do not.
    assert pending.handed_over(TakesRank0(("b", 1), 9)) == (point(4), point(5))


def test_what_the_store_gives_late_reaches_the_node_that_has_rank_0() -> None:
    pending = PendingPoints()
    assert pending.handed_over(TakesRank0(tenure(2), 2)) == (), "the store was silent"
    pending.finds([point(1), point(2), point(3)])
    pending.keep(PointsKept(tenure(2), 1, (point(4),), 1, are_all=True))
    assert pending.all() == (point(1), point(2), point(3), point(4)), "for a commit before that"
    assert pending.found(tenure(1)) == (), "it has not rank 0 any more"
    assert pending.found(tenure(2)) == (point(1), point(2)), "the third was computed again"
    assert pending.found(tenure(2)) == () and pending.all() == (point(4),)
    # A coordinator that was started again does not know from where the node went on.
    pending = PendingPoints()
    pending.keep(PointsKept(tenure(2), 9, (point(4),), 1))
    pending.finds([point(3)])
    assert pending.found(tenure(2)) == (point(3),)


def test_what_comes_late_is_taken_by_the_node_and_known_to_be(tmp_path: Path) -> None:
    keeper = Keeper()
    inner = MlflowTracker(tmp_path / "spool", uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)
    tracker = WitnessedTracker(inner, cast(Coordinator, keeper), tenure=tenure(2), resume_step=3)
    keeper.pending.finds([point_of(2), point_of(3)])
    for step in (4, 5):
        tracker.append({"train/loss": step / 7}, step=step, unix_ms=step)
        tracker.tell()
    assert sorted(each.step for each in tracker.waiting(most_values=9)) == [2, 3, 4, 5]
    assert keeper.pending.all() == tuple(tracker.waiting(most_values=9))
    tracker.close(timeout_seconds=0.1)


def test_agents_that_die_again_and_again_on_one_disk_leave_each_point_there_once(tmp_path: Path) -> None:
    keeper = Keeper()
    for life in range(1, 6):
        inner = MlflowTracker(tmp_path / "spool", uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)
        tracker = WitnessedTracker(inner, cast(Coordinator, keeper), tenure=tenure(life), resume_step=life)
        tracker.append({"train/loss": math.nan}, step=life, unix_ms=life)
        tracker.tell()
        assert [each.step for each in tracker.waiting(most_values=99)] == list(range(1, life + 1))
        assert [each.step for each in keeper.pending.all()] == list(range(1, life + 1))
        tracker.close(timeout_seconds=0.1)


def test_a_level_that_went_back_to_where_it_began_is_sent_by_whoever_it_is_handed_to(tmp_path: Path) -> None:
    """For a tracker that begins, what all runs begin with is no news."""
    keeper = Keeper()
    level = Point(3, 3, {"train/left_out_steps": 0.0})
    keeper.pending.keep(PointsKept(tenure(1), 1, (level,), 1))
    inner = MlflowTracker(tmp_path / "spool", uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)
    tracker = WitnessedTracker(inner, cast(Coordinator, keeper), tenure=tenure(2), resume_step=3)
    assert tracker.waiting(most_values=9) == [level]
    tracker.close(timeout_seconds=0.1)


def test_a_node_that_gives_rank_0_up_sends_no_step_that_others_take_again(tmp_path: Path) -> None:
    """Both would send it, each at its own time, while MLflow comes back."""
    uri, keeper, away = f"sqlite:///{tmp_path}/mlflow.db", Keeper(), threading.Event()
    run_id = open_run(uri, experiment="tests", run_name="gives up", run_id=None, params={}, tags={}).run_id

    def may_send() -> None:
        if not away.is_set():
            raise StoreError("no route to host")

    def open_tracker() -> MlflowTracker:
        return MlflowTracker(tmp_path / "spool", uri=uri, run_id=run_id, flush_seconds=0.05, may_send=may_send)

    node = NodeZero(cast(Coordinator, keeper), open_tracker, "a")
    node.begins(order(1, None), has_rank0=True, follows=True)
    assert node.tracker is not None
    for step in (1, 2, 3):
        node.tracker.append({"train/loss": step / 7}, step=step, unix_ms=step)
    wait_for(lambda: node.tracker is not None and node.tracker.status().last_error)
    threading.Timer(0.2, away.set).start()
    node.gives_up(2)
    assert node.tracker is None and keeper.pending.all() == tuple(point_of(step) for step in (1, 2, 3))
    assert [(each.step, each.unix_ms) for each in read_metric(uri, run_id, "train/loss")] == [(1, 1), (2, 2)]


def test_nor_does_it_when_it_has_rank_0_again_and_mlflow_was_away_all_the_time(tmp_path: Path) -> None:
    keeper = Keeper()

    def open_tracker() -> MlflowTracker:
        return MlflowTracker(tmp_path / "spool", uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)

    node = NodeZero(cast(Coordinator, keeper), open_tracker, "a")
    node.begins(order(1, None), has_rank0=True, follows=True)
    assert node.tracker is not None
    for step in (1, 2, 3):
        node.tracker.append({"train/loss": step / 7}, step=step, unix_ms=step)
    node.gives_up(2, seconds=0.1)
    keeper.pending.handed_over(TakesRank0(tenure(2), 2))
    # What the other one had of steps 3 and 4 it has lost with its disk.
    node.begins(order(3, 4), has_rank0=True, follows=True)
    assert node.tracker is not None
    assert [each.step for each in node.tracker.waiting(most_values=9)] == [1, 2]
    node.gives_up(None, seconds=0.1)


def test_a_node_that_missed_who_had_rank_0_before_is_handed_over_what_waits_anew(tmp_path: Path) -> None:
    keeper = Keeper()
    folders = iter("abcd")

    def open_tracker() -> MlflowTracker:
        return MlflowTracker(tmp_path / next(folders), uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)

    node = NodeZero(cast(Coordinator, keeper), open_tracker, "a")
    node.begins(order(1, None), has_rank0=True, follows=True)
    first = node.tracker
    node.begins(order(2, 4), has_rank0=True, follows=True)
    assert node.tracker is first is not None
    # Another one had it in generation 3, and died before this one could be told.
    keeper.pending.handed_over(TakesRank0(tenure(3), 4))
    keeper.pending.keep(PointsKept(tenure(3), 1, (point_of(5), point_of(6)), 2))
    node.begins(order(4, 5), has_rank0=True, follows=False)
    assert node.tracker is not None and node.tracker is not first
    assert node.tracker.waiting(most_values=9) == [point_of(5)]
    node.begins(order(5, 6), has_rank0=False, follows=True)
    assert node.tracker is None, "one that goes on without rank 0 sends nothing"
    assert keeper.pending.all() == (point_of(5),)


def test_of_very_many_that_wait_the_newest_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(tmp_path / "spool", uri="http://127.0.0.1:9", run_id="id", flush_seconds=3600)
    for step in range(1, 10):
        tracker.append({"train/loss": step / 7, "train/grad_norm": 1.0}, step=step, unix_ms=step)
    assert [each.step for each in tracker.waiting(most_values=5)] == [8, 9]
    assert [each.step for each in tracker.waiting(most_values=18)] == list(range(1, 10))
    monkeypatch.setattr(tracker._spool, "_database", cast(Any, ClosedDatabase()))
    tracker.append({"train/loss": 1.0}, step=10, unix_ms=10)
    assert [each.step for each in tracker.waiting(most_values=3)] == [9, 10], "one that a full disk refused"


class ClosedDatabase:
    def execute(self, *_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def close(self) -> None:
        pass
