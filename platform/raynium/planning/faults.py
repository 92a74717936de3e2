"""Rules of what is watched, kept and left out against faults. As in `rules.py`, a rule yields messages."""

from collections import Counter
from collections.abc import Iterator

from raynium.config.schema import Config


def audits(config: Config) -> Iterator[str]:
    every, other = config.fault.audit_every_steps, None
    if config.engine.kind == "nxd":
        other = "engine.kind nxd, whose passes add", "engine.kind to native"
    elif config.engine.fsdp == "simple":
        other = "engine.fsdp simple, whose graphs add", "engine.fsdp to fsdp2"
    if every is not None and other is not None:
        yield (
            f"fault.audit_every_steps is {every} with {other[0]} up the gradients of ranks before anybody can compare "
            f"them: set {other[1]}, or fault.audit_every_steps to null"
        )


def snapshots(config: Config) -> Iterator[str]:
    every = config.fault.snapshot_every_steps
    if every is not None and config.checkpoint.save == "never":
        yield (
            f"fault.snapshot_every_steps is {every} with checkpoint.save never, which keeps no snapshot either: set "
            "fault.snapshot_every_steps to null, or checkpoint.save to steps"
        )


def left_out(config: Config) -> Iterator[str]:
    steps, last = config.data.leave_out_steps, config.train.steps
    if twice := [step for step, number in Counter(steps).items() if number > 1]:
        yield f"data.leave_out_steps has {twice[0]} more than once: name each step once"
    # With epochs it is asked again once they are settled.
    if last is not None and (beyond := [step for step in steps if step > last]):
        yield (
            f"data.leave_out_steps has {beyond[0]}, and train.steps is {last}: a step that never comes is a mistake; "
            "take it out, or look which step was meant"
        )
