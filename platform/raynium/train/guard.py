"""Judges each step before it can reach a checkpoint."""

import math

from raynium.engines.base import StepResult


class BadStep(Exception):
    """A step whose numbers cannot be trained on. Not retried: the same step would give the same numbers."""


def judge(step: int, result: StepResult) -> None:
    """Raises BadStep when the loss or the gradient norm is not finite. Every rank sees the same numbers."""
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    raise BadStep(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; both must be finite. "
        f"Nothing of this step was saved. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or set "
        f"engine.dtype=float32, and start the run again: it continues from its last checkpoint."
    )
