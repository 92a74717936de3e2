"""The driver's calls of the cluster that it does not wait for."""

import pytest

from raynium.launch.calls import Calls

pytestmark = pytest.mark.quick


def test_what_fails_in_a_call_that_nobody_waits_for_is_told_once_until_it_works_again() -> None:
    told: list[str] = []
    calls, works = Calls(tell=told.append), [False, False, True, False]

    def look(group: str) -> None:
        if not works.pop(0):
            raise RuntimeError(f"Ray knows of no {group}")

    line = "the driver's call about nodes that the run lacks failed: RuntimeError: Ray knows of no group"
    for expected in ([line], [line], [line], [line, line]):
        calls.make("nodes that the run lacks", look, "group")
        assert calls.ask(lambda: 7).result(60) == 7
        assert told == expected


def test_the_error_of_a_call_whose_answer_is_wanted_is_the_callers() -> None:
    calls = Calls(tell=pytest.fail)
    with pytest.raises(ZeroDivisionError):
        calls.ask(lambda: 1 // 0).result(60)
