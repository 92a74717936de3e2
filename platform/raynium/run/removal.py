"""Removing a checkpoint by hand: what the run or its people still need is kept. No ray."""

import time

from raynium.checkpoint.catalog import (
    CheckpointSummary,
    check_files,
    delete_checkpoint,
    list_checkpoints,
    no_such_checkpoint,
    open_checkpoint,
)
from raynium.errors import CheckpointDamaged, CheckpointError, RunInUse
from raynium.run.record import read_record
from raynium.storage.store import Store


def remove_checkpoint(store: Store, step: int, *, force: bool) -> None:
    """Delete the checkpoint of `step`, also a damaged one. Raises as `check_removable`."""
    check_removable(store, step, force=force)
    delete_checkpoint(store, step)


def check_removable(store: Store, step: int, *, force: bool) -> None:
    """CheckpointError if there is no checkpoint of `step`, if it is tagged, or if the run needs it.

    It does where no later one is whole, since the run would go on from an older one, or from nothing. `force` overrides
    both, but the latter not while the run is live: then RunInUse. Looks at a later one's files, one request each.
    """
    checkpoints = list_checkpoints(store)
    found = next((each for each in checkpoints if each.step == step), None)
    if found is None:
        raise no_such_checkpoint(store, step)
    if found.tags and not force:
        run = store.url.rpartition("/")[2]
        raise CheckpointError(
            f"step {step:,} of {store.url} is tagged {', '.join(found.tags)}, so somebody wants to keep it: remove the "
            f"tag with `raynium checkpoints tag {run}@{step} {found.tags[0]} --remove`, or use --force"
        )
    later = [each for each in checkpoints if each.step > step]
    if any(_is_whole(store, each) for each in reversed(later)):
        return
    record = read_record(store)
    if record is not None and record.owner_is_alive(time.time()):
        raise RunInUse(
            f"step {step:,} is the newest whole checkpoint of a live run, which would restart from it: stop the run "
            f"first, with `raynium stop {record.name}`"
        )
    if not force:
        raise CheckpointError(
            f"step {step:,} is the newest checkpoint of {store.url}, and no later one is whole: without it the run "
            f"would go on from an older one, or from nothing. Use --force if that is meant"
        )


def _is_whole(store: Store, checkpoint: CheckpointSummary) -> bool:
    if checkpoint.condition != "whole":
        return False
    try:
        check_files(open_checkpoint(store, checkpoint.step))
    except CheckpointDamaged:
        return False
    return True
