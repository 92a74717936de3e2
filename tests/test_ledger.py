"""Where the time of a run went: every second has one cause, whatever happened and in whatever order it was told."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynium.tracking.ledger import CAUSES, Before, CoordinatorBook, GenerationBook, Ledger, LifeLedger, RunBook
from raynium.tracking.metrics import METRICS, check_metrics

pytestmark = pytest.mark.quick


def took(step: float, evaluate: float = 0.0) -> dict[str, float]:
    """What rank 0 tells of a step."""
    return {"time/step_seconds": step, "time/data_seconds": 0.0} | ({"time/eval_seconds": evaluate} if evaluate else {})


def saved(stall: float) -> dict[str, float]:
    return {"checkpoint/stall_seconds": stall, "checkpoint/wait_seconds": 0.0}


def nonzero(ledger: Ledger) -> dict[str, float]:
    return {cause: seconds for cause, seconds in ledger.seconds().items() if seconds}


# ---- one generation --------------------------------------------------------------------------------------------------


def test_a_generation_is_loaded_compiled_trained_evaluated_and_saved() -> None:
    book = GenerationBook(trained_step=0, now=100)
    book.compiled(6)
    book.step(1, took(10), now=130)  # 20 s until it began
    book.step(2, took(2), now=133)  # 1 s late
    book.step(3, took(2, evaluate=5), now=140)
    book.step(3, saved(1), now=141)
    assert nonzero(book.ledger()) == {"load": 20, "compile": 6, "train": 8, "evaluate": 5, "save": 1, "other": 1}
    assert book.ledger().step == 3


def test_a_step_that_the_run_has_taken_before_is_repeated_and_the_first_new_one_is_not() -> None:
    book = GenerationBook(trained_step=7, now=0)
    for step, now in ((6, 2), (7, 4), (8, 6)):
        book.step(step, took(2), now=now)
    assert nonzero(book.ledger()) == {"repeat": 4, "train": 2} and book.ledger().step == 8


def test_the_compilations_of_an_evaluation_are_taken_from_its_seconds() -> None:
    book = GenerationBook(trained_step=0, now=0)
    book.compiled(3)
    book.compiled(2)
    book.step(1, took(4, evaluate=3), now=7)
    assert nonzero(book.ledger()) == {"compile": 5, "evaluate": 2}


def test_compilations_take_no_more_than_the_step_that_holds_them_and_nothing_of_the_next() -> None:
    book = GenerationBook(trained_step=0, now=0)
    book.compiled(99)
    book.step(1, took(4), now=4)
    book.step(2, took(4), now=8)
    assert nonzero(book.ledger()) == {"compile": 4, "train": 4}


def test_messages_that_are_read_late_leave_each_second_where_it_was_spent() -> None:
    """The agent was busy: it reads the messages of three steps at the same moment."""
    book = GenerationBook(trained_step=0, now=0)
    for step in (1, 2, 3):
        book.step(step, took(2), now=16)
    assert nonzero(book.ledger()) == {"load": 10, "train": 6}


def test_only_an_evaluation_was_left_to_do() -> None:
    book = GenerationBook(trained_step=4, now=0)
    book.step(4, {"eval/loss": 2.0}, now=3)
    assert nonzero(book.ledger()) == {"load": 3} and book.ledger().step == 4


# ---- a coordinator's life --------------------------------------------------------------------------------------------


def generation(**seconds: Any) -> Ledger:
    return Ledger(**seconds)


def test_a_failure_is_noticed_then_the_ranks_are_restarted_and_restored() -> None:
    book = CoordinatorBook(life="a", now=0)
    assert book.ordered("g1", now=4) == "load"
    assert nonzero(book.ledger(9).booked) == {"start": 4, "load": 5}
    book.account("g1", generation(load=5, train=10, step=10), 20)
    assert nonzero(book.ledger(20).booked) == {"start": 4, "load": 5, "train": 10, "other": 1}
    book.failed(21)
    assert nonzero(book.ledger(22).booked) == {"start": 4, "load": 5, "train": 10, "notice": 2, "restart": 1}
    # Node 0's last word comes after another node's rank died.
    book.account("g1", generation(load=5, train=11, step=11), 24)
    assert book.ordered("g2", now=24) == "restore"
    assert nonzero(book.ledger(24).booked) == {"start": 4, "load": 5, "train": 11, "notice": 1, "restart": 3}
    assert nonzero(book.ledger(25).booked) == {
        "start": 4, "load": 5, "train": 11, "notice": 1, "restart": 3, "restore": 1,
    }  # fmt: skip
    book.account("g2", generation(restore=1, repeat=2, train=3, step=12), 32)
    book.ended()
    assert nonzero(book.ledger(32).booked) == {
        "start": 4, "load": 5, "train": 14, "notice": 1, "restart": 3, "restore": 1, "repeat": 2, "finish": 2,
    }  # fmt: skip
    assert book.ledger(32).booked.step == 12


def test_a_generation_that_takes_the_place_of_a_failed_one_is_restored_until_its_first_step() -> None:
    book = GenerationBook(trained_step=7, now=100, begins="restore")
    assert nonzero(book.ledger()) == {}
    book.step(7, took(2), now=105)
    assert nonzero(book.ledger()) == {"restore": 3, "repeat": 2}


def test_the_time_in_which_agents_are_missing_after_a_failure_is_waited() -> None:
    book = CoordinatorBook(life="a", now=0)
    # Before the first order it is the start, whoever is waited for.
    book.agents_missing(1, missing=True)
    book.ordered("g1", now=2)
    book.account("g1", generation(train=8, step=8), 10)
    book.failed(11)
    book.agents_missing(13, missing=True)
    book.agents_missing(20, missing=False)
    book.ordered("g2", now=21)
    assert nonzero(book.ledger(21).booked) == {"start": 2, "train": 8, "notice": 1, "restart": 3, "wait": 7}
    book.account("g2", generation(train=3, step=11), 24)
    # Nobody knows when they died: others were waited for ever since they were heard last.
    book.failed(31)
    book.agents_lost()
    book.ordered("g3", now=32)
    assert nonzero(book.ledger(32).booked) == {"start": 2, "train": 11, "notice": 1, "restart": 3, "wait": 15}


@pytest.mark.parametrize("ordered, failed, cause", [(False, False, "start"), (True, True, "restart")])
def test_a_run_that_ends_while_no_rank_lives_was_waiting_for_them(ordered: bool, failed: bool, cause: str) -> None:
    book = CoordinatorBook(life="a", now=0)
    if ordered:
        book.ordered("g1", now=0)
    if failed:
        book.failed(0)
    book.ended()
    assert nonzero(book.ledger(8).booked) == {cause: 8}


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_driver_books_what_it_hears_and_the_time_around_it() -> None:
    before = Ledger(train=100, down=20, step=50)
    book = RunBook(before, now=1000)
    assert book.ledger(1005) == before + Ledger(start=5)
    book.heard(LifeLedger("a", Ledger(start=2)), now=1010)  # born 8 s after the claim
    assert book.before_coordinator() == Before(before + Ledger(start=8))
    book.heard(LifeLedger("a", Ledger(start=3, train=30, step=80)), now=1042)  # its messages took a second in all
    assert book.ledger(1042) == before + Ledger(start=11, train=30, other=1, step=80)
    book.finishing(now=1042)
    assert book.ledger(1050) == before + Ledger(start=11, train=30, other=1, finish=8, step=80)


def test_an_answer_that_was_heard_late_shortens_the_end_and_nothing_else() -> None:
    book = RunBook(Ledger(), now=0.0)
    # Half a second on its way: the coordinator was born at 1.0, and not at 1.5.
    book.heard(LifeLedger("a", Ledger(start=1.0)), now=2.5)
    book.heard(LifeLedger("a", Ledger(start=1.0, train=8.0, step=3)), now=10.0)
    book.finishing(now=10.0)
    found = book.ledger(12.0)
    assert (found.start, found.train, found.finish, found.total) == (2.5, 8.0, 1.5, 12.0)


def test_a_coordinator_that_started_again_takes_nothing_away() -> None:
    book = RunBook(Ledger(), now=0)
    book.heard(LifeLedger("a", Ledger(start=1, train=9, step=5)), now=10)
    book.heard(LifeLedger("b", Ledger(start=2)), now=16)  # silent for 4 s
    assert nonzero(book.before_coordinator().without(LifeLedger("b"))) == {"start": 1, "train": 9, "restart": 4}
    book.heard(LifeLedger("b", Ledger(start=2, repeat=3, step=5)), now=19)
    assert nonzero(book.ledger(19)) == {"start": 3, "train": 9, "restart": 4, "repeat": 3}
    assert book.ledger(19).step == 5


def test_a_coordinator_that_outlived_the_first_before_it_was_asked_is_another_one() -> None:
    book = RunBook(Ledger(), now=0)
    book.heard(LifeLedger("a", Ledger(start=1, train=9, step=5)), now=10)
    book.heard(LifeLedger("b", Ledger(start=20)), now=40)
    assert nonzero(book.ledger(40)) == {"start": 21, "train": 9, "restart": 10} and book.ledger(40).step == 5


def test_a_clock_that_runs_fast_makes_no_time() -> None:
    book = RunBook(Ledger(), now=0)
    book.heard(LifeLedger("a", Ledger()), now=0)
    book.heard(LifeLedger("a", Ledger(train=800.8, other=200.2)), now=1000)  # a thousandth too fast
    assert book.ledger(1000).seconds() == pytest.approx(Ledger(train=800, other=200).seconds())


def test_a_generation_that_outlives_its_coordinator_is_counted_once() -> None:
    """Whenever the driver asks, and whatever the new coordinator has been told by then."""
    book = RunBook(Ledger(), now=0)
    book.heard(LifeLedger("a", Ledger(start=2), "g1", Ledger(load=1, train=7, step=7)), now=10)
    second = CoordinatorBook(life="b", now=13)

    # No agent has spoken yet: it may be gone with the dead one.
    book.heard(second.ledger(14), now=14)
    assert nonzero(book.ledger(14)) == {"start": 3, "load": 1, "train": 7, "restart": 3}
    second.ran_before(1, book.before_coordinator())
    # An agent watches its ranks, and has booked nothing yet: as before.
    second.found_running("g1", now=14)
    book.heard(second.ledger(15), now=15)
    assert nonzero(book.ledger(15)) == {"start": 3, "load": 1, "train": 7, "restart": 3, "other": 1}
    # It has: its word covers all since the order.
    second.account("g1", Ledger(load=1, train=12, step=12), now=15)
    assert nonzero(second.whole_run(16)) == {"start": 2, "load": 1, "train": 12, "other": 1}
    book.heard(second.ledger(16), now=16)
    assert nonzero(book.ledger(16)) == {"start": 2, "load": 1, "train": 12, "other": 1}
    second.ran_before(2, book.before_coordinator())
    assert nonzero(second.whole_run(16)) == {"start": 2, "load": 1, "train": 12, "other": 1}
    # The next generation closes it, for good.
    second.failed(18)
    second.ordered("g2", now=20)
    book.heard(second.ledger(20), now=20)
    assert nonzero(book.ledger(20)) == nonzero(second.whole_run(20))
    assert (book.ledger(20).total, book.ledger(20).train) == (20, 12)


def test_a_generation_that_ended_with_its_coordinator_keeps_what_it_had() -> None:
    book = RunBook(Ledger(), now=0)
    book.heard(LifeLedger("a", Ledger(start=2), "g1", Ledger(train=8, step=8)), now=10)
    second = CoordinatorBook(life="b", now=13)
    second.found_running("g1", now=13)  # by node 1's agent; node 0's is dead, so nobody ever books for it
    second.ordered("g2", now=14)
    second.account("g2", Ledger(load=1, train=2, step=9), now=17)
    book.heard(second.ledger(17), now=17)
    found = book.ledger(17)
    assert (found.train, found.step, found.total) == (10, 9, 17) and found.restart == 3


def test_a_run_that_has_ended_does_not_restart() -> None:
    book = CoordinatorBook(life="a", now=0)
    book.ordered("g1", now=0)
    book.account("g1", Ledger(train=3, step=3), now=4)
    book.ended()
    book.failed(5)
    book.agents_lost()
    book.agents_missing(6, missing=True)
    assert nonzero(book.ledger(9).booked) == {"train": 3, "finish": 6}


def test_goodput_is_the_share_of_training_also_of_no_time_at_all() -> None:
    assert Ledger(train=3, down=9).goodput == 0.25
    assert Ledger().goodput == 0


def test_each_cause_is_a_metric() -> None:
    metrics = Ledger(train=3, down=9).metrics()
    check_metrics(metrics)
    assert metrics.keys() == {name for name in METRICS if name.startswith("goodput/")}
    assert (metrics["goodput/ratio"], metrics["goodput/wall_seconds"]) == (0.25, 12)
    assert len(metrics) == len(CAUSES) + 2


# ---- anything that can happen ----------------------------------------------------------------------------------------

SECONDS = st.floats(0, 1e5) | st.just(0.0)
EVENTS = st.tuples(
    st.sampled_from(
        [
            "order",
            "compile",
            "step",
            "save",
            "account",
            "fail",
            "lose agents",
            "miss agents",
            "find agents",
            "end",
            "lose coordinator",
            "find running",
            "ask",
            "lose driver",
            "finish",
        ]
    ),
    SECONDS,  # until it happens
    SECONDS,  # what somebody measured, right or wrong
    st.integers(0, 20),
)


class Played:
    """A run's books on one clock, from 0 on."""

    def __init__(self) -> None:
        self.now = 0.0
        # The coordinator, if its book begins there, and not with a generation that it found.
        self.born: float | None = 0.0
        self.run = RunBook(Ledger(), now=0)
        self.lives = 0
        self.number = 0
        self.coordinator = CoordinatorBook(life="0", now=0)
        self.generation = GenerationBook(trained_step=0, now=0)

    def happen(self, what: str, seconds: float, measured: float, step: int) -> None:
        before, self.now = self.now, self.now + seconds
        match what:
            case "order":
                self.number += 1
                begins = self.coordinator.ordered(f"g{self.number}", self.now)
                trained_step = self.run.ledger(self.now).step
                self.generation = GenerationBook(trained_step=trained_step, now=self.now, begins=begins)
            case "compile":
                self.generation.compiled(measured)
            case "step":
                self.generation.step(step, took(measured, measured / 2), self.now)
            case "save":
                self.generation.step(step, saved(measured), self.now)
            case "account":
                self.coordinator.account(f"g{self.number}", self.generation.ledger(), self.now)
            case "fail":
                self.coordinator.failed(self.now)
            case "lose agents":
                self.coordinator.agents_lost()
            case "miss agents":
                self.coordinator.agents_missing(self.now, missing=True)
            case "find agents":
                self.coordinator.agents_missing(self.now, missing=False)
            case "end":
                self.coordinator.ended()
            case "lose coordinator":
                self.begin_life()
            case "find running":
                self.begin_life()
                self.coordinator.found_running(f"g{self.number}", self.now)
                self.born = None
            case "ask":
                self.run.heard(self.coordinator.ledger(self.now), now=self.now)
            case "lose driver":
                self.run = RunBook(self.run.ledger(before) + Ledger(down=seconds), now=self.now)
                self.begin_life()
            case "finish":
                self.run.finishing(now=self.now)

    def begin_life(self) -> None:
        self.lives += 1
        self.coordinator, self.born = CoordinatorBook(life=str(self.lives), now=self.now), self.now

    def ledgers(self) -> Iterator[tuple[Ledger, float]]:
        """Each book's, and the wall time that it is of."""
        yield self.run.ledger(self.now), self.now
        if self.born is not None:
            yield self.coordinator.ledger(self.now).booked, self.now - self.born


@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_the_causes_are_the_wall_time_and_none_is_negative(
    events: list[tuple[str, float, float, int]],
) -> None:
    played = Played()
    steps = [0]
    for event in events:
        played.happen(*event)
        for ledger, wall_seconds in played.ledgers():
            assert math.isclose(ledger.total, wall_seconds, rel_tol=1e-9, abs_tol=1e-6)
            assert min(ledger.seconds().values()) >= 0
        steps.append(played.run.ledger(played.now).step)
    assert all(earlier <= later for earlier, later in pairwise(steps))
