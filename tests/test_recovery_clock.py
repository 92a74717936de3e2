"""Where a recovery's time goes, by whole sequences."""

import pytest

from raynium.node.recovery_clock import AGREE, DRAIN, FORK, RecoveryClock

pytestmark = pytest.mark.quick


def test_a_recovery_is_told_once_with_the_time_of_each_phase() -> None:
    clock = RecoveryClock()
    assert clock.stepped(1.0) is None, "nothing has failed"
    clock.failed(10.0)
    for phase, now in (
        (DRAIN, 10.25),
        (AGREE, 10.5),
        (FORK, 11.0),
        ("start", 11.125),
        ("group", 11.25),
        ("build", 11.5),
        ("step", 12.0),
    ):
        clock.begins(phase, now)
    assert clock.stepped(12.5) == (
        "the next step was done 2.50 s after the failure was seen: settle 0.250, drain 0.250, agree 0.500, fork 0.125, "
        "start 0.125, group 0.250, build 0.500, step 0.500"
    )
    assert clock.stepped(13.0) is None


def test_a_failure_in_a_recovery_prolongs_it() -> None:
    clock = RecoveryClock()
    clock.failed(0.0)
    clock.begins(FORK, 1.0)
    clock.failed(1.5)
    clock.begins(FORK, 2.0)
    clock.begins("step", 2.25)
    assert clock.stepped(4.0) == (
        "the next step was done 4.00 s after the failure was seen: settle 1.500, fork 0.750, step 1.750"
    )


def test_phases_of_a_run_that_did_not_fail_are_no_recovery() -> None:
    clock = RecoveryClock()
    for now, phase in enumerate((AGREE, FORK, "start", "step")):
        clock.begins(phase, float(now))
    assert clock.stepped(9.0) is None
