"""Removing a checkpoint by hand: what the run still needs is kept. No ray."""

import time

from raynium.checkpoint.catalog import delete_checkpoint, list_checkpoints
from raynium.checkpoint.store import Store
from raynium.errors import CheckpointError, RunInUse
from raynium.launch.record import read_record


def remove_checkpoint(store: Store, step: int, *, force: bool) -> None:
    """Delete the checkpoint of `step`, also a damaged one. Raises as `check_removable`."""
    check_removable(store, step, force=force)
    delete_checkpoint(store, step)


def check_removable(store: Store, step: int, *, force: bool) -> None:
    """CheckpointError if there is no checkpoint of `step`, or if the run needs it.

    It does where no later one is whole, since the run would go on from an older one, or from nothing. `force` overrides
    that, but not while the run is live: then RunInUse.
    """
    checkpoints = list_checkpoints(store)
    if step not in {each.step for each in checkpoints}:
        steps = ", ".join(f"{each.step:,}" for each in checkpoints) or "none"
        raise CheckpointError(f"{store.url} has no checkpoint of step {step:,}: it has {steps}")
    if any(each.step > step and each.problem is None for each in checkpoints):
        return
    record = read_record(store)
    if record is not None and record.owner_is_alive(time.time()):
        raise RunInUse(
            f"step {step:,} is the newest checkpoint of a live run, which would restart from it: stop the run first, "
            f"with `raynium stop {record.name}`"
        )
    if not force:
        raise CheckpointError(
            f"step {step:,} is the newest checkpoint of {store.url}: without it the run would go on from an older one, "
            f"or from nothing. Use --force if that is meant"
        )
