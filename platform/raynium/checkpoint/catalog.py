"""Which checkpoints a run has, how they are tagged, and which of them to start from. No torch."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakKeyDictionary

from raynium.checkpoint.format.manifest import (
    CHECKPOINTS_FOLDER,
    MANIFEST_NAME,
    CheckpointTooNew,
    Manifest,
    generation_of,
    is_shard,
    manifest_from_bytes,
    manifest_key,
    step_folder,
    step_of_folder,
)
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.verify import damage_text, verify_checkpoint
from raynium.errors import CheckpointDamaged, CheckpointError, some
from raynium.storage.backend import KeyMissing, Listing
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

IfDamaged = Literal["stop", "use_older"]
# Of a manifest; only whole ones can be used.
Condition = Literal["whole", "damaged", "too new"]

# Hides S3's latency; a manifest of a thousand ranks may have tens of megabytes.
MANIFEST_READERS = 8
_ASIDE_NAME = "manifest-damaged.json"
_TAG_PREFIX = "tag-"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


@dataclass(frozen=True)
class CheckpointSummary:
    """One line of a listing. Where `problem` is set the checkpoint cannot be used, and the numbers are zero."""

    step: int
    generation: str
    num_bytes: int
    committed_unix: float
    world_size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    condition: Condition = "whole"
    problem: str | None = None


# ---- opening one --------------------------------------------------------------------------------------------------


def open_checkpoint(store: Store, step: int) -> CheckpointRef:
    """The checkpoint of one step. CheckpointError if there is none, CheckpointDamaged, CheckpointTooNew."""
    ref = _open_if_there(store, step)
    if ref is None:
        raise no_such_checkpoint(store, step)
    return ref


def no_such_checkpoint(store: Store, step: int) -> CheckpointError:
    """The refusal of a step that is not there, which names those that are, newest first."""
    steps = some([f"{folder.step:,}" for folder in reversed(step_folders(store)) if folder.manifest is not None])
    return CheckpointError(f"{store.url} has no checkpoint of step {step:,}: it has {steps or 'none'}")


def choose_checkpoint(store: Store, step: int | None = None) -> CheckpointRef:
    """The checkpoint of `step`, or the newest. Raises as `open_checkpoint` and `latest`, and if there is none."""
    ref = open_checkpoint(store, step) if step is not None else latest(store)
    if ref is None:
        raise CheckpointError(f"run {store.url} has no checkpoint. Check its name, or wait for its first one")
    return ref


def latest(store: Store, *, if_damaged: IfDamaged = "stop") -> CheckpointRef | None:
    """The newest checkpoint, None if there is none. Reads its manifest only, and writes nothing: anybody may call it.

    If its manifest is damaged: "stop" raises CheckpointDamaged, which names the newest one that can be used instead;
    "use_older" returns that one, with a warning. One of a newer format raises CheckpointTooNew either way, because
    going on from an older step would silently throw its progress away.
    """
    choice = _newest_usable(store, look="manifest")
    if choice.damaged and (if_damaged == "stop" or choice.ref is None):
        raise CheckpointDamaged(_refusal(store, choice))
    for step, problem in choice.damaged:
        assert choice.ref is not None
        logger.warning("CHECKPOINT DAMAGED: using step %d instead of step %d: %s", choice.ref.step, step, problem)
    return choice.ref


def _open_if_there(store: Store, step: int) -> CheckpointRef | None:
    where = store.uri(manifest_key(step))
    try:
        data = store.read(manifest_key(step))
    except KeyMissing:
        return None
    manifest = manifest_from_bytes(data, where=where)
    if manifest.step != step:
        raise CheckpointDamaged(f"{where} says that it is of step {manifest.step}")
    return CheckpointRef(store, manifest)


# ---- going on from one --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on; from the beginning if `checkpoint` is None.

    set_aside: for the user, each newer checkpoint that proved damaged and where it is now.
    """

    checkpoint: CheckpointRef | None
    set_aside: tuple[str, ...] = ()


def resume_point(store: Store, *, if_damaged: IfDamaged) -> ResumePoint:
    """The newest checkpoint that is whole, for the owner of the run, who will write on from there.

    The run coordinator calls it (without Ray: every rank, which may race), before a generation starts. A checkpoint is
    whole if its manifest is and the store still has each of its data files: one request a file, which compares size
    and, where the store keeps one (S3), checksum. Where the newest is not:
    "stop" raises CheckpointDamaged. "use_older" takes the next older whole one and sets those above it aside (their
    manifests become manifest-damaged.json), so that their steps can be committed again; CheckpointDamaged if there is
    none, because to begin again from nothing is not what that word allows.
    """
    choice = _newest_usable(store, look="files")
    if choice.damaged and (if_damaged == "stop" or choice.ref is None):
        raise CheckpointDamaged(_refusal(store, choice))
    notes = []
    for step, problem in choice.damaged:
        assert choice.ref is not None
        aside = set_aside(store, step)
        notes.append(
            f"step {step} is set aside as {aside}, and the run goes on from step {choice.ref.step} "
            f"(checkpoint.if_damaged=use_older): {problem}"
        )
        logger.warning("CHECKPOINT DAMAGED: %s", notes[-1])
    return ResumePoint(choice.ref, tuple(notes))


def set_aside(store: Store, step: int) -> str:
    """Take a damaged checkpoint out of the catalog, keeping its manifest beside for people to look at. Returns where.

    Nothing happens where another process has just done so.
    """
    aside = set_aside_key(step)
    try:
        data = store.read(manifest_key(step))
    except KeyMissing:
        return store.uri(aside)
    store.replace(aside, data)
    store.delete(manifest_key(step))
    return store.uri(aside)


def set_aside_key(step: int) -> str:
    """Where `set_aside` puts the manifest of a step."""
    return f"{step_folder(step)}/{_ASIDE_NAME}"


@dataclass(frozen=True)
class _Choice:
    """What can be used, and the damaged newer ones as (step, what is wrong), newest first."""

    ref: CheckpointRef | None
    damaged: tuple[tuple[int, str], ...]


def check_files(ref: CheckpointRef) -> None:
    """CheckpointDamaged if the store no longer has a data file as it was saved: one request a file, nothing is read."""
    if damages := verify_checkpoint(ref, depth="stored"):
        raise CheckpointDamaged(damage_text(ref.step, damages))


def _newest_usable(store: Store, *, look: Literal["manifest", "files"]) -> _Choice:
    """Newest first, until one can be used; so a healthy run costs one listing and one manifest (and one look)."""
    damaged: list[tuple[int, str]] = []
    for step in reversed(_steps_with_folder(store)):
        try:
            ref = _open_if_there(store, step)
            if ref is not None and look == "files":
                check_files(ref)
        except CheckpointDamaged as error:
            damaged.append((step, str(error)))
            continue
        if ref is not None:
            return _Choice(ref, tuple(damaged))
    return _Choice(None, tuple(damaged))


def _refusal(store: Store, choice: _Choice) -> str:
    run = store.url.rpartition("/")[2]
    (newest, problem), *others = choice.damaged
    also = f", and so is that of {' and '.join(f'step {step}' for step, _ in others)}" if others else ""
    remove = f"`raynium checkpoints rm {run}@{newest} --force`"
    if choice.ref is None:
        remedy = f"There is no older whole one: put its files back, or remove it with {remove} to begin again."
    else:
        older = choice.ref.step
        remedy = (
            f"That of step {older} is whole: to train on from it set checkpoint.if_damaged=use_older, or remove the "
            f"damaged one with {remove}; to only read it, name step {older}."
        )
    return f"the newest checkpoint of {store.url}, of step {newest}, is damaged{also}. {remedy} {problem}"


# ---- listing all --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepFolder:
    """What lies in a step's folder, committed or not.

    manifest: (bytes, written at in unix seconds); None: there is no checkpoint. has_set_aside: one of this step proved
    damaged. generations: each one's folder → when its newest file was written, unix.
    """

    step: int
    manifest: tuple[int, float] | None = None
    tags: tuple[str, ...] = ()
    has_set_aside: bool = False
    generations: Mapping[str, float] = field(default_factory=dict)


def step_folders(store: Store) -> list[StepFolder]:
    """All of them, oldest step first, from one listing of the run's checkpoints (1,000 files a request on S3)."""
    listing = store.list(CHECKPOINTS_FOLDER)
    names_of_step: dict[int, list[str]] = {}
    for key in listing.sizes:
        parts = key.split("/", 2)
        step = step_of_folder("/".join(parts[:2]))
        if step is not None and len(parts) == 3:
            names_of_step.setdefault(step, []).append(parts[2])
    return [_step_folder(step, found, listing) for step, found in sorted(names_of_step.items())]


def _step_folder(step: int, names: Sequence[str], listing: Listing) -> StepFolder:
    manifest = None
    generations: dict[str, float] = {}
    for name in names:
        key = f"{step_folder(step)}/{name}"
        if name == MANIFEST_NAME:
            manifest = (listing.sizes[key], listing.modified_unix[key])
        # Anything else is what people put there.
        elif is_shard(name):
            generation = generation_of(name)
            generations[generation] = max(generations.get(generation, 0.0), listing.modified_unix[key])
    tags = (name.removeprefix(_TAG_PREFIX) for name in names if name.startswith(_TAG_PREFIX) and "/" not in name)
    return StepFolder(step, manifest, tuple(sorted(tags)), _ASIDE_NAME in names, generations)


def list_checkpoints(store: Store) -> list[CheckpointSummary]:
    """All of a run's checkpoints, oldest first; those that cannot be used are there too, with the reason."""
    return summaries(store, step_folders(store))


# What manifests said, by store, step, size and time: they never change once written, and may be large.
_known: WeakKeyDictionary[Store, dict[tuple[int, int, float], CheckpointSummary]] = WeakKeyDictionary()


def summaries(
    store: Store, folders: Sequence[StepFolder], *, opened: CheckpointRef | None = None
) -> list[CheckpointSummary]:
    """Of the folders that hold a checkpoint, in their order. Reads each whole manifest once in the life of `store`.

    opened: one that has just been opened, and is not read again.
    """
    known = _known.get(store, {})
    committed = [(folder, (folder.step, *folder.manifest)) for folder in folders if folder.manifest is not None]

    def summary(folder: StepFolder, key: tuple[int, int, float]) -> CheckpointSummary | None:
        if opened is not None and opened.step == folder.step:
            return _summary(opened.manifest)
        return known.get(key) or _read_summary(store, folder.step)

    with ThreadPoolExecutor(MANIFEST_READERS, thread_name_prefix="manifests") as pool:
        found = list(pool.map(lambda each: summary(*each), committed))
    pairs = [(key, summary) for (_, key), summary in zip(committed, found, strict=True) if summary is not None]
    _known[store] = {key: summary for key, summary in pairs if summary.condition == "whole"}
    tags = {folder.step: folder.tags for folder, _ in committed}
    return [replace(summary, tags=tags[summary.step]) for _, summary in pairs]


def _read_summary(store: Store, step: int) -> CheckpointSummary | None:
    """None if it was deleted since it was listed."""
    try:
        ref = _open_if_there(store, step)
    except CheckpointError as error:
        condition = "too new" if isinstance(error, CheckpointTooNew) else "damaged"
        return CheckpointSummary(step, "", 0, 0.0, 0, condition=condition, problem=str(error))
    return _summary(ref.manifest) if ref is not None else None


def _summary(manifest: Manifest) -> CheckpointSummary:
    return CheckpointSummary(
        manifest.step,
        manifest.generation,
        manifest.num_bytes,
        manifest.committed_unix,
        manifest.world_size,
        manifest.metrics,
    )


# ---- deleting -----------------------------------------------------------------------------------------------------


def delete_checkpoint(store: Store, step: int, *, only: Collection[str] | None = None) -> int:
    """Delete all of a step. Manifest first: if this process dies between, what is left is an orphan, and not a broken
    checkpoint. Returns how many files there were; two processes may delete the same step.

    only: besides the manifest, the files of these generations.
    """
    store.delete(manifest_key(step))
    # The step may be committed again in the same second, by a manifest of the same size
    _known[store] = {key: summary for key, summary in _known.get(store, {}).items() if summary.step != step}
    folders = [step_folder(step)] if only is None else [f"{step_folder(step)}/{name}" for name in only]
    return 1 + sum(map(store.delete_prefix, folders))


# ---- tags ---------------------------------------------------------------------------------------------------------


def checkpoint_tags(store: Store, step: int) -> tuple[str, ...]:
    """The tags of one checkpoint, sorted; () also if there is no such checkpoint."""
    names = (key.rpartition("/")[2] for key in store.list(step_folder(step), recursive=False).sizes)
    return tuple(sorted(name.removeprefix(_TAG_PREFIX) for name in names if name.startswith(_TAG_PREFIX)))


def add_tag(store: Store, step: int, tag: str) -> None:
    """Keep the checkpoint of `step` until the tag is removed. Nothing happens if it has the tag already.

    CheckpointError if there is no such checkpoint, or the tag is no name.
    """
    key = _tag_key(step, tag)
    if not store.exists(manifest_key(step)):
        raise no_such_checkpoint(store, step)
    store.replace(key, b"")
    # The run's retention looks for tags right before it deletes, but it may have looked a moment ago.
    if not store.exists(manifest_key(step)):
        store.delete(key)
        raise no_such_checkpoint(store, step)


def remove_tag(store: Store, step: int, tag: str) -> None:
    """CheckpointError if the checkpoint of `step` has no such tag."""
    key = _tag_key(step, tag)
    if not store.exists(key):
        tags = ", ".join(checkpoint_tags(store, step)) or "none"
        raise CheckpointError(f"step {step} of {store.url} has no tag {tag!r}: it has {tags}")
    store.delete(key)


def _tag_key(step: int, tag: str) -> str:
    if not _TAG.fullmatch(tag):
        raise CheckpointError(
            f"{tag!r} is not a tag: use 1 to 63 letters, digits, dots, hyphens and underscores, a letter or digit first"
        )
    return f"{step_folder(step)}/{_TAG_PREFIX}{tag}"


def _steps_with_folder(store: Store) -> list[int]:
    folders = store.list(CHECKPOINTS_FOLDER, recursive=False).folders
    return sorted(step for folder in folders if (step := step_of_folder(folder)) is not None)
