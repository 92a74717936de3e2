"""What a leap makes the run leave out, and how far it goes back: by the whole sequence of leaps."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loop import GOOD

from raynium.run.leaps import COMES_BACK_STEPS, SUSPECTED_STEPS, Leaps, LeftOut, Undo
from raynium.train.guard import Guard, TooManyBadSteps


def test_leaps_far_apart_are_undone_alone() -> None:
    leaps = Leaps()
    assert [leaps.undo(step) for step in (60, 81, 200)] == [Undo(60), Undo(81), Undo(200)]


def test_one_that_comes_back_takes_more_and_more_steps_before_it_along_and_then_no_more() -> None:
    leaps = Leaps()
    assert [leaps.undo(step) for step in (500, 503, 510, 511, 512, 700)] == [
        Undo(500),
        Undo(503, range(490, 503), 490),
        Undo(510, range(460, 510), 460),
        Undo(511, range(340, 511), 340),
        Undo(512),
        Undo(700),
    ]
    # Far from it all begins anew, and no step is before the first.
    assert leaps.undo(705) == Undo(705, range(690, 705), 690)
    early = Leaps()
    assert [early.undo(4), early.undo(5)] == [Undo(4), Undo(5, range(1, 5), 1)]


@given(st.lists(st.integers(1, 2000), max_size=40))
def test_it_goes_back_a_bounded_number_of_times_and_never_to_what_it_leaves_out(steps: list[int]) -> None:
    leaps, in_a_row, last = Leaps(), 0, -COMES_BACK_STEPS
    for step in steps:
        undo = leaps.undo(step)
        assert undo.leapt == step
        in_a_row = in_a_row + 1 if step <= last + COMES_BACK_STEPS else 0
        last = step
        assert undo.before is None or 0 < in_a_row <= len(SUSPECTED_STEPS)
        assert undo.before is None or (undo.before >= 1 and undo.suspected == range(undo.before, step))


def ends_after(period: int, *, most_bad: int, num_steps: int = 3000) -> tuple[int, int] | None:
    """Ranks and coordinator of a run of which 4 of every `period` steps leap, from step 301 on, with a snapshot of each
    tenth step. How often it goes back until it ends, and the step that ends it; None: it is trained to its end."""
    leaps, left_out, times_back, start = Leaps(), LeftOut(), 0, 0
    states: dict[int, list[torch.Tensor]] = {0: [each.tensor for each in Guard().chunks(saved_here=True)]}
    while True:
        guard = Guard(undone=left_out.undone, suspected=left_out.suspected, most_bad=most_bad, spike_score=30)
        for chunk, tensor in zip(guard.chunks(saved_here=True), states[start], strict=True):
            chunk.tensor.copy_(tensor)
        for step in range(start + 1, num_steps + 1):
            loss = 50.0 if step > 300 and step % period < 4 else 3.0 + 0.05 * math.sin(step)
            verdict = guard.judge(step, replace(GOOD, loss=loss, updated=not guard.leaves_out(step)))
            if verdict is not None and verdict.ends is not None:
                break
            if step % 10 == 0:
                states[step] = [each.tensor.clone() for each in guard.chunks(saved_here=True)]
        else:
            return None
        if isinstance(verdict.ends, TooManyBadSteps):
            return times_back, step
        times_back += 1
        undo = leaps.undo(step)
        left_out = left_out.with_those_of(LeftOut((undo.leapt,), tuple(undo.suspected)))
        start = max(each for each in states if each < (undo.before or step))
        states = {each: state for each, state in states.items() if each <= start}


@pytest.mark.parametrize(
    ("period", "most_bad", "end"), [(30, 10, 363), (180, 10, 722), (180, 20, 1260), (240, 16, 1440)]
)
def test_a_run_goes_back_as_often_as_steps_may_be_bad_however_its_leaps_are_spread(
    period: int, most_bad: int, end: int
) -> None:
    assert ends_after(period, most_bad=most_bad) == (most_bad, end)
