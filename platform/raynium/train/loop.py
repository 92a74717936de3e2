"""The training loop. Every part it needs is an argument; `rank/build.py` builds them.

One call of `train()` is one generation's work on one rank: from the step after the checkpoint it resumed from, to the
last step of the run or to the first step at which some rank was asked to stop.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from raynium.config.schema import Config
from raynium.data.batch import Batch
from raynium.engines.base import StepResult, Votes
from raynium.train.guard import Guard, TooManyBadSteps, evidence_path
from raynium.train.link import Link
from raynium.train.metrics import Throughput
from raynium.train.patience import Patience


class Steps(Protocol):
    """How a step is taken: an engine, or one whose steps are audited."""

    def step(self, batch: Batch, *, step: int, votes: Votes) -> StepResult:
        """See `engines/base.py`, Engine."""
        ...


class Batches(Protocol):
    """This rank's batches, in step order."""

    def batch(self, step: int) -> Batch:
        """The batch of step `step` (steps count from 1)."""
        ...

    def names(self, step: int) -> str:
        """The samples of `step`, of all ranks, in words."""
        ...

    def metrics(self, step: int) -> dict[str, float]:
        """What getting the batches up to `step` took and took of, if there is something to say."""
        ...


class Evidence(Protocol):
    """See `raynium/rank/evidence.py`."""

    def of(self, step: int, batch: Batch, result: StepResult, why: str) -> str:
        """What is kept of a step that ends the run. All ranks call it."""
        ...


class Snapshots(Protocol):
    """Saves the training state; see `raynium/rank/snapshots.py`."""

    def wants_to_skip(self, *, upload: bool) -> bool:
        """Whether this rank would rather leave out a save that came now."""
        ...

    def save(self, step: int, *, upload: bool) -> None:
        """Reports what a snapshot cost, and hands it over. All ranks call it after the same step.

        upload: it becomes a checkpoint; else it is for a restart from memory.
        """
        ...


@dataclass(frozen=True)
class Cadence:
    """When the loop does what. All counts are optimizer steps; the last step always evaluates and saves."""

    total_steps: int
    checkpoint_every: int
    evaluate_every: int
    snapshot_every: int | None = None

    @classmethod
    def of(cls, config: Config) -> "Cadence":
        every = config.checkpoint.every_steps, config.evaluate.every_steps, config.fault.snapshot_every_steps
        return cls(config.train.num_steps, *every)

    def saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.total_steps

    def snapshots(self, step: int) -> bool:
        return self.snapshot_every is not None and step % self.snapshot_every == 0

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.total_steps


@dataclass(frozen=True)
class Outcome:
    """How one generation ended on this rank; equal on all ranks.

    step: the last one taken, whose state is in the last checkpoint. why: of a run that finished before its last step.
    """

    step: int
    reason: Literal["finished", "stopped"]
    why: str | None = None


def train(
    *,
    engine: Steps,
    batches: Batches,
    cadence: Cadence,
    start_step: int,
    evaluate: Callable[[], dict[str, float]],
    guard: Guard,
    evidence: Evidence,
    patience: Patience,
    snapshots: Snapshots,
    throughput: Throughput,
    link: Link,
) -> Outcome:
    """Trains from the step after `start_step` until the run is finished or stopped. All ranks call it together.

    `evaluate()` returns metrics and is collective. A rank that dies anywhere in here takes the generation down: the
    agents kill the others, which may be waiting for it in a collective.
    """
    assert start_step <= cadence.total_steps
    if start_step == cadence.total_steps or patience.is_over():
        # Killed between the last save and the end of the run: only the last evaluation may not have been reported.
        link.step(start_step, evaluate())
        return Outcome(start_step, "finished", patience.is_over())

    skipped_saves = 0
    for step in range(start_step + 1, cadence.total_steps + 1):
        began = time.perf_counter()

        # ---- fetch: the samples of this step are a pure function of the step ------------------------------------
        batch = batches.batch(step)
        fetched = time.perf_counter()
        link.phase("step", step)

        # ---- step: forward, backward, clip, update. Ends with the loss known on every rank ----------------------
        upload = cadence.saves(step)
        skip = snapshots.wants_to_skip(upload=upload)
        votes = Votes(link.stop_requested(), skip, leave_out=guard.leaves_out(step))
        result: StepResult = engine.step(batch, step=step, votes=votes)
        stepped = time.perf_counter()

        # ---- judge: a bad step has changed nothing, on no rank; too many of them end the run --------------------
        if (bad := guard.judge(step, result)) is not None:
            link.bad_step(step, f"{bad.why}; {batches.names(step)}")
            if isinstance(bad.ends, TooManyBadSteps):
                link.artifact(evidence_path(step), evidence.of(step, batch, result, bad.why))
            if bad.ends is not None:
                raise bad.ends

        # ---- report: rank 0's go to MLflow through the agent, never on this thread's time -----------------------
        metrics = throughput.metrics(step, result, step_seconds=stepped - began, data_seconds=fetched - began)
        metrics |= batches.metrics(step) | guard.metrics()
        if result.waited_seconds is not None:
            link.took(step, own_seconds=stepped - began - result.waited_seconds, step_seconds=stepped - began)

        # ---- evaluate before saving, so that a checkpoint at this step implies its evaluation was reported ------
        stopping, enough = result.agreed.stop, None
        if cadence.evaluates(step):
            link.phase("evaluate", step)
            metrics |= evaluate()
            enough = patience.judge(step, metrics)
            metrics["time/eval_seconds"] = time.perf_counter() - stepped
        link.step(step, metrics)

        # ---- save: the copy into shared memory is the only stall, unless two uploads are behind -----------------
        last = stopping or enough is not None or step == cadence.total_steps
        if upload and result.agreed.skip_save and not last:
            skipped_saves += 1
            link.step(step, {"checkpoint/skipped_saves": float(skipped_saves)})
        elif last or upload or (cadence.snapshots(step) and not result.agreed.skip_save):
            link.phase("save", step)
            snapshots.save(step, upload=last or upload)

        # ---- stop: agreed inside the step's all-reduce, so all ranks leave at the same step ---------------------
        if last and step < cadence.total_steps:
            return Outcome(step, "stopped" if enough is None else "finished", enough)

    return Outcome(cadence.total_steps, "finished")
