"""Judges each step before it can reach a checkpoint, and keeps which steps the run has not learned from.

That list is part of the training state, beside the step: it is saved and restored with the weights, so that a
generation that goes on from there counts the same updates, at any world size.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import torch

from raynium.checkpoint.state import LEFT_OUT_NAME, Chunk
from raynium.config.schema import Config
from raynium.engines.base import StepResult

# Of the steps that were left out so many are kept, the newest: more than may be bad in BAD_AMONG steps.
MOST_KEPT = 256
# fault.max_bad_steps of so many steps in a row are lived with.
BAD_AMONG = 1000


class TooManyBadSteps(Exception):
    """The run cannot be trained on like this. Not retried: the same steps would give the same numbers."""


@dataclass(frozen=True)
class Verdict:
    """On a step that was not learned from. why: a sentence's end, after "step 7: ". ends: what is to be raised."""

    why: str
    ends: Exception | None = None


class Guard:
    """The same on every rank: all are given the same numbers, in the order of the steps."""

    def __init__(self, *, told: Collection[int] = (), most_bad: int = 0):
        """told: steps that are to be left out. most_bad: of others, among any BAD_AMONG in a row."""
        assert most_bad < MOST_KEPT
        self._told, self._most_bad = frozenset(told), most_bad
        # How many steps were left out since step 0, then the newest of them, the last one first; 0: none.
        self._left_out = torch.zeros(1 + MOST_KEPT, dtype=torch.int64)

    @classmethod
    def of(cls, config: Config) -> Self:
        """What the run's config says."""
        return cls(told=config.data.leave_out_steps, most_bad=config.fault.max_bad_steps)

    def leaves_out(self, step: int) -> bool:
        """Whether this step, which comes next, is not to be learned from."""
        return step in self._told

    def judge(self, step: int, result: StepResult) -> Verdict | None:
        """None: it was learned from."""
        if result.updated:
            return None
        self._note(step)
        numbers = f"loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}"
        if step in self._told:
            return Verdict(f"left out as data.leave_out_steps says ({numbers})")
        assert not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)) or result.agreed.leave_out
        why = f"{numbers}: not finite, so nothing was learned from it"
        bad = self._bad_by(step)
        if len(bad) <= self._most_bad:
            return Verdict(why)
        return Verdict(
            why,
            TooManyBadSteps(
                f"step {step}: {why}. Of the last {BAD_AMONG} steps {len(bad)} were bad "
                f"({', '.join(str(each) for each in bad[-8:])}; fault.max_bad_steps={self._most_bad}). Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_steps, or set engine.dtype=float32, and start the "
                "run again: it continues from its last checkpoint"
            ),
        )

    def updates(self, step: int) -> int:
        """How many updates the state after this step has seen."""
        return step - int(self._left_out[0])

    def metrics(self) -> dict[str, float]:
        """Nothing while nothing was left out."""
        total = float(self._left_out[0])
        return {"train/left_out_steps": total} if total else {}

    def chunks(self, *, saved_here: bool) -> list[Chunk]:
        """What checkpoints hold of it."""
        return [Chunk.whole(LEFT_OUT_NAME, self._left_out, saved_here=saved_here)]

    def _note(self, step: int) -> None:
        newest = self._left_out[1:]
        newest.copy_(newest.roll(1))
        newest[0] = step
        self._left_out[0] += 1

    def _bad_by(self, step: int) -> list[int]:
        """Of the last BAD_AMONG steps those that nobody wanted to leave out, oldest first."""
        recent = (each for each in self._left_out[1:].tolist() if each > max(0, step - BAD_AMONG))
        return sorted(each for each in recent if each not in self._told)
