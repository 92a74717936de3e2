"""Which checkpoints a run has, which of them to start from, and which to delete. No torch."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raynium.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    MANIFEST_NAME,
    CheckpointTooNew,
    Manifest,
    manifest_from_bytes,
    manifest_key,
    step_folder,
    step_of_folder,
)
from raynium.checkpoint.store import KeyMissing, Store
from raynium.errors import CheckpointDamaged, CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: its place, and its manifest, already read and checked."""

    store: Store
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def uri(self) -> str:
        """The checkpoint's folder, for people and MLflow."""
        return self.store.uri(step_folder(self.step))

    def shard_key(self, index: int) -> str:
        """The key in the store of data file `index` of the manifest."""
        return f"{step_folder(self.step)}/{self.manifest.shards[index].key}"


@dataclass(frozen=True)
class CheckpointSummary:
    """One line of a listing. Where `problem` is set the checkpoint cannot be used, and the numbers are zero."""

    step: int
    generation: str
    num_bytes: int
    committed_unix: float
    world_size: int
    problem: str | None = None


def open_checkpoint(store: Store, step: int) -> CheckpointRef:
    """The checkpoint of one step. CheckpointError if there is none, CheckpointDamaged, CheckpointTooNew."""
    where = store.uri(manifest_key(step))
    try:
        data = store.read(manifest_key(step))
    except KeyMissing as error:
        raise CheckpointError(f"{store.url} has no checkpoint of step {step} ({MANIFEST_NAME} is missing)") from error
    manifest = manifest_from_bytes(data, where=where)
    if manifest.step != step:
        raise CheckpointDamaged(f"{where} says that it is of step {manifest.step}")
    return CheckpointRef(store, manifest)


def choose_checkpoint(store: Store, step: int | None = None) -> CheckpointRef:
    """The checkpoint of `step`, or the newest that is whole. Raises CheckpointError if there is none."""
    ref = open_checkpoint(store, step) if step is not None else latest(store)
    if ref is None:
        raise CheckpointError(f"run {store.url} has no checkpoint. Check its name, or wait for its first one")
    return ref


def latest(store: Store) -> CheckpointRef | None:
    """The newest checkpoint that is whole, None if there is none; reads only, so anybody may call it.

    A newer one with a damaged manifest is passed over with a warning; one of a newer format raises CheckpointTooNew,
    because going on from an older step would silently throw its progress away.
    """
    for step in reversed(_committed_steps(store)):
        try:
            return open_checkpoint(store, step)
        except CheckpointDamaged as error:
            logger.warning("CHECKPOINT DAMAGED, using the next older one: %s", error)
    return None


def resume_point(store: Store) -> CheckpointRef | None:
    """`latest`, for the owner of the run that will write on from there: only the run coordinator calls it.

    Damaged manifests of newer steps are renamed to manifest-damaged.json, so that those steps can be committed again.
    """
    ref = latest(store)
    for step in _committed_steps(store):
        if ref is None or step > ref.step:
            set_aside(store, step)
    return ref


def set_aside(store: Store, step: int) -> None:
    """Take a checkpoint that proved damaged out of the catalog, keeping its manifest beside for people to look at."""
    key = manifest_key(step)
    aside = f"{step_folder(step)}/manifest-damaged.json"
    logger.warning("setting aside the damaged checkpoint %s as %s", store.uri(key), aside)
    store.replace(aside, store.read(key))
    store.delete(key)


def list_checkpoints(store: Store) -> list[CheckpointSummary]:
    """All of a run's checkpoints, oldest first; those that cannot be used are there too, with the reason."""
    return [_summary(store, step) for step in _committed_steps(store)]


def _summary(store: Store, step: int) -> CheckpointSummary:
    try:
        manifest = open_checkpoint(store, step).manifest
    except CheckpointError as error:
        return CheckpointSummary(step, "", 0, 0.0, 0, str(error))
    return CheckpointSummary(
        step, manifest.generation, manifest.num_bytes, manifest.committed_unix, manifest.world_size
    )


# ---- retention ----------------------------------------------------------------------------------------------------


def expired(steps: Iterable[int], *, keep_last: int) -> list[int]:
    """Of committed steps, those to delete: all but the newest `keep_last` (at least 1). Oldest first."""
    assert keep_last >= 1, "the newest checkpoint is never deleted"
    return sorted(steps)[:-keep_last]


def apply_retention(store: Store, *, keep_last: int, generation: str) -> list[int]:
    """Delete what expired and what crashed saves left behind. Called after a commit, by its process. Returns the steps.

    Only checkpoints whose manifest is whole count as kept. Below the newest one, files that no manifest names go too,
    unless they are of `generation`, the living one, which may still be uploading them.
    """
    usable: dict[int, str] = {}  # step → generation
    damaged: list[int] = []
    for step in _committed_steps(store):
        try:
            usable[step] = open_checkpoint(store, step).manifest.generation
        except CheckpointTooNew:
            continue  # somebody's good checkpoint, not ours to delete
        except CheckpointDamaged:
            damaged.append(step)
    gone = expired(usable, keep_last=keep_last)
    gone += [step for step in damaged if step < min(usable.keys() - set(gone), default=0)]
    for step in sorted(gone):
        delete_checkpoint(store, step)
    if usable:
        _delete_orphans(store, usable, newest=max(usable), living=generation)
    return sorted(gone)


def delete_checkpoint(store: Store, step: int) -> None:
    """Manifest first: if this process dies between, what is left is an orphan and not a broken checkpoint."""
    store.delete(manifest_key(step))
    count = store.delete_prefix(step_folder(step))
    logger.info("deleted the checkpoint of step %d (%d files)", step, count)


def _delete_orphans(store: Store, usable: Mapping[int, str], *, newest: int, living: str) -> None:
    """Generations' folders of older steps that no manifest names: half-saved, or of a writer that lost."""
    unreadable = set(_committed_steps(store)) - usable.keys()
    for step in _steps_with_folder(store):
        if step >= newest or step in unreadable:
            continue
        for folder in store.list(step_folder(step), recursive=False).folders:
            if folder.rpartition("/")[2] not in (living, usable.get(step)):
                count = store.delete_prefix(folder)
                logger.info("deleted what an unfinished save left in %s (%d files)", folder, count)


def _steps_with_folder(store: Store) -> list[int]:
    folders = store.list(CHECKPOINTS_FOLDER, recursive=False).folders
    return sorted(step for folder in folders if (step := step_of_folder(folder)) is not None)


def _committed_steps(store: Store) -> Sequence[int]:
    """Steps that have a manifest, whole or not, oldest first."""
    return [step for step in _steps_with_folder(store) if store.exists(manifest_key(step))]
