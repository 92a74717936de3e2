"""A run's adapter as a folder that PEFT loads, and such a folder read.

adapter_config.json           rank, alpha, targets, in PEFT's words
adapter_model.safetensors     A and B in float32, and what learned whole beside them, under PEFT's names
raynium.json                  which weights it belongs to, by their content; PEFT does not read it
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from raynium.checkpoint.base import ADAPTER_NAME, Base, keep_base
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.adapter import AdapterSection
from raynium.config.schema import Config, ModelSection
from raynium.convert.config_json import Dtype, saved_model
from raynium.convert.export import Exported, export_checkpoint, new_folder, write_durably, written_folder
from raynium.convert.folder import Folder
from raynium.convert.merged import saved_adapter
from raynium.convert.parameters import check_shapes
from raynium.convert.weights import TAKEN_DTYPES, Stored, entry_of, header_of, summed
from raynium.errors import CheckpointError, CheckpointMismatch, ConfigError, some
from raynium.models.adapter import ALL_LINEAR, TARGETS, is_adapters, target_names
from raynium.models.decoder import Decoder
from raynium.models.lora import adapt
from raynium.models.names import hugging_face_names
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

CONFIG_NAME, WEIGHTS_NAME, OWN_NAME = "adapter_config.json", "adapter_model.safetensors", "raynium.json"
# Of every name of PEFT's.
_PREFIX, _EMBEDDING, _HEAD = "base_model.model.", "model.embed_tokens.weight", "lm_head.weight"
# Of transformers' modules that may learn whole.
_TABLES = {"embedding": "embed_tokens", "head": "lm_head"}


def export(
    ref: CheckpointRef, folder: str | Path, what: Literal["model", "adapter"], dtype: Dtype, *, max_shard_bytes: int
) -> Exported:
    """The adapter alone, in float32 and one file, or the whole model; else as `convert.export.export_checkpoint`."""
    if what == "adapter":
        return export_adapter(ref, folder)
    return export_checkpoint(ref, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)


def export_adapter(ref: CheckpointRef, folder: str | Path) -> Exported:
    """Write `folder`, which must not exist: the adapter alone, bit by bit as it was trained. One process, on the CPU.

    CheckpointError for a run without an adapter; else as `convert.export.export_checkpoint`.
    """
    target, adapter, model = new_folder(folder), saved_adapter(ref), saved_model(ref)
    if adapter.rank is None:
        raise CheckpointError(f"{ref.uri} is of a run without an adapter: export it as it is, without --adapter")
    ours = read_tensors(ref, prefix=MODEL_PREFIX)
    names = peft_names(model, adapter)
    tensors = {names[name.removeprefix(MODEL_PREFIX)]: tensor for name, tensor in ours.items()}
    if model.embeddings == "tied" and (table := tensors.get(_PREFIX + _EMBEDDING)) is not None:
        # PEFT writes what is tied twice, and wants to find both.
        tensors[_PREFIX + _HEAD] = table.clone()
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with written_folder(target, num_bytes=num_bytes) as temporary:
        write_durably(temporary / CONFIG_NAME, json.dumps(peft_config(model, adapter), indent=2).encode())
        write_durably(temporary / OWN_NAME, json.dumps({"base_identity": model.init_identity}).encode())
        write_durably(temporary / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    logger.info("exported the adapter of step %d to %s: %d bytes", ref.step, target, num_bytes)
    return Exported(target, ref.step, len(tensors), num_bytes, (WEIGHTS_NAME,))


def peft_names(model: ModelSection, adapter: AdapterSection) -> dict[str, str]:
    """Ours to PEFT's, of everything that may be in an adapter's file."""
    theirs = hugging_face_names(model)
    names = {f"{table}.weight": theirs[f"{table}.weight"] for table in _TABLES if f"{table}.weight" in theirs}
    for ours, name in theirs.items():
        module = ours.removesuffix(".weight")
        if name.removesuffix(".weight").rpartition(".")[2] in target_names(adapter):
            for leaf in ("lora_A", "lora_B"):
                names[f"{module}.{leaf}"] = f"{name.removesuffix('weight')}{leaf}.weight"
    assert all(is_adapters(ours) or ours in ("embedding.weight", "head.weight") for ours in names)
    return {ours: f"{_PREFIX}{name}" for ours, name in names.items()}


def peft_config(model: ModelSection, adapter: AdapterSection) -> Mapping[str, Any]:
    """adapter_config.json; what it leaves out PEFT takes as it is when a LoRA is made."""
    tied = model.embeddings == "tied" and bool(adapter.train_also)
    tables = ["embed_tokens"] if tied else [_TABLES[name] for name in dict.fromkeys(adapter.train_also)]
    alpha = adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.init,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilised,
        "target_modules": list(target_names(adapter)),
        "modules_to_save": tables or None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# ---- read ---------------------------------------------------------------------------------------------------------

# What a PEFT adapter may have and ours has in one form only; left out, PEFT takes this form.
_ONE_FORM: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def check_adapter(config: Config) -> dict[str, Stored]:
    """The tensors of the adapter at `adapter.init`, by our names, if it fits; by the config and the header alone.

    ConfigError naming what differs, CheckpointMismatch for tensors of another model, CheckpointError,
    CheckpointDamaged, StoreError.
    """
    assert config.adapter.init is not None
    folder = Folder(config.adapter.init)
    fields = folder.json(CONFIG_NAME)
    if problems := [*_differences(config, fields)]:
        raise ConfigError(problems)
    stored = header_of(folder, WEIGHTS_NAME)
    if config.model.embeddings == "tied" and _PREFIX + _EMBEDDING in stored:
        stored.pop(_PREFIX + _HEAD, None)
    ours = {theirs: name for name, theirs in peft_names(config.model, config.adapter).items()}
    check_shapes(
        {name: each.shape for name, each in stored.items()},
        _shapes(config),
        where=folder.path(WEIGHTS_NAME),
        described_by="the config",
    )
    if odd := [f"{name} ({each.dtype})" for name, each in stored.items() if each.dtype not in TAKEN_DTYPES]:
        raise CheckpointMismatch(
            f"{folder} holds {some(odd)}: adapters that can be read are {', '.join(TAKEN_DTYPES)}; convert it first"
        )
    return {ours[name]: each for name, each in stored.items()}


def _differences(config: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    """Messages for what the folder and the config say differently."""
    adapter, folder = config.adapter, config.adapter.init
    for name, only in _ONE_FORM.items():
        if (found := fields.get(name, only)) != only and not (found in (None, [], {}) and only in (None, [], {})):
            yield f"adapter.init = {folder!r}: {name} is {found!r:.100}; adapters that can be read have {only!r}"
    ours = peft_config(config.model, adapter)
    for theirs, own in {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rank_stabilised"}.items():
        if fields.get(theirs, False if theirs == "use_rslora" else None) != ours[theirs]:
            yield (
                f"adapter.{own} is {ours[theirs]!r}, and the adapter at adapter.init = {folder!r} has "
                f"{fields.get(theirs)!r:.100}: set adapter.{own} to that"
            )
    targets = fields.get("target_modules")
    found = {str(each).rpartition(".")[2] for each in targets} if isinstance(targets, list) else targets
    if found not in (set(target_names(adapter)), ALL_LINEAR if set(target_names(adapter)) == set(TARGETS) else None):
        named = ", ".join(sorted(found)) if isinstance(found, set) else repr(found)
        yield (
            f"adapter.targets are {', '.join(target_names(adapter))}, and the adapter at adapter.init = {folder!r} has "
            f"{named:.200}: set adapter.targets to those"
        )
    tables = {str(each).rpartition(".")[2] for each in fields.get("modules_to_save") or ()}
    if config.model.embeddings == "tied" and tables:
        tables -= {"lm_head"}
    if tables != set(ours["modules_to_save"] or ()):
        yield (
            f"adapter.train_also is {list(adapter.train_also)}, and the adapter at adapter.init = {folder!r} has "
            f"{sorted(tables)} whole: set adapter.train_also to those ({', '.join(_TABLES)})"
        )


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of everything that learns, by PEFT's names."""
    with torch.device("meta"):
        decoder = Decoder(config.model)
        adapt(decoder, config.adapter, frozen_dtype=torch.float32)
    names = peft_names(config.model, config.adapter)
    return {names[name]: tuple(each.shape) for name, each in decoder.named_parameters() if each.requires_grad}


def adopt_adapter(config: Config, store: Store) -> None:
    """Keeps in the run where its ranks find the adapter that it begins with; reads all of it once, for its checksums.

    CheckpointMismatch if it says that it belongs to other weights; and as `check_adapter`.
    """
    stored = check_adapter(config)
    assert config.adapter.init is not None
    folder = Folder(config.adapter.init)
    belongs_to = folder.json(OWN_NAME).get("base_identity") if OWN_NAME in folder.names() else None
    if None not in (belongs_to, config.model.init_identity) and belongs_to != config.model.init_identity:
        raise CheckpointMismatch(
            f"the adapter at adapter.init = {str(folder)!r} belongs to weights with the identity {belongs_to}, and "
            f"those at model.init = {config.model.init!r} have {config.model.init_identity}: give those it was trained "
            "on"
        )
    tensors = [(MODEL_PREFIX + name, each) for name, each in stored.items()]
    base = Base(
        place=str(folder),
        model=config.model.model_dump(mode="json"),
        shards=(summed(folder, WEIGHTS_NAME, tensors),),
        tensors=tuple(sorted((entry_of(name, each, shard=0) for name, each in tensors), key=lambda each: each.name)),
    )
    keep_base(store, base, name=ADAPTER_NAME)
