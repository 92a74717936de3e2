"""What the run coordinator does once the shards of all ranks are in: make them a checkpoint. No torch."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from raynium.checkpoint.catalog import CheckpointRef, open_checkpoint
from raynium.checkpoint.manifest import (
    Block,
    Manifest,
    SavedBlock,
    ShardEntry,
    TensorEntry,
    Timing,
    first_problem,
    manifest_key,
    manifest_to_bytes,
    shard_key,
    step_folder,
)
from raynium.checkpoint.store import KeyExists, Store
from raynium.errors import CheckpointError

logger = logging.getLogger(__name__)


class StepTaken(CheckpointError):
    """Another generation committed this step first. Its checkpoint stands; ours is never read."""


def commit_checkpoint(
    store: Store,
    *,
    step: int,
    generation: str,
    entries: Sequence[ShardEntry],
    state: Mapping[str, Any],
    world_size: int,
    layout: Mapping[str, Any],
    parent_step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    upload_seconds: float | None = None,
) -> CheckpointRef:
    """Write the manifest, which is the commit: one process calls this, after every rank's shard is in.

    After a StoreError it may be called again: if it is this generation's manifest that is there, it has succeeded.

    entries: one per rank. state: JSON values only (step, data position, seeds, facts of the config). metrics: of the
    evaluation at this step, if there was one. upload_seconds: from the snapshot until the last shard was in; None for
    what was not trained here.
    CheckpointError if they are not one whole checkpoint (a rank's shard is missing, blocks overlap, a file is gone);
    StepTaken if another generation was first. If this process dies before, the step does not exist; after, it does.
    """
    began = time.perf_counter()
    manifest = _manifest(
        step=step,
        generation=generation,
        entries=entries,
        state=dict(state),
        world_size=world_size,
        layout=dict(layout),
        parent_step=parent_step,
        metrics=dict(metrics or {}),
        timing=None,
    )
    stored = store.list(step_folder(step)).sizes
    for shard in manifest.shards:
        size = stored.get(f"{step_folder(step)}/{shard.key}")
        if size != shard.size:
            found = "is not there" if size is None else f"has {size:,} bytes"
            raise CheckpointError(f"step {step} cannot be committed: {shard.key} {found}, {shard.size:,} were uploaded")
    if upload_seconds is not None:
        stall_seconds = max(entry.stall_seconds for entry in entries)
        timing = Timing(
            stall_seconds=stall_seconds, upload_seconds=upload_seconds, commit_seconds=time.perf_counter() - began
        )
        manifest = manifest.model_copy(update={"timing": timing})
    try:
        store.write_new(manifest_key(step), manifest_to_bytes(manifest))
    except KeyExists as error:
        winner = open_checkpoint(store, step)
        if winner.manifest.generation != generation:
            raise StepTaken(
                f"{store.uri(manifest_key(step))} exists: generation {winner.manifest.generation} committed "
                f"step {step} before {generation}"
            ) from error
        return winner
    logger.info("committed step %d: %d shards, %d bytes", step, len(manifest.shards), manifest.num_bytes)
    return CheckpointRef(store, manifest)


def discard_save(store: Store, *, step: int, generation: str) -> None:
    """Remove what a save that ended early has written, whether it was committed or not; others' files stay."""
    try:
        committed_by = open_checkpoint(store, step).manifest.generation
    except CheckpointError:
        committed_by = None
    if committed_by == generation:
        store.delete(manifest_key(step))
    store.delete_prefix(f"{step_folder(step)}/{generation}")


def _manifest(*, step: int, generation: str, entries: Sequence[ShardEntry], world_size: int, **fields: Any) -> Manifest:
    """The manifest of these shards, checked. CheckpointError says why they are not a checkpoint."""
    refusal = f"step {step} of generation {generation} cannot be committed"
    if other := next((entry for entry in entries if entry.step != step), None):
        raise CheckpointError(f"{refusal}: {other.file.key} is of step {other.step}")
    # One shard per rank, also from ranks that save nothing: a tensor that only a lost rank held would not be missed
    entries = sorted(entries, key=lambda entry: entry.file.key)
    expected = sorted(shard_key(generation, rank) for rank in range(world_size))
    found = [entry.file.key for entry in entries]
    if found != expected:
        odd = sorted(set(found) ^ set(expected)) or [key for key, next_key in pairwise(found) if key == next_key]
        raise CheckpointError(f"{refusal}: {len(found)} shards for {world_size} ranks, wrong or missing: {odd[:5]}")
    blocks: dict[str, list[Block]] = defaultdict(list)
    kinds: dict[str, SavedBlock] = {}  # the first block of each tensor: the others must agree with it
    for shard, entry in enumerate(entries):
        for saved in entry.tensors:
            kind = kinds.setdefault(saved.name, saved)
            if (saved.dtype, saved.global_shape) != (kind.dtype, kind.global_shape):
                raise CheckpointError(
                    f"{refusal}: {saved.name} is {saved.dtype} {saved.global_shape} in {entry.file.key} and "
                    f"{kind.dtype} {kind.global_shape} elsewhere"
                )
            block = Block(shard=shard, offsets=saved.offsets, shape=saved.shape, begin=saved.begin, end=saved.end)
            blocks[saved.name].append(block)
    try:
        return Manifest(
            step=step,
            generation=generation,
            committed_unix=time.time(),
            world_size=world_size,
            shards=tuple(entry.file for entry in entries),
            tensors=tuple(
                TensorEntry(name=name, dtype=kind.dtype, global_shape=kind.global_shape, blocks=tuple(blocks[name]))
                for name, kind in sorted(kinds.items())
            ),
            **fields,
        )
    except ValidationError as error:
        raise CheckpointError(f"{refusal}: {first_problem(error)}") from error
