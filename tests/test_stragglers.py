"""Which rank the others wait for, by the whole sequence of what ranks tell."""

import json

import pytest

from raynium.run.protocol import RankTimes
from raynium.run.verdicts.stragglers import ARTIFACT, ROUNDS_IN_A_ROW, Straggler, Stragglers

pytestmark = pytest.mark.quick

STEP_SECONDS = 1.0


def times(step: int, *own: float, first: int = 0) -> dict[int, RankTimes]:
    return {rank: RankTimes(step, each, each, each, STEP_SECONDS) for rank, each in enumerate(own, first)}


def slow_in(rounds: list[tuple[float, ...]]) -> list[list[int]]:
    """Who is named after each round."""
    stragglers = Stragglers(world_size=len(rounds[0]), ranks_per_node=1)
    return [
        [each.rank for each in stragglers.seen(times(20 * number, *own))] for number, own in enumerate(rounds, start=1)
    ]


def test_a_rank_is_named_once_it_was_slow_in_three_rounds_in_a_row() -> None:
    alike, slow = (0.5, 0.5, 0.5), (0.5, 0.8, 0.5)
    assert ROUNDS_IN_A_ROW == 3
    assert slow_in([alike] * 5) == [[]] * 5
    assert slow_in([slow] * 5) == [[], [], [1], [], []]
    assert slow_in([slow, slow, alike, slow, slow, slow]) == [[], [], [], [], [], [1]]
    assert slow_in([slow, slow, slow, alike, slow, slow, slow]) == [[], [], [1], [], [], [], [1]]
    assert slow_in([(0.5, 0.8, 0.9)] * 3) == [[]] * 3, "less than a fifth of the step after the middle one"
    assert slow_in([(0.5, 0.8, 0.5, 0.9)] * 3) == [[], [], [1, 3]]


def test_of_two_ranks_the_slower_one_is_named_and_less_than_a_fifth_of_the_step_is_nothing() -> None:
    assert slow_in([(0.9, 0.5)] * 3) == [[], [], [0]]
    assert slow_in([(0.69, 0.5)] * 5) == [[]] * 5


def test_ranks_are_compared_when_all_have_told_of_the_same_steps() -> None:
    stragglers = Stragglers(world_size=4, ranks_per_node=2)
    for step in (20, 40, 60):
        assert stragglers.seen(times(step, 0.5, 0.5)) == []
        before = dict(stragglers.metrics)
        assert bool(before) == (step > 20)
        found = stragglers.seen(times(step, 0.5, 0.9, first=2))
    assert found == [Straggler(3, 0.9, 0.5, STEP_SECONDS)]
    assert str(found[0]) == (
        "it needs 900.0 ms of a step of 1000.0 ms and the middle rank 500.0 ms, so that the others wait for it 40% of "
        "the time"
    )
    assert stragglers.metrics == {
        "time/slowest_rank_seconds": 0.9,
        "time/median_rank_seconds": 0.5,
        "time/rank_spread_seconds": 0.4,
    }
    told = json.loads(stragglers.artifacts[ARTIFACT])
    assert told["step"] == 60 and told["ranks"]["3"] == {
        "node": 1,
        "step": 60,
        "median_seconds": 0.9,
        "p90_seconds": 0.9,
        "most_seconds": 0.9,
        "step_seconds": 1.0,
    }
