"""Calls that a driver makes of the cluster without waiting for them: one that is gone would not answer."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Calls:
    """Of one driver, one at a time and in order, in a thread."""

    def __init__(self, *, tell: Callable[[str], None]):
        """tell: a line for the user's terminal."""
        self._tell = tell
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="driver-calls")
        # What the calls were about that failed last.
        self._failing: set[str] = set()

    def ask(self, call: Callable[[], T]) -> "Future[T]":
        """Of which the caller wants the answer, or the error."""
        return self._pool.submit(call)

    def make(self, about: str, call: Callable[..., object], *arguments: object) -> None:
        """Of which nobody waits for the answer. That it fails is told, once until one about the same succeeds."""
        self._pool.submit(self._made, about, call, *arguments)

    def _made(self, about: str, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if about not in self._failing:
                self._tell(f"the driver's call about {about} failed: {type(error).__name__}: {error}")
            self._failing.add(about)
        else:
            self._failing.discard(about)
