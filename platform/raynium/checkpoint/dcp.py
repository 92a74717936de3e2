"""Raynium's checkpoints for torch.distributed.checkpoint: its planners over our format, for people's own scripts.

    from torch.distributed import checkpoint as dcp
    from raynium.checkpoint.dcp import CheckpointReader, CheckpointWriter

    dcp.load({"model": weights}, storage_reader=CheckpointReader("s3://bucket/runs/first", step=1000))
    dcp.save({"model": weights}, storage_writer=CheckpointWriter("s3://bucket/runs/mine", step=10))

A tensor's name here is its path in the nested state dict, joined by slashes: state_dict["model"]["blocks.0.w"] is
model/blocks.0.w. DCP joins by dots; whatever a script saves under the names of an engine's state, a run can load.
Everything is verified as it is read, and nothing is unpickled: what is no tensor is kept as JSON in the manifest.
"""

import io
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from raynium.checkpoint.catalog import choose_checkpoint
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.image import TORCH_DTYPES, ImageFile, plan_image, write_image
from raynium.checkpoint.format.manifest import ShardEntry, TensorEntry
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.errors import CheckpointError, CheckpointMismatch
from raynium.storage.own_folder import shared_memory_folder, temporary_folder
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

# In a manifest's state: name → JSON value.
OBJECTS = "dcp_objects"


class _Given:
    """DCP chooses neither reader nor writer by itself: it must be given, with its run and step."""

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            kind = type(self).__name__
            raise CheckpointError(
                f"checkpoint_id={str(checkpoint_id)!r} was given beside a {kind}: leave it out, and give run and step "
                f"to {kind}(run, step=…)"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return False


# ---- reading ------------------------------------------------------------------------------------------------------


class CheckpointReader(_Given, StorageReader):
    """Loads a run's checkpoint with `dcp.load`, whichever engine, layout or world size saved it.

    Every rank makes one. step: None takes the newest; give it where several ranks load a run that is still being
    written, since each looks for itself (that they differ is found before anything is read). A destination of another
    dtype is converted to, as DCP does. CheckpointError where there is no such checkpoint, CheckpointDamaged.
    """

    def __init__(self, run: str | Store, *, step: int | None = None):
        self.ref: CheckpointRef = choose_checkpoint(run if isinstance(run, Store) else Store(run), step)
        manifest = self.ref.manifest
        objects = manifest.state.get(OBJECTS, {})
        assert isinstance(objects, dict)
        self._tensors: dict[str, TensorEntry] = {_dotted(entry.name): entry for entry in manifest.tensors}
        self._objects: dict[str, Any] = {_dotted(name): value for name, value in objects.items()}
        names = [*(entry.name for entry in manifest.tensors), *objects]
        twice = [name for name, count in Counter(map(_dotted, names)).items() if count > 1]
        if twice:
            raise CheckpointMismatch(
                f"{self.ref.uri} has names that only differ in / and ., which DCP cannot tell apart: {twice[:5]}; load "
                "it with raynium.checkpoint.load.load_checkpoint"
            )
        self._paths = {_dotted(name): tuple(name.split("/")) for name in names}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest, in DCP's words."""
        entries: dict[str, Any] = dict.fromkeys(self._objects, BytesStorageMetadata())
        for name, entry in self._tensors.items():
            blocks = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.shape)) for b in entry.blocks]
            kind = TensorProperties(dtype=TORCH_DTYPES[entry.dtype])
            entries[name] = TensorStorageMetadata(kind, torch.Size(entry.global_shape), blocks)
        return Metadata(state_dict_metadata=entries, planner_data=self._paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: the manifest was read when this was made."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self.ref.uri)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if len(found := {plan.storage_data for plan in plans}) > 1:
            raise CheckpointMismatch(
                f"the ranks would load different checkpoints, {sorted(found)[:5]}: give CheckpointReader a step"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Everything of this rank at once, so that neighbouring ranges share requests."""
        items: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # Planners expect a pickle; nothing of it was stored.
                buffer = io.BytesIO()
                torch.save(self._objects[item.storage_index.fqn], buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
            else:
                items.append((item, planner.resolve_tensor(item).detach()))
        load_checkpoint(self.ref, [self._chunk(*each) for each in items], dtypes="converted")
        for each in items:
            planner.commit_tensor(*each)
        return _done(None)

    def _chunk(self, item: ReadItem, target: torch.Tensor) -> Chunk:
        entry = self._tensors[item.storage_index.fqn]
        block = item.storage_index.offset or (0,) * len(entry.global_shape)
        offsets = tuple(a + b for a, b in zip(block, item.storage_offsets, strict=True))
        return Chunk(entry.name, entry.global_shape, offsets, target, saved_here=False)


# ---- writing ------------------------------------------------------------------------------------------------------


class CheckpointWriter(_Given, StorageWriter):
    """Saves one checkpoint of a run with `dcp.save`, also by several ranks; one writer for each step.

    Every rank makes one with the same arguments. state: JSON values to keep beside the tensors. What is neither a
    tensor nor JSON is refused. The save blocks; each rank makes its file in shared memory (or `image_folder`) first.
    The coordinator commits when every rank's file is durable: if any rank fails before, there is no checkpoint.
    CheckpointError, StoreError; inside dcp.save they are the causes of its CheckpointException.
    """

    def __init__(
        self,
        run: str | Store,
        *,
        step: int,
        state: Mapping[str, Any] | None = None,
        image_folder: str | Path | None = None,
    ):
        self.store = run if isinstance(run, Store) else Store(run)
        self.step = step
        # On the coordinator, once it is committed.
        self.ref: CheckpointRef | None = None
        self._state = dict(state or {})
        self._image_folder = Path(image_folder) if image_folder else shared_memory_folder()
        self._generation = ""
        self._num_ranks = 0

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: what this save's files are called, so that no other save can touch them."""
        self._generation, self._num_ranks = f"dcp-{uuid4().hex[:12]}", len(plans)
        return [replace(plan, storage_data=(self._generation, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's tensors as one file of the store. Its description goes to the coordinator as the one result."""
        generation, rank = plan.storage_data
        names = planner.mappings if isinstance(planner, DefaultSavePlanner) else {}
        chunks: list[Chunk] = []
        objects: dict[str, Any] = {}
        for item in plan.items:
            name = "/".join(map(str, names.get(item.index.fqn, (item.index.fqn,))))
            if item.type == WriteItemType.BYTE_IO:
                objects[name] = _json_of(name, item, planner)
            else:
                chunks.append(_chunk_of(name, item, planner))
        image_plan = plan_image(chunks)
        with temporary_folder("dcp", self._image_folder) as folder:
            with ImageFile(folder / "image") as image:
                write_image(image_plan, chunks, image.reserve(image_plan.size), step=self.step)
            info = image_plan.info(step=self.step, path=folder / "image")
            entry = upload_shard(self.store, info, generation=generation, rank=rank)
        result = WriteResult(MetadataIndex(entry.file.key), entry.file.size, (entry.to_json(), objects))
        return _done([result])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: the commit. If this process dies before, the step does not exist; after, it does."""
        found = [result.storage_data for of_rank in results for result in of_rank]
        entries = [ShardEntry.from_json(text) for text, _ in found]
        if stale := [entry.file.key for entry in entries if not entry.file.key.startswith(f"{self._generation}/")]:
            raise CheckpointError(
                f"{stale[0]} was written for another save than {self._generation}: a planner with enable_plan_caching "
                "replays old plans; make one without, or a new planner class for each writer"
            )
        objects = {name: value for _, of_rank in found for name, value in of_rank.items()}
        self.ref = commit_checkpoint(
            self.store,
            step=self.step,
            generation=self._generation,
            entries=entries,
            state={"step": self.step, **self._state} | ({OBJECTS: objects} if objects else {}),
            world_size=self._num_ranks,
            layout={"saved_by": "torch.distributed.checkpoint"},
        )


def _chunk_of(name: str, item: WriteItem, planner: SavePlanner) -> Chunk:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor) and item.tensor_data is not None
    place = item.tensor_data.chunk
    return Chunk(name, tuple(item.tensor_data.size), tuple(place.offsets), tensor.detach(), saved_here=True)


def _json_of(name: str, item: WriteItem, planner: SavePlanner) -> Any:
    """What is no tensor, as JSON. Never as the pickle that planners offer."""
    if not isinstance(planner, DefaultSavePlanner):
        raise CheckpointError(
            f"{name} is no tensor, and {type(planner).__name__} only gives its pickle, which is not kept: use "
            "DefaultSavePlanner or a subclass of it, or leave it out"
        )
    return json_value(planner.lookup_object(item.index), where=name)


def json_value(value: Any, *, where: str) -> Any:
    """`value` in JSON's types; tuples become lists. CheckpointError for anything that JSON cannot hold as it is."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: json_value(inner, where=f"{where}/{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items: Sequence[Any] = value
        return [json_value(inner, where=f"{where}/{index}") for index, inner in enumerate(items)]
    raise CheckpointError(
        f"{where} is a {type(value).__name__} ({str(value)[:40]}), which is neither a tensor nor JSON: convert it "
        "(numbers, texts, lists, objects with texts as keys), or leave it out of the state dict"
    )


def _dotted(name: str) -> str:
    """As DCP flattens the same path."""
    return name.replace("/", ".")


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
