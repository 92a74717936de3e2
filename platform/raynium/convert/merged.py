"""The parameters of the model that a checkpoint holds, whole and on the CPU; of an adapter's run, with it added."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from raynium.checkpoint.base import BASE_NAME, base_of
from raynium.checkpoint.format.batches import in_file_order
from raynium.checkpoint.format.image import TORCH_DTYPES
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import MODEL_PREFIX, Chunk
from raynium.config.adapter import AdapterSection
from raynium.convert.config_json import saved_model
from raynium.errors import CheckpointMismatch
from raynium.models.adapter import DOWN, UP, adapter_scale
from raynium.models.decoder import Decoder
from raynium.models.init import init_parameter


class Whole(NamedTuple):
    """A parameter by its full name ("model/embedding.weight"), with the dtype it is read in."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]


def saved_adapter(ref: CheckpointRef) -> AdapterSection:
    """The adapter section of the run that saved this checkpoint. CheckpointMismatch for one that is none."""
    config = ref.manifest.state.get("config")
    try:
        return AdapterSection.model_validate(config.get("adapter", {}) if isinstance(config, dict) else {})
    except ValidationError as error:
        raise CheckpointMismatch(
            f"{ref.uri} does not say which adapter it holds: its state has no valid config.adapter, as a run writes it"
        ) from error


class ModelWeights:
    """Every parameter of the model, tied ones once. Nothing is read before `read`."""

    def __init__(self, ref: CheckpointRef):
        self._ref = ref
        self._adapter = saved_adapter(ref)
        self._entries = {entry.name: entry for entry in ref.manifest.tensors if entry.name.startswith(MODEL_PREFIX)}
        if self._adapter.rank is None:
            ordered = in_file_order(self._entries.values())
            self.parameters = [Whole(entry.name, entry.dtype, entry.global_shape) for entry in ordered]
            return
        with torch.device("meta"):
            decoder = Decoder(saved_model(ref))
        self.parameters = [
            Whole(MODEL_PREFIX + name, "float32", tuple(parameter.shape))
            for name, parameter in decoder.named_parameters()
        ]

    def read(self, some: Sequence[Whole]) -> dict[str, Tensor]:
        """These, verified, in this order. Raises as `load_checkpoint`."""
        found = {each.name: torch.empty(each.global_shape, dtype=TORCH_DTYPES[each.dtype]) for each in some}
        own = [name for name in found if name in self._entries]
        load_checkpoint(self._ref, _chunks(found, own))
        of_base = [name for name in found if name not in self._entries]
        self._read_base(found, of_base)
        for name in of_base:
            self._add_adapter(name, found[name])
        return found

    def _read_base(self, found: dict[str, Tensor], names: Sequence[str]) -> None:
        """Fills these with what the adapter was trained on: first weights are a function of the config."""
        config: Any = self._ref.manifest.state["config"] if names else None
        if names and (wanted := config["model"].get("init_identity")) is not None:
            base = base_of(self._ref.store)
            if base.manifest.identity != wanted:
                raise CheckpointMismatch(
                    f"{self._ref.uri} is an adapter of weights with the identity {wanted}, and its run has kept those "
                    f"of {base.uri}, with {base.manifest.identity}: the run's {BASE_NAME} was replaced; put it back"
                )
            load_checkpoint(base, _chunks(found, names), dtypes="converted")
            return
        for name in names:
            found[name].copy_(
                init_parameter(
                    name.removeprefix(MODEL_PREFIX),
                    shape=tuple(found[name].shape),
                    seed=config["run"]["seed"],
                    config=saved_model(self._ref),
                )
            )

    def _add_adapter(self, name: str, weight: Tensor) -> None:
        """weight += scale × B·A, where the checkpoint has them for this parameter."""
        module = name.removesuffix(".weight")
        thin = {leaf: self._entries[f"{module}.{leaf}"] for leaf in (DOWN, UP) if f"{module}.{leaf}" in self._entries}
        if not thin:
            return
        parts = {entry.name: torch.empty(entry.global_shape) for entry in thin.values()}
        load_checkpoint(self._ref, _chunks(parts, parts))
        lora_A, lora_B = (parts[f"{module}.{leaf}"] for leaf in (DOWN, UP))
        weight.addmm_(lora_B, lora_A, alpha=adapter_scale(self._adapter))


def _chunks(tensors: dict[str, Tensor], names: Iterable[str]) -> list[Chunk]:
    return [Chunk.whole(name, tensors[name], saved_here=False) for name in names]


def merged_weights(ref: CheckpointRef) -> dict[str, Tensor]:
    """All parameters of the model at a checkpoint, by the decoder's names. For one process: sampling."""
    weights = ModelWeights(ref)
    if not weights.parameters:
        # Which says what is there instead.
        read_tensors(ref, prefix=MODEL_PREFIX)
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in weights.read(weights.parameters).items()}
