"""Who runs the tasks of a job on data: this process one after the other, or Ray on many nodes."""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Runner(Protocol):
    """The results of `task(shared, item)` for all items, in any order, each as it comes.

    A task is a function of a module, may be run again after a death, and then does nothing else. What one raises is
    raised here. Closing what is returned ends what runs.
    """

    def __call__(
        self, task: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]
    ) -> Generator[Result]: ...


def in_this_process(task: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Generator[Result]:
    """A `Runner` without any other process."""
    return (task(shared, item) for item in items)
