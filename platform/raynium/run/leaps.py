"""What follows from a step that leapt: what the run leaves out, and how far it goes back. Pure."""

from dataclasses import dataclass

# A leap so few steps after one that was undone is that one again: the state gone back to was spoilt before it showed.
COMES_BACK_STEPS = 20
# Then so many steps before the first of them are left out too, and all go back to a state older than these: first the
# few steps, if the leap comes back again the more. (PaLM's authors went back 100 steps and left out 200 to 500.)
SUSPECTED_STEPS = (10, 40, 160)


@dataclass(frozen=True)
class LeftOut:
    """Steps that the run leaves out, though its config does not say so, in order. undone: their loss or norm leapt when
    they were taken before. suspected: a leap came back after them.
    """

    undone: tuple[int, ...] = ()
    suspected: tuple[int, ...] = ()

    def with_those_of(self, other: "LeftOut") -> "LeftOut":
        undone = {*self.undone, *other.undone}
        suspected = {*self.suspected, *other.suspected} - undone
        return LeftOut(tuple(sorted(undone)), tuple(sorted(suspected)))


@dataclass(frozen=True)
class Undo:
    """leapt: the step. suspected: others that are left out with it. before: a state of this step or a later one is
    spoilt; None: none is.
    """

    leapt: int
    suspected: range = range(0)
    before: int | None = None


class Leaps:
    """One per life of the coordinator: another one begins with the newest state again."""

    def __init__(self) -> None:
        self._first = self._last = 0
        self._came_back = 0

    def undo(self, step: int) -> Undo:
        """A leap after so many that came back is undone alone. Every leap of every burst is a bad step to the ranks, so
        fault.max_bad_steps ends a run that cannot be helped."""
        comes_back = self._last > 0 and step <= self._last + COMES_BACK_STEPS
        self._came_back = self._came_back + 1 if comes_back else 0
        self._first = min(self._first, step) if comes_back else step
        self._last = step
        if not 0 < self._came_back <= len(SUSPECTED_STEPS):
            return Undo(step)
        before = max(1, self._first - SUSPECTED_STEPS[self._came_back - 1])
        return Undo(step, range(before, step), before)
