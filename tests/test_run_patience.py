"""When a run gives up, and how long it waits between its tries."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynium.config.fault import FaultSection
from raynium.health.faults import Fault
from raynium.run.protocol import RankExit
from raynium.run.verdicts.failures import Verdicts
from raynium.run.verdicts.patience import LONGEST_PAUSE_SECONDS, Patience, comes_by_itself

pytestmark = pytest.mark.quick

KILLED = RankExit(1, -9, "killed by SIGKILL", retry=True)
BUG = RankExit(1, 1, "IndexError: index 57 is out of range", retry=True, error="IndexError")


def patience(most: int = 1000) -> Patience:
    return Patience(FaultSection(max_restarts_without_progress=most))


def test_a_run_that_gets_on_never_waits_and_one_that_does_not_waits_ever_longer() -> None:
    each = patience()
    pauses = []
    for step in (10, 20, 20, 15, 20, 20, 21, 21):
        each.restart(step=step)
        pauses.append(each.pause_seconds())
    assert pauses == [0, 0, 1, 2, 4, 8, 0, 1]


@given(st.lists(st.integers(0, 5), max_size=2000))
def test_no_pause_is_longer_than_a_minute(steps: list[int]) -> None:
    each = patience()
    for step in steps:
        each.restart(step=step)
        assert 0 <= each.pause_seconds() <= LONGEST_PAUSE_SECONDS


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time() -> None:
    each = patience()
    assert each.repeats(BUG, step=7) is None
    again = RankExit(0, 1, "IndexError: index 3 is out of range", retry=True, error="IndexError")
    assert "the same failure as before, at the same place (after step 7)" in (each.repeats(again, step=7) or "")


@pytest.mark.parametrize(
    "between, step",
    [
        (None, 8),
        (RankExit(1, 1, "KeyError: 'tokens'", retry=True, error="KeyError"), 7),
        (KILLED, 7),
    ],
    ids=["it came farther", "another failure came", "it was killed"],
)
def test_a_failure_that_is_another_begins_anew(between: RankExit | None, step: int) -> None:
    each = patience()
    assert each.repeats(BUG, step=7) is None
    if between is not None:
        assert each.repeats(between, step=7) is None
    assert each.repeats(BUG, step=step) is None


@pytest.mark.parametrize(
    "exit, own",
    [
        (BUG, True),
        (KILLED, False),
        (RankExit(0, -15, "killed by SIGTERM", retry=True), False),
        (RankExit(0, -11, "killed by SIGSEGV", retry=True), True),
        (RankExit(0, 7, "exit code 7 without a reason", retry=True), False),
        (RankExit(0, 1, "StoreError: no answer", retry=True, error="StoreError"), False),
        (RankExit(0, 1, "DistNetworkError: refused", retry=True, error="DistNetworkError"), False),
        (RankExit(0, -9, "out of memory", retry=True, fault=Fault("out-of-memory", "x", "restart", "job")), True),
        (RankExit(0, 1, "closed", retry=True, error="RuntimeError", fault=Fault("p", "x", "restart", "peer")), False),
        (RankExit(0, 1, "ECC", retry=True, error="RuntimeError", fault=Fault("e", "x", "replace", "node")), False),
    ],
)
def test_only_what_a_program_does_itself_is_expected_to_come_again(exit: RankExit, own: bool) -> None:
    assert comes_by_itself(exit) is own


def test_verdicts_end_a_run_whose_failure_repeats_and_hold_back_one_that_does_not_get_on() -> None:
    verdicts = Verdicts(FaultSection(max_restarts_without_progress=9))
    first = verdicts.ranks_failed(BUG, step=7, now=0.0)
    assert (first.ends, first.pause_seconds) == (None, 0.0)
    second = verdicts.ranks_failed(BUG, step=7, now=1.0)
    assert second.ends is not None and second.ends.startswith(
        "rank 1: IndexError: index 57 is out of range. That is the"
    )
    killed = [verdicts.ranks_failed(KILLED, step=7, now=2.0), verdicts.ranks_failed(KILLED, step=7, now=3.0)]
    assert [(each.ends, each.pause_seconds) for each in killed] == [(None, 2.0), (None, 4.0)]
    hung = verdicts.hung("hang: rank 0", step=7)
    assert (hung.ends, hung.pause_seconds, hung.doubts_images) == (None, 8.0, False)
    verdicts = Verdicts(FaultSection(max_restarts_without_progress=0))
    ends = verdicts.hung("hang: rank 0", step=7).ends
    assert ends is not None and ends.startswith("hang: rank 0. That is failure number 1 without progress")


def test_only_a_step_that_no_restart_takes_again_and_is_newer_than_all_such_is_progress() -> None:
    each = patience(most=1)
    ended = []
    for kept in (0, 10, 20, 20, 15, 21):
        each.keeps(kept)
        ended.append((each.restart(step=30) is not None, each.node_failure() is not None))
    assert [ranks for ranks, _ in ended] == [False, False, False, True, True, False]
    assert not any(nodes for _, nodes in ended)


def test_a_pause_is_a_number_however_often_it_failed() -> None:
    each = patience()
    for _ in range(5000):
        each.restart(step=3)
    assert math.isfinite(each.pause_seconds())
