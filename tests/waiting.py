"""For what other threads and processes do, and asking a coordinator to come to an end."""

import time
from collections.abc import Callable
from typing import TypeVar

from raynium.run.coordinator import RunCoordinator

Value = TypeVar("Value")


def wait_for(condition: Callable[[], Value], *, seconds: float = 200, pause_seconds: float = 0.005) -> Value:
    """The first value of `condition()` that counts as true. `seconds`: after which the test fails, generously."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} seconds"
        time.sleep(pause_seconds)
    return value


async def stop(coordinator: RunCoordinator) -> None:
    """As the driver asks, who has met it."""
    await coordinator.request_stop((await coordinator.status(0)).ledger.life)
