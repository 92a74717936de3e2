"""The optimizer's rules: the learning rate of a step, and which parameters decay. No torch here."""

import math

from raynium.config.schema import OptimizerSection


def learning_rate(optimizer: OptimizerSection, *, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, which counts from 1 to total_steps.

    Warm-up is linear and reaches the peak at step `warmup_steps` (the first step is not wasted on a rate of 0). Then
    cosine falls to peak * final_learning_rate_ratio at the last step; wsd (warm-up, stable, decay) holds the peak and
    falls linearly to the same rate over the last `decay_fraction` of all steps; constant holds the peak.
    """
    assert 1 <= step <= total_steps, f"step {step} of {total_steps}"
    peak, final = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_learning_rate_ratio
    if step < optimizer.warmup_steps:
        return peak * step / optimizer.warmup_steps
    match optimizer.schedule:
        case "constant":
            return peak
        case "cosine":
            progress = _progress(step, begin=optimizer.warmup_steps, end=total_steps)
            return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
        case "wsd":
            decay_steps = round(optimizer.decay_fraction * total_steps)
            begin = max(optimizer.warmup_steps, total_steps - decay_steps)
            return peak + (final - peak) * _progress(step, begin=begin, end=total_steps)


def _progress(step: int, *, begin: int, end: int) -> float:
    """0 up to step `begin`, 1 at step `end`, linear between."""
    return 0.0 if step <= begin else (step - begin) / (end - begin)


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: to matrices, embedding and head among them (as in nanoGPT), not to norms."""
    return len(shape) >= 2
