"""Which image is copied to the buddy next. Pure; its user holds a lock.

A node's ranks are sent one after the other. If newer snapshots came first, a node that sends for longer than it takes
between two would give its buddy some ranks of each step, and all of none: so the step that was begun becomes whole.
"""

from raynium.node.images import Hold


class CopyQueue:
    """Of the images that wait, those of the step that is being sent, and the newest of each rank."""

    def __init__(self) -> None:
        # Rank → its images, oldest first.
        self._waiting: dict[int, list[Hold]] = {}
        self._step: int | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def offer(self, rank: int, newest: Hold) -> None:
        """A snapshot of this rank's."""
        self._keep(rank, [each for each in self._waiting.get(rank, ()) if each.step == self._step], newest)

    def take(self) -> tuple[int, Hold]:
        """The next one, which its sender releases; there is one."""
        if not (ranks := self._ranks()):
            self._step = max(holds[-1].step for holds in self._waiting.values())
            ranks = self._ranks()
        first, *others = self._waiting.pop(ranks[0])
        if others:
            self._waiting[ranks[0]] = others
        return ranks[0], first

    def give_up(self, step: int) -> None:
        """One of its images was written again before it was sent: it never becomes whole."""
        for rank, holds in list(self._waiting.items()):
            self._keep(rank, [each for each in holds if each.step != step])

    def clear(self) -> None:
        for rank in list(self._waiting):
            self._keep(rank, [])

    def _ranks(self) -> list[int]:
        """That have an image of the step that is being sent."""
        return [rank for rank, holds in self._waiting.items() if any(each.step == self._step for each in holds)]

    def _keep(self, rank: int, some: list[Hold], newest: Hold | None = None) -> None:
        """Of those that wait; the others are written again whenever their rank likes."""
        for each in self._waiting.pop(rank, ()):
            if each not in some:
                each.release()
        if kept := [*some, *([] if newest is None else [newest])]:
            self._waiting[rank] = kept
