"""What the run coordinator does once the shards of all ranks are in: make them a checkpoint. No torch."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import ValidationError

from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.format.blocks import Column, shortest
from raynium.checkpoint.format.manifest import (
    DTYPES,
    Manifest,
    ShardEntry,
    TensorEntry,
    Timing,
    first_problem,
    manifest_key,
    manifest_to_bytes,
    shard_key,
    step_folder,
)
from raynium.checkpoint.ref import CheckpointRef
from raynium.errors import CheckpointError
from raynium.storage.backend import KeyExists
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

_DTYPES = tuple(DTYPES)
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}


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
    check: Callable[[], None] | None = None,
) -> CheckpointRef:
    """Write the manifest, which is the commit: one process calls this, after every rank's shard is in.

    After a StoreError it may be called again: if it is this generation's manifest that is there, it has succeeded.

    entries: one per rank. state: JSON values only (step, data position, seeds, facts of the config). metrics: of the
    evaluation at this step, if there was one. upload_seconds: from the snapshot until the last shard was in; None for
    what was not trained here. check: called right before the manifest is written; what it raises ends the commit.
    CheckpointError if they are not one whole checkpoint (a rank's shard is missing, blocks overlap, a file is gone);
    StepTaken if another generation was first. If this process dies before, the step does not exist; after, it does.
    """
    began = time.perf_counter()
    manifest = build_manifest(
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
    if check is not None:
        check()
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


def build_manifest(
    *, step: int, generation: str, entries: Sequence[ShardEntry], world_size: int, **fields: Any
) -> Manifest:
    """The manifest of these shards, checked; fields: the others of `Manifest`. CheckpointError says why they are not a
    checkpoint."""
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
    try:
        return Manifest(
            step=step,
            generation=generation,
            committed_unix=time.time(),
            world_size=world_size,
            shards=tuple(entry.file for entry in entries),
            tensors=_tensors(entries),
            **fields,
        )
    except ValidationError as error:
        raise CheckpointError(f"{refusal}: {first_problem(error)}") from error
    except _Disagreement as error:
        raise CheckpointError(f"{refusal}: {error}") from error


class _Disagreement(Exception):
    """Two shards describe one tensor differently."""


def _tensors(entries: Sequence[ShardEntry]) -> tuple[TensorEntry, ...]:
    """The blocks of all shards by tensor, in the order of names. No step in Python has more to do than find a name."""
    saved = [entry.tensors for entry in entries]
    names = sorted({name for each in saved for name in each.names})
    number = {name: index for index, name in enumerate(names)}
    tensor_of = np.array([number[name] for each in saved for name in each.names], dtype=np.int64)
    dtype_of = np.array([_DTYPE_NUMBERS[dtype] for each in saved for dtype in each.dtypes], dtype=np.int64)
    shard_of = np.repeat(np.arange(len(saved)), [len(each.names) for each in saved])
    dims = np.concatenate([each.dims for each in saved])
    begins = np.concatenate([each.begins for each in saved])
    places = [
        np.concatenate(columns)
        for columns in zip(*((each.global_shapes, each.offsets, each.shapes) for each in saved), strict=True)
    ]
    # Of each block.
    first_place = np.cumsum(dims) - dims
    order = np.argsort(tensor_of, kind="stable")
    bounds = np.searchsorted(tensor_of[order], np.arange(len(names) + 1)).tolist()

    def entry(name: str, rows: Column) -> TensorEntry:
        at = first_place[rows] + np.arange(int(dims[rows[0]]))[:, None]
        odd = (dims[rows] != dims[rows[0]]) | (dtype_of[rows] != dtype_of[rows[0]])
        if not odd.any():
            global_shapes, offsets, shapes = (numbers[at] for numbers in places)
            odd = (global_shapes != global_shapes[:, :1]).any(axis=0)
        if odd.any():
            raise _Disagreement(_disagreement(entries, name, shard_of[rows[[0, int(np.argmax(odd))]]].tolist()))
        return TensorEntry(
            name=name,
            dtype=_DTYPES[dtype_of[rows[0]]],
            global_shape=tuple(global_shapes[:, 0].tolist()),
            shards=shard_of[rows],
            offsets=tuple(map(shortest, offsets)),
            shapes=tuple(map(shortest, shapes)),
            begins=shortest(begins[rows]),
        )

    return tuple(entry(name, order[slice(*cut)]) for name, cut in zip(names, pairwise(bounds), strict=True))


def _disagreement(entries: Sequence[ShardEntry], name: str, shards: Sequence[int]) -> str:
    """How the first shard and the second one differ about this tensor."""
    kinds = [{(row.dtype, row.global_shape) for row in entries[at].tensors.rows() if row.name == name} for at in shards]
    (dtype, shape), (other_dtype, other_shape) = sorted(kinds[0])[0], sorted(kinds[1] - kinds[0] or kinds[1])[-1]
    where = entries[shards[1]].file.key
    return f"{name} is {other_dtype} {other_shape} in {where} and {dtype} {shape} elsewhere"
