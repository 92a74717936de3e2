"""The weights that `model.init` names, adopted by a run: described, checked, and left where they lie.

A Hugging Face folder, on this machine or in S3, or a checkpoint of another run: `<run>` or `<run>@<step>`.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raynium.checkpoint.base import Base, BaseFile, find_base, keep_base
from raynium.checkpoint.catalog import add_tag, choose_checkpoint
from raynium.checkpoint.format.manifest import CHECKPOINTS_FOLDER
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.schema import Config, ModelSection
from raynium.config.weights import Described, contradictions
from raynium.convert.added_tokens import with_rows, with_tokens
from raynium.convert.config_json import saved_model
from raynium.convert.description import RunText, described_model
from raynium.convert.folder import Folder
from raynium.convert.merged import saved_adapter
from raynium.convert.parameters import check_shapes, parameter_shapes
from raynium.convert.weights import base_of_folder, find_weights
from raynium.data.records.template import OWN_NAME
from raynium.data.tokenizer import TOKENIZER_NAME, Tokenizer
from raynium.errors import CheckpointError, CheckpointMismatch, ConfigError
from raynium.models.names import hugging_face_names
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store

# Of the run: its tokenizer with the files that lie beside one.
TEXT_FOLDER = "tokenizer"
_WITH_STEP = re.compile(r"(.+)@([0-9]{1,18})", re.ASCII)


@dataclass(frozen=True)
class Found:
    """What is at a place, as far as names, headers and small files say.

    tokenizer: the place of its file. text: its model is that of the weights. read: reads the weights once, if nobody
    has yet, for their checksums. checkpoint: of another run, which may delete it; None for a folder.
    """

    tokenizer: str
    text: RunText
    num_bytes: int
    read: Callable[[], Base]
    checkpoint: CheckpointRef | None = None

    def keep_for(self, run_name: str) -> None:
        """Has the other run keep its checkpoint, by a tag. StoreError where nobody here may write there."""
        if self.checkpoint is not None:
            add_tag(self.checkpoint.store, self.checkpoint.step, f"base-of-{run_name}"[:63])


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
    return Found(tokenizer, text, num_bytes, lambda: base_of_folder(folder, model, stored))


def _of_run(store: Store, step: int | None, place: str) -> Found:
    ref = choose_checkpoint(store, step)
    if saved_adapter(ref).rank is not None:
        raise CheckpointError(
            f"{ref.uri} holds an adapter and not the weights it belongs to: export it (`raynium checkpoints export`), "
            "which merges it, and begin with that folder"
        )
    model = _alone(saved_model(ref))
    theirs = {MODEL_PREFIX + ours: name for ours, name in hugging_face_names(model).items()}
    tensors = [entry for entry in ref.manifest.tensors if entry.name.startswith(MODEL_PREFIX)]
    check_shapes(
        {theirs.get(entry.name, entry.name): entry.global_shape for entry in tensors},
        parameter_shapes(model),
        where=ref.uri,
        described_by="its config",
    )
    try:
        text = RunText.of_checkpoint(ref, model)
    except KeyMissing as error:
        raise CheckpointError(f"{store.url} has no {TOKENIZER_NAME}, as a run keeps one: give another run") from error
    return Found(store.uri(TOKENIZER_NAME), text, ref.manifest.num_bytes, lambda: _base_of(ref, model, place), ref)


def _base_of(ref: CheckpointRef, model: ModelSection, place: str) -> Base:
    """Its manifest has the checksums already."""
    files = [
        BaseFile.model_validate(shard.model_dump() | {"store": ref.store.url, "key": ref.shard_key(number)})
        for number, shard in enumerate(ref.manifest.shards)
    ]
    tensors = [entry for entry in ref.manifest.tensors if entry.name.startswith(MODEL_PREFIX)]
    return Base(place=place, model=model.model_dump(mode="json"), shards=tuple(files), tensors=tuple(tensors))


def describe(init: str, added: tuple[str, ...], run_place: str | None) -> Described:
    """For `load_config`. What a run has begun with it knows itself, wherever the weights are by now."""
    if run_place is not None and (base := find_base(Store(run_place))) is not None and base.place == init:
        return Described(base.model, Store(run_place).uri(f"{TEXT_FOLDER}/{TOKENIZER_NAME}").removeprefix("file://"))
    found = find(init)
    model = with_tokens(found.text, added).model
    return Described(model.model_dump(mode="json"), found.tokenizer.removeprefix("file://"))


def check_weights(config: Config) -> Found:
    """What the config begins with, if it fits. ConfigError naming what does not; and as `find`. Writes nothing."""
    assert config.model.init is not None
    found = find(config.model.init, end_of_document=config.data.end_of_document)
    text = with_tokens(found.text, config.model.add_tokens)
    of_weights = text.model.model_dump(mode="json")
    problems = [*contradictions(config.model.model_dump(mode="json"), of_weights, init=config.model.init)]
    given = config.data.tokenizer
    # That of the weights is read with the added tokens.
    if given is not None and given != found.tokenizer.removeprefix("file://"):
        own = Tokenizer.load(given, end_of_document=config.data.end_of_document)
        if text.tokenizer.sha256 not in own.sha256s:
            problems.append(
                f"data.tokenizer is {given!r}, another than that of the weights at model.init = {config.model.init!r}: "
                "token ids would mean other text. Leave it out"
            )
    if problems:
        raise ConfigError(problems)
    return found


def adopt(config: Config, store: Store, found: Found) -> str:
    """Keeps in the run what its ranks need of the weights, and their small files. Returns the weights' identity."""
    assert config.model.init is not None
    text, added = with_tokens(found.text, config.model.add_tokens), config.model.add_tokens
    base = found.read().model_copy(update={"place": config.model.init})
    if added:
        first = found.text.tokenizer.vocab_size
        base = with_rows(base, _alone(config.model), store, first=first, num_tokens=len(added))
    wanted = config.model.init_identity
    if wanted not in (None, base.identity):
        raise CheckpointMismatch(
            f"model.init = {config.model.init!r} holds weights with the identity {base.identity}, and "
            f"model.init_identity asks for {wanted}: give the place of those, or leave the identity out"
        )
    text.tokenizer.keep(store)
    text.described.keep(store)
    for name, content in text_files(text).items():
        store.replace(f"{TEXT_FOLDER}/{name}", content)
    keep_base(store, base)
    return base.identity


def extended_tokenizer(config: Config, cache: Path) -> str:
    """data.tokenizer, or where it is that of the weights, the place of one that has the added tokens, too."""
    model, given = config.model, config.data.tokenizer
    assert model.init is not None and given is not None
    # That of the run has them already.
    if given == f"{config.run.place}/{TEXT_FOLDER}/{TOKENIZER_NAME}":
        return given
    found = find(model.init, end_of_document=config.data.end_of_document)
    if given != found.tokenizer.removeprefix("file://"):
        return given
    files = text_files(with_tokens(found.text, model.add_tokens))
    digest = hashlib.sha256(json.dumps({name: str(content) for name, content in files.items()}).encode()).hexdigest()
    folder = Store(cache / digest[:32])
    for name, content in files.items():
        folder.replace(name, content)
    return str(cache / digest[:32] / TOKENIZER_NAME)


def text_files(text: RunText) -> dict[str, bytes]:
    """A tokenizer's folder, for whoever looks beside tokenizer.json for a chat template or the end of a document."""
    own = {} if text.rendered_by is None else {OWN_NAME: text.rendered_by.to_json()}
    return (
        {name: content.encode() for name, content in text.described.files.items()}
        | own
        | {TOKENIZER_NAME: text.tokenizer.file_text.encode()}
    )


def _alone(model: ModelSection) -> ModelSection:
    """What of the section is about the model, and not about how the run began."""
    return model.model_copy(update={"init": None, "init_identity": None, "add_tokens": ()})
