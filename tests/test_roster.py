"""Who runs the next generation: pure, by whole sequences of what becomes of the agents."""

import pytest

from raynium.run.protocol import AgentInfo
from raynium.run.roster import Roster

pytestmark = pytest.mark.quick

NODES = 3


def agent(seat: int, *, life: int = 0, attempt: str = "a") -> AgentInfo:
    """life: how often the seat's agent was replaced."""
    host = f"127.0.0.{seat + 2}"
    return AgentInfo(attempt, seat, NODES, host, 29500, pid=1, incarnation=life)


class Run:
    """Agents that join, and what is ordered of those that are there. Two nodes do not fit."""

    def __init__(self, *, least_nodes: int | None = None, placed: bool = True):
        """placed: and the coordinator lives that saw Ray Train place them."""
        self.roster = Roster(fits=lambda nodes: nodes != 2, least_nodes=least_nodes, replace_seconds=60.0)
        if placed:
            self.roster.begins("a")
        self.roster.greets("a")

    def join(self, *seats: int, life: int = 0) -> None:
        for seat in seats:
            self.roster.joins(agent(seat, life=life))

    def crew(self, now: float = 0.0) -> list[int]:
        return [each.seat for each in self.roster.crew(now=now)]

    def order(self, now: float = 0.0) -> list[int]:
        crew = {each.seat: each.incarnation for each in self.roster.crew(now=now)}
        self.roster.departs(crew)
        return list(crew)


def test_ranks_start_once_enough_agents_are_there_and_the_rest_are_spares() -> None:
    run = Run()
    run.join(4, 1)
    assert run.crew() == []
    run.join(0)
    assert run.order() == [0, 1, 4]
    run.join(2, 3)
    assert run.crew() == [], "the ranks of the others run"


def test_after_a_failure_of_ranks_the_same_agents_are_waited_for_whose_memory_holds_the_snapshots() -> None:
    run = Run()
    run.join(0, 1, 2)
    assert run.order() == [0, 1, 2]
    run.join(3, 0, 2)
    assert run.crew() == [], "three are there, but agent 1 comes back"
    run.join(1)
    assert run.order() == [0, 1, 2]


def test_a_spare_takes_the_node_rank_of_a_lost_agent_and_who_replaces_that_one_is_the_next_spare() -> None:
    run = Run()
    run.join(0, 1, 2, 3)
    assert run.order() == [0, 1, 2]
    assert run.roster.loses({1: 0}) == [1] and run.roster.loses({1: 0}) == [], "told twice"
    run.join(0, 2)
    assert run.order() == [0, 3, 2], "the others keep their node ranks"
    run.join(1, life=1)
    assert run.crew() == []
    run.roster.loses({0: 0})
    run.join(3, 2)
    assert run.order() == [1, 3, 2]


def test_without_a_spare_the_one_that_replaces_it_takes_its_place_and_the_dead_one_is_not_heard() -> None:
    run = Run()
    run.join(0, 1, 2)
    run.order()
    # Nobody has told of the death.
    assert run.roster.replaces(agent(1, life=1)) and not run.roster.replaces(agent(1))
    run.roster.loses({1: 0})
    assert run.roster.is_past(agent(1)) and not run.roster.is_past(agent(1, life=1))
    run.join(0, 2)
    assert run.crew(now=1e9) == [] and run.roster.seconds_to_wait(now=0.0) is None, "cluster.min_nodes is not set"
    run.join(1, life=1)
    assert run.order() == [0, 1, 2]


def test_a_run_shrinks_to_what_fits_after_its_time_and_grows_once_a_node_is_there_again() -> None:
    run = Run(least_nodes=1)
    run.join(0, 1, 2)
    run.order()
    run.roster.loses({0: 0})
    run.join(1, 2)
    assert run.crew(now=100.0) == []
    assert run.roster.seconds_to_wait(now=110.0) == 50.0
    assert run.crew(now=159.0) == []
    assert run.order(now=160.0) == [1], "two do not fit: the largest number that does, and the rest are spares"
    assert not run.roster.can_grow(1), "the spare alone would make two"
    run.join(1)
    assert run.order(now=161.0) == [1], "who has shrunk does not wait again"
    run.join(0, life=1)
    assert run.roster.can_grow(1)
    run.join(1)
    assert run.order(now=162.0) == [1, 0, 2]


def test_agents_that_only_start_slowly_are_waited_for() -> None:
    run = Run(least_nodes=1)
    run.join(0)
    assert run.crew(now=0.0) == [] and run.crew(now=1e6) == [] and run.roster.seconds_to_wait(now=0.0) is None
    run.roster.loses({2: 0})
    assert run.crew(now=1e6) == [] and run.crew(now=1e6 + 60) == [0], "before it joined"
    run.join(1, 2)
    assert run.crew(now=1e6 + 61) == [0, 1, 2]


def test_a_run_waits_where_less_than_the_least_is_left() -> None:
    run = Run(least_nodes=3)
    run.join(0, 1, 2)
    run.order()
    run.roster.loses({0: 0})
    run.join(1, 2)
    assert run.crew(now=0.0) == [] and run.crew(now=1e6) == []


def test_a_node_that_a_verdict_named_is_left_out_while_there_are_enough_others() -> None:
    run = Run()
    run.join(0, 1, 2, 3)
    run.order()
    run.roster.bars(2)
    assert run.roster.has_enough
    run.join(0, 1, 2)
    assert run.order() == [0, 1, 3]
    run.roster.loses({0: 0})
    assert not run.roster.has_enough
    run.join(1, 3)
    assert run.order() == [2, 1, 3], "a bad node is better than none"


def test_a_node_that_was_taken_for_want_of_another_is_left_once_as_many_others_are_there() -> None:
    run = Run()
    run.roster.bars(0)
    run.roster.bars(1)
    run.join(0, 1, 2)
    assert run.order() == [0, 1, 2] and not run.roster.can_relieve()
    run.join(3)
    assert not run.roster.can_relieve(), "one of the two would be taken again, and again"
    run.join(4)
    assert run.roster.can_relieve()
    run.join(0, 1, 2)
    assert run.order() == [3, 4, 2] and not run.roster.can_relieve()


def test_who_has_gone_home_is_waited_for_no_more_and_of_the_dead_nobody_knows() -> None:
    run = Run()
    run.join(0, 1, 2)
    run.order()
    run.roster.loses({1: 0})
    assert run.roster.waits_for_seats and not run.roster.all_are_home
    for seat in (0, 2):
        run.roster.goes_home("a", seat, 0)
    assert run.roster.all_are_home


def test_another_attempt_begins_with_nothing_of_the_one_before() -> None:
    run = Run()
    run.join(0, 1, 2)
    run.order()
    run.roster.loses({1: 0})
    assert run.roster.greets("b") and not run.roster.waits_for_seats
    assert run.roster.is_past(agent(0))
    for seat in range(NODES):
        run.roster.joins(agent(seat, attempt="b"))
    assert run.order() == [0, 1, 2]


def test_a_coordinator_that_was_started_again_waits_so_long_for_those_it_did_not_see_placed() -> None:
    """One of them was lost, and its death was told once: to the coordinator that has died."""
    run = Run(least_nodes=1, placed=False)
    run.join(0, 1)
    assert run.crew(now=0.0) == [] and run.roster.seconds_to_wait(now=0.0) == 60.0
    assert run.crew(now=59.0) == []
    assert run.order(now=60.0) == [0]


def test_of_a_generation_that_was_found_the_silent_are_waited_for_and_a_spare_takes_their_place() -> None:
    run = Run(placed=False)
    run.roster.speaks(agent(0))
    run.roster.departs({0: 0, 1: 0, 2: 0})
    run.join(0, 3)
    assert run.crew(now=0.0) == [], "the ranks of the others may run"
    run.join(1)
    assert run.crew(now=5.0) == [] and run.roster.seconds_to_wait(now=5.0) == 60.0
    assert run.order(now=65.0) == [0, 1, 3]
    run.join(2)
    assert not run.roster.is_past(agent(2)), "it was only slow, and is the next spare"


def test_one_silent_agent_that_speaks_has_the_others_waited_for_anew() -> None:
    run = Run(placed=False)
    run.roster.departs({0: 0, 1: 0, 2: 0})
    run.join(0, 3, 4)
    assert run.crew(now=0.0) == []
    run.join(1)
    assert run.crew(now=59.0) == [] and run.roster.seconds_to_wait(now=59.0) == 60.0
    run.join(2)
    assert run.order(now=61.0) == [0, 1, 2], "all are there: nobody is waited for"


@pytest.mark.parametrize("first", ["old", "new"])
def test_of_two_that_claim_a_seat_the_newer_has_it_whoever_speaks_first(first: str) -> None:
    run = Run(placed=False)
    old, new = agent(1), agent(1, life=1)
    if first == "old":
        run.roster.joins(old)
        assert run.roster.replaces(new)
        run.roster.loses({1: 0})
        run.roster.joins(new)
    else:
        run.roster.joins(new)
    assert run.roster.is_past(old) and not run.roster.replaces(old) and not run.roster.is_past(new)
    assert run.roster.loses({1: 0}) == [], "a late word of the old one's death is none of the new one"
    run.join(0, 2)
    assert run.crew() == [0, 1, 2] and run.roster.crew(now=0.0)[1] == new


def test_a_generation_that_was_found_says_who_has_its_seats_before_they_speak() -> None:
    run = Run(placed=False)
    run.join(1)
    run.roster.departs({0: 0, 1: 1, 2: 0})
    assert run.roster.is_past(agent(1)) and not run.roster.is_past(agent(1, life=1)) and not run.roster.ready()


def test_an_attempt_that_is_older_is_no_newer_one_whoever_speaks_first() -> None:
    run = Run(placed=False)
    assert run.roster.greets("b") and not run.roster.greets("a")
    assert run.roster.is_past(agent(0)) and not run.roster.is_past(agent(0, attempt="b"))


def test_what_is_to_leave_is_so_before_it_speaks_and_later_attempts_are_not_meant() -> None:
    roster = Roster(fits=lambda nodes: True, least_nodes=None, replace_seconds=60.0)
    roster.leave("b")
    assert not roster.is_left
    assert roster.greets("a") and roster.is_left and not roster.is_current("a")
    assert not roster.begins("b"), "it replaces those that left: nothing was lost"
    assert roster.greets("b") and roster.is_current("b")
    roster.leave("b")
    assert roster.is_current("b"), "told again, late"
