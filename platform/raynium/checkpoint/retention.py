"""Which checkpoints are kept and why, and the deletion of all others and of what crashed saves left. No torch."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

from raynium.checkpoint.catalog import (
    CheckpointSummary,
    StepFolder,
    check_files,
    checkpoint_tags,
    delete_checkpoint,
    open_checkpoint,
    set_aside_key,
    step_folders,
    summaries,
)
from raynium.checkpoint.format.manifest import CHECKPOINTS_FOLDER, step_folder
from raynium.checkpoint.ref import CheckpointRef
from raynium.config.judged import Best, best_value_of
from raynium.config.schema import CheckpointSection
from raynium.errors import CheckpointDamaged
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

# What a generation that is over has not written to for so long is abandoned.
GRACE_SECONDS = 3600.0
# No generation takes so long to upload one file.
UPLOAD_SECONDS = 86_400.0


# ---- the policy: data in, decision out ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """A whole checkpoint is kept for any one of these reasons, or because it is tagged.

    keep_last: the newest so many, at least 1. keep_every_steps: those of steps that are multiples of it. keep_best: so
    many with the best `best_metric`, the lowest or the highest, among those that were evaluated.
    """

    keep_last: int
    keep_every_steps: int | None = None
    keep_best: int = 0
    best_metric: str = "eval/loss"
    best_is: Best = "lowest"

    def __post_init__(self) -> None:
        assert self.keep_last >= 1, "the newest checkpoint is never deleted"

    @classmethod
    def of(cls, section: CheckpointSection) -> Self:
        """What the run's config says."""
        best_is = best_value_of(section) or "lowest"
        return cls(section.keep_last, section.keep_every_steps, section.keep_best, section.best_metric, best_is)


def reasons_to_keep(checkpoints: Sequence[CheckpointSummary], policy: Retention) -> dict[int, tuple[str, ...]]:
    """Step → why its checkpoint is kept, in words; () for one that is to be deleted. Oldest first.

    Only whole ones count for the policy. A damaged one stays to be looked at until all of the last are newer; one of a
    newer format is somebody's good checkpoint, which we cannot judge.
    """
    newest_first = sorted(checkpoints, key=lambda each: -each.step)
    whole = [each for each in newest_first if each.condition == "whole"]
    last = {each.step for each in whole[: policy.keep_last]}
    scored = [each for each in whole if policy.best_metric in each.metrics]
    # The sort is stable: of equals the newer comes first.
    sign = -1 if policy.best_is == "highest" else 1
    scored.sort(key=lambda each: sign * each.metrics[policy.best_metric])
    best = {each.step for each in scored[: policy.keep_best]}
    every = policy.keep_every_steps

    def reasons(each: CheckpointSummary) -> tuple[str, ...]:
        tags = tuple(f"tag {tag}" for tag in each.tags)
        if each.condition == "too new":
            return ("newer format", *tags)
        if each.condition == "damaged":
            return ("damaged", *tags) if each.step > min(last, default=-1) else tags
        found = ["last"] if each.step in last else []
        found += [f"every {every:,} steps"] if every is not None and each.step % every == 0 else []
        found += [f"best {policy.best_metric}"] if each.step in best else []
        return (*found, *tags)

    return {each.step: reasons(each) for each in reversed(newest_first)}


def expired(checkpoints: Sequence[CheckpointSummary], policy: Retention) -> list[int]:
    """The steps that nothing keeps, oldest first."""
    return [step for step, reasons in reasons_to_keep(checkpoints, policy).items() if not reasons]


# ---- deleting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed:
    """What a call of `apply_retention` took away: the steps of checkpoints, oldest first.

    abandoned: folders of generations whose save was never committed. unfinished: uploads that never ended (multipart
    uploads on S3, temporary files else).
    """

    steps: tuple[int, ...] = ()
    abandoned: tuple[str, ...] = ()
    unfinished: int = 0


def apply_retention(
    store: Store,
    *,
    policy: Retention,
    living: Collection[str],
    now_unix: float,
    reading: Collection[int] = (),
    grace_seconds: float = GRACE_SECONDS,
) -> Removed:
    """Delete the checkpoints that nothing keeps, and what crashed saves left. Called after a commit, by its process.

    living: ids of the generations whose ranks or uploads may still write. What others left uncommitted goes once nobody
    has written to it for `grace_seconds`, and theirs once that is longer than any upload takes.
    reading: steps whose checkpoint somebody may still read; it stays until the next call.
    The newest checkpoint is looked at first, one request a file: CheckpointDamaged if it is not whole, CheckpointTooNew
    if it is of a newer format, and then nothing was deleted. StoreError if the store cannot be asked, or refuses.
    Two processes may call it at once, and one may die in it: what is left is whole, or an orphan for the next call.
    """
    folders = step_folders(store)
    newest = _whole_newest(store, folders)
    found = summaries(store, folders, opened=newest)
    unread = (step for step in expired(found, policy) if step not in reading)
    steps = [step for step in unread if _delete_expired(store, step, found, folders, living)]
    kept = [folder for folder in folders if folder.step not in steps]
    # A living generation may be slow: we know of it only that it writes no file, or upload, for so long
    idle_since = now_unix - grace_seconds
    idle_since_living = min(idle_since, now_unix - UPLOAD_SECONDS)
    abandoned = [
        f"{step_folder(folder.step)}/{generation}"
        for folder in kept
        for generation, written_unix in uncommitted_generations(folder, found, policy).items()
        if written_unix < (idle_since_living if generation in living else idle_since)
    ]
    for folder in kept:
        if folder.has_set_aside and not set_aside_stays(folder, found, policy):
            store.delete(set_aside_key(folder.step))
    # An upload that never ended shows in no listing. Beside files of a dead generation it is dead too
    unfinished = sum(store.discard_unfinished(name, older_than_unix=idle_since) for name in abandoned)
    began = idle_since_living if living else idle_since
    unfinished += store.discard_unfinished(CHECKPOINTS_FOLDER, older_than_unix=began)
    for name in abandoned:
        count = store.delete_prefix(name)
        logger.info("deleted what an unfinished save left in %s (%d files)", name, count)
    return Removed(tuple(steps), tuple(abandoned), unfinished)


def uncommitted_generations(
    folder: StepFolder, checkpoints: Sequence[CheckpointSummary], policy: Retention
) -> dict[str, float]:
    """The generations whose files in this step's folder belong to no checkpoint → when they last wrote one, unix."""
    mine = next((each for each in checkpoints if each.step == folder.step), None)
    if folder.manifest is not None and (mine is None or mine.condition != "whole"):
        # We do not know which of them the manifest names.
        return {}
    if set_aside_stays(folder, checkpoints, policy):
        return {}
    return {name: unix for name, unix in folder.generations.items() if mine is None or name != mine.generation}


def set_aside_stays(folder: StepFolder, checkpoints: Sequence[CheckpointSummary], policy: Retention) -> bool:
    """Whether the folder holds a damaged checkpoint that people may still look at, as in `reasons_to_keep`."""
    last = sorted(each.step for each in checkpoints if each.condition == "whole")[-policy.keep_last :]
    return folder.has_set_aside and (bool(folder.tags) or folder.step >= min(last, default=0))


def _whole_newest(store: Store, folders: Sequence[StepFolder]) -> CheckpointRef | None:
    """The newest checkpoint, its files looked at; None if there is none. Raises as `apply_retention`."""
    step = max((folder.step for folder in folders if folder.manifest is not None), default=None)
    if step is None:
        return None
    try:
        newest = open_checkpoint(store, step)
        check_files(newest)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"no older checkpoint is deleted, because the newest is not whole: {error}") from error
    return newest


def _delete_expired(
    store: Store,
    step: int,
    checkpoints: Sequence[CheckpointSummary],
    folders: Sequence[StepFolder],
    living: Collection[str],
) -> bool:
    """Whether it was deleted: not if it has just been tagged. What others of the living wrote there stays theirs."""
    if checkpoint_tags(store, step):
        return False
    [folder] = (each for each in folders if each.step == step)
    committed = {each.generation for each in checkpoints if each.step == step}
    writers = set(living) & folder.generations.keys() - committed
    count = delete_checkpoint(store, step, only=folder.generations.keys() - writers if writers else None)
    logger.info("deleted the checkpoint of step %d (%d files)", step, count)
    return True
