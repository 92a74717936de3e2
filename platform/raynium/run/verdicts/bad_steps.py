"""Which of the steps that nothing was learned from are news, and which of them are one fault. Pure."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from raynium.run.leaps import COMES_BACK_STEPS


@dataclass(frozen=True)
class Burst:
    """Bad steps close together. cause: of the first. num_steps: how many they are. last: the farthest."""

    first: int
    cause: str
    num_steps: int
    last: int

    @property
    def key(self) -> str:
        """Of its incident: whoever finds the burst again, in a replay or another life, tells of the same one."""
        return f"bad-steps-{self.first}"

    def __str__(self) -> str:
        more = f" (the first of {self.num_steps} bad steps up to step {self.last})" if self.num_steps > 1 else ""
        return f"{self.cause}{more}"


class BadSteps:
    """One per life of the coordinator."""

    def __init__(self, left_out: Collection[int]):
        """left_out: what the config says; nobody is surprised by those."""
        self._known = set(left_out)
        self._burst: Burst | None = None

    def knows(self, left_out: Collection[int]) -> None:
        """The ranks of the next generation are told to leave these out."""
        self._known.update(left_out)

    def news(self, step: int, cause: str) -> Burst | None:
        """The step was left out. The burst that it begins or goes on with; None: that was known before."""
        if step in self._known:
            return None
        self._known.add(step)
        before = self._burst
        if before is None or step > before.last + COMES_BACK_STEPS:
            self._burst = Burst(step, cause, 1, step)
        else:
            self._burst = replace(before, num_steps=before.num_steps + 1, last=max(step, before.last))
        return self._burst

    def undone(self, step: int, cause: str) -> Burst:
        """All go back behind the step. Ranks may have told that it was left out before they ended, or not."""
        burst = self.news(step, cause) or self._burst
        return burst if burst is not None else Burst(step, cause, 1, step)
