"""What a leap makes the run leave out, and how far it goes back: by the whole sequence of leaps."""

from hypothesis import given
from hypothesis import strategies as st

from raynium.run.leaps import COMES_BACK_STEPS, SUSPECTED_STEPS, Leaps, Undo
from raynium.train.guard import MOST_KEPT


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


def test_what_one_leap_may_leave_out_is_less_than_a_run_remembers() -> None:
    assert SUSPECTED_STEPS[-1] + (len(SUSPECTED_STEPS) + 1) * COMES_BACK_STEPS < MOST_KEPT
