"""The weights that `model.init` names, adopted by a run: described, checked, and left where they lie.

A Hugging Face folder, on this machine or in S3, or a checkpoint of another run: `<run>` or `<run>@<step>`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from raynium.checkpoint.base import Base, BaseFile, find_base, keep_base
from raynium.checkpoint.catalog import choose_checkpoint
from raynium.checkpoint.format.manifest import CHECKPOINTS_FOLDER
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.schema import Config, ModelSection
from raynium.config.weights import Described, contradictions
from raynium.convert.config_json import saved_model
from raynium.convert.description import RunText, described_model
from raynium.convert.folder import Folder
from raynium.convert.parameters import check_shapes, parameter_shapes
from raynium.convert.weights import base_of_folder, find_weights
from raynium.data.tokenizer import TOKENIZER_NAME
from raynium.errors import CheckpointError, CheckpointMismatch, ConfigError
from raynium.models.names import hugging_face_names
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store

_WITH_STEP = re.compile(r"(.+)@([0-9]{1,18})", re.ASCII)


@dataclass(frozen=True)
class Found:
    """What is at a place, as far as names, headers and small files say.

    model: of the weights alone. tokenizer: the place of its file. read: reads the weights once, if nobody has yet, for
    their checksums.
    """

    model: ModelSection
    tokenizer: str
    text: RunText
    num_bytes: int
    read: Callable[[], Base]


def find(place: str, *, end_of_document: str | None = None) -> Found:
    """place: absolute or a URL. CheckpointError and its kinds, DataError for the tokenizer, StoreError."""
    if with_step := _WITH_STEP.fullmatch(place):
        return _of_run(Store(with_step[1]), int(with_step[2]), place)
    folder = Folder(place)
    if "config.json" not in folder.names() and folder.store.list(CHECKPOINTS_FOLDER, recursive=False).folders:
        return _of_run(folder.store, None, place)
    model, tokenizer, text = described_model(folder, None, end_of_document=end_of_document)
    stored = find_weights(folder, model)
    num_bytes = sum(tensor.end - tensor.begin for tensor in stored.values())
    return Found(model, tokenizer, text, num_bytes, lambda: base_of_folder(folder, model, stored))


def _of_run(store: Store, step: int | None, place: str) -> Found:
    ref = choose_checkpoint(store, step)
    model = saved_model(ref).model_copy(update={"init": None, "init_identity": None})
    theirs = {MODEL_PREFIX + ours: name for ours, name in hugging_face_names(model).items()}
    tensors = [entry for entry in ref.manifest.tensors if entry.name.startswith(MODEL_PREFIX)]
    check_shapes(
        {theirs.get(entry.name, entry.name): entry.global_shape for entry in tensors},
        parameter_shapes(model),
        where=ref.uri,
        described_by="its config",
    )
    try:
        text = RunText.of_run(store, model)
    except KeyMissing as error:
        raise CheckpointError(f"{store.url} has no {TOKENIZER_NAME}, as a run keeps one: give another run") from error
    return Found(model, store.uri(TOKENIZER_NAME), text, ref.manifest.num_bytes, lambda: _base_of(ref, model, place))


def _base_of(ref: CheckpointRef, model: ModelSection, place: str) -> Base:
    """Its manifest has the checksums already."""
    files = [
        BaseFile.model_validate(shard.model_dump() | {"store": ref.store.url, "key": ref.shard_key(number)})
        for number, shard in enumerate(ref.manifest.shards)
    ]
    tensors = [entry for entry in ref.manifest.tensors if entry.name.startswith(MODEL_PREFIX)]
    return Base(place=place, model=model.model_dump(mode="json"), shards=tuple(files), tensors=tuple(tensors))


def describe(init: str, run_place: str | None) -> Described:
    """For `load_config`. What a run has begun with it knows itself, wherever the weights are by now."""
    if run_place is not None and (base := find_base(Store(run_place))) is not None and base.place == init:
        return Described(base.model, Store(run_place).uri(TOKENIZER_NAME).removeprefix("file://"))
    found = find(init)
    return Described(found.model.model_dump(mode="json"), found.tokenizer.removeprefix("file://"))


def check_weights(config: Config) -> Found:
    """What the config begins with, if it fits. ConfigError naming what does not; and as `find`. Writes nothing."""
    assert config.model.init is not None
    found = find(config.model.init, end_of_document=config.data.end_of_document)
    of_weights = found.model.model_dump(mode="json")
    if problems := [*contradictions(config.model.model_dump(mode="json"), of_weights, init=config.model.init)]:
        raise ConfigError(problems)
    return found


def adopt(config: Config, store: Store, found: Found) -> str:
    """Keeps in the run what its ranks need of the weights, and their small files. Returns the weights' identity."""
    assert config.model.init is not None
    base = found.read().model_copy(update={"place": config.model.init})
    wanted = config.model.init_identity
    if wanted not in (None, base.identity):
        raise CheckpointMismatch(
            f"model.init = {config.model.init!r} holds weights with the identity {base.identity}, and "
            f"model.init_identity asks for {wanted}: give the place of those, or leave the identity out"
        )
    found.text.tokenizer.keep(store)
    found.text.described.keep(store)
    keep_base(store, base)
    return base.identity
