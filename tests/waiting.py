"""For what other threads and processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_for(condition: Callable[[], Value], *, seconds: float = 200, pause_seconds: float = 0.005) -> Value:
    """The first value of `condition()` that counts as true. `seconds`: after which the test fails, generously."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} seconds"
        time.sleep(pause_seconds)
    return value
