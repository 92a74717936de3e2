"""Judges each step before it can reach a checkpoint, and keeps which steps the run has not learned from.

That list is part of the training state, beside the step: it is saved and restored with the weights, so that a
generation that goes on from there counts the same updates, at any world size. So are the recent losses and norms that a
leap is told by: a step is judged alike however often it is taken.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from raynium.checkpoint.state import LEFT_OUT_NAME, RECENT_NAME, Chunk
from raynium.config.schema import Config
from raynium.engines.base import StepResult

# fault.max_bad_steps of so many steps in a row are lived with.
BAD_AMONG = 1000
# Of the steps that were left out so many are kept, the newest: all of BAD_AMONG, since a leap that came back may take
# hundreds along, and those before it must not be forgotten.
MOST_KEPT = BAD_AMONG
# A leap is told by so many losses and norms, once half of them are there.
RECENT_STEPS = 100
# Of a normal distribution the median deviation from the median times this is the standard deviation.
DEVIATIONS = 1.4826
# Where numbers hardly vary, less than this share of them is no leap of one deviation.
LEAST_DEVIATION = 0.01
# What a model does that learns a small text by heart is no leap: its norms are nearly 0, and now and then four times
# the greatest of the last hundred, which clipping sees to. So a leap also passes all of them: a loss by so many nats, a
# norm so many times.
NATS_ABOVE_ALL = 0.5
TIMES_ALL = 10.0
# Nor does a gradient leap that is no greater than this, or than what is clipped.
USUAL_NORM = 1.0


def evidence_path(step: int) -> str:
    """The artifact that says what the step was which ended the run; see `rank/evidence.py`."""
    return f"bad-steps/step-{step:09d}.json"


class TooManyBadSteps(Exception):
    """The run cannot be trained on like this. Not retried: the same steps would give the same numbers."""


class Spike(Exception):
    """A step that is to be undone: who starts the ranks again has them go back, and leave it out."""

    def __init__(self, step: int, why: str):
        super().__init__(f"step {step}: {why}")
        self.step = step


@dataclass(frozen=True)
class Verdict:
    """On a step that is not to be learned from. why: a sentence's end, after "step 7: ". ends: what is to be raised."""

    why: str
    ends: Exception | None = None


class Guard:
    """The same on every rank: all are given the same numbers, in the order of the steps."""

    def __init__(
        self,
        *,
        told: Collection[int] = (),
        undone: Collection[int] = (),
        suspected: Collection[int] = (),
        most_bad: int = 0,
        spike_score: float | None = None,
        clip_norm: float = USUAL_NORM,
        begins: Collection[int] = (),
    ):
        """told: steps that are to be left out. undone: others that are, since they leapt when they were taken before.
        suspected: others that are, since a leap came back after them. most_bad: steps that were not finite or leapt,
        told ones aside, among any BAD_AMONG in a row. spike_score: see `leap`; None: nothing leaps. clip_norm: a norm
        within it does not. begins: steps from which on the data is another, so that no loss before is like those to
        come.
        """
        assert most_bad < MOST_KEPT
        self._told, self._undone, self._most_bad = frozenset(told), frozenset(undone), most_bad
        self._suspected = frozenset(suspected) - self._undone
        self._spike_score, self._begins = spike_score, frozenset(begins)
        self._least_norm = min(clip_norm, USUAL_NORM)
        # Losses and gradient norms of steps that were learned from, each at its step modulo RECENT_STEPS. Infinite
        # where there is none, since NaN is not equal to itself when two states are compared.
        self._recent = torch.full((2, RECENT_STEPS), math.inf, dtype=torch.float64)
        # How many steps were left out since step 0, then the newest of them, the last one first; 0: none. It is the
        # same for a step that leapt and for one that was told to be left out, so that two such runs are equal.
        self._left_out = torch.zeros(1 + MOST_KEPT, dtype=torch.int64)

    @classmethod
    def of(cls, config: Config, *, undone: Collection[int] = (), suspected: Collection[int] = ()) -> Self:
        """What the run's config says. undone, suspected: as above."""
        return cls(
            told=config.data.leave_out_steps,
            undone=undone,
            suspected=suspected,
            most_bad=config.fault.max_bad_steps,
            spike_score=config.fault.spike_score,
            clip_norm=config.optimizer.clip_norm,
            begins=[stage.from_step for stage in config.data.stages],
        )

    def leaves_out(self, step: int) -> bool:
        """Whether this step, which comes next, is not to be learned from."""
        return step in self._told or step in self._undone or step in self._suspected

    def judge(self, step: int, result: StepResult) -> Verdict | None:
        """None: it was learned from, and stays so."""
        if step in self._begins:
            self._recent.fill_(math.inf)
        numbers = f"loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}"
        leapt = self._leaps(step, result) if result.updated else None
        if result.updated and leapt is None:
            self._recent[:, step % RECENT_STEPS] = torch.tensor((result.loss, result.grad_norm))
            return None
        self._note(step)
        if step in self._told:
            return Verdict(f"left out as data.leave_out_steps says ({numbers})")
        if step in self._suspected:
            return Verdict(f"left out, since a leap came back that was undone alone ({numbers})")
        if leapt is not None:
            why = f"{numbers}: {leapt}"
        elif step in self._undone:
            why = f"{numbers}: left out, since it leapt when it was taken before"
        else:
            why = f"{numbers}: not finite, so nothing was learned from it"
        bad = self._bad_around(step)
        if len(bad) <= self._most_bad:
            if leapt is None:
                return Verdict(why)
            why = f"{why}, so all go back to the last snapshot and leave it out"
            return Verdict(why, Spike(step, why))
        return Verdict(
            why,
            TooManyBadSteps(
                f"step {step}: {why}. Of {BAD_AMONG} steps in a row {len(bad)} were bad "
                f"({', '.join(str(each) for each in bad[-8:])}; fault.max_bad_steps={self._most_bad}); the samples of "
                f"this one and the gradient norm of each layer are in the artifact {evidence_path(step)}. Lower "
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
        kept = {LEFT_OUT_NAME: self._left_out, RECENT_NAME: self._recent}
        return [Chunk.whole(name, tensor, saved_here=saved_here) for name, tensor in kept.items()]

    def _leaps(self, step: int, result: StepResult) -> str | None:
        """A norm that leaps where as many steps were bad as may be does not count: it is clipped and learned from, and
        a run whose loss stays is healthy, however often that happens."""
        if self._spike_score is None:
            return None
        losses, norms = ([each for each in recent if math.isfinite(each)] for recent in self._recent.tolist())
        least_loss = max(losses, default=0.0) + NATS_ABOVE_ALL
        least_norm = max(max(norms, default=0.0) * TIMES_ALL, self._least_norm)
        for name, value, recent, least in (
            ("loss", result.loss, losses, least_loss),
            ("gradient norm", result.grad_norm, norms, least_norm),
        ):
            score, median = leap(value, recent)
            if score > self._spike_score and value > least:
                if name == "gradient norm" and len(self._bad_around(step)) >= self._most_bad:
                    return None
                return (
                    f"the {name} lies {score:.0f} robust standard deviations above the median {median:.6g} of the last "
                    f"{RECENT_STEPS} steps (fault.spike_score={self._spike_score:g}), and above all of them"
                )
        return None

    def _note(self, step: int) -> None:
        newest = self._left_out[1:]
        newest.copy_(newest.roll(1))
        newest[0] = step
        self._left_out[0] += 1

    def _bad_around(self, step: int) -> list[int]:
        """Of BAD_AMONG steps in a row with this one among them, the bad ones, in order: of those where they are most.

        What was undone counts wherever the run has gone back to: it is not in a state from before it, and a run that
        goes back must not forget why.
        """
        noted = {each for each in self._left_out[1:].tolist() if each > 0} - self._suspected
        near = range(step - BAD_AMONG + 1, step + BAD_AMONG)
        bad = sorted(each for each in (noted | self._undone) - self._told if each in near)
        firsts = [each for each in bad if each < step]
        windows = ([each for each in bad if first <= each < first + BAD_AMONG] for first in (*firsts, step))
        return max(windows, key=len)


def leap(value: float, recent: Sequence[float]) -> tuple[float, float]:
    """By how many robust standard deviations a value lies above the median of recent ones, and that median.

    Too few of them tell nothing: 0.
    """
    if len(recent) < RECENT_STEPS // 2:
        return 0.0, math.nan
    median = statistics.median(recent)
    deviation = DEVIATIONS * statistics.median([abs(each - median) for each in recent])
    return (value - median) / max(deviation, LEAST_DEVIATION * abs(median), 1e-300), median
