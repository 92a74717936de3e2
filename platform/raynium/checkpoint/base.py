"""The weights that a run begins with, left where they lie: what `base.json` in the run's store says of them. No torch.

`model.init` names a Hugging Face folder or another run's checkpoint. The driver looks at it once and writes down, in
the terms of our own manifests, which bytes of which files each parameter is. Ranks then fill their parts with
`load_checkpoint(base_of(store), chunks, dtypes="converted")`: of any layout, verified, and without a copy.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from raynium.checkpoint.format.blocks import Ranges, Tensor, check_blocks
from raynium.checkpoint.format.manifest import DataFile, JsonObject, TensorEntry, parsed
from raynium.checkpoint.held import HeldRef
from raynium.checkpoint.ref import CheckpointRef
from raynium.errors import CheckpointError
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store

# Of the run. The second is of an adapter that it begins with (adapter.init).
BASE_NAME, ADAPTER_NAME = "base.json", "adapter.json"
# Of a safetensors file: what its header's length takes.
_FIRST_BYTE = 8


class BaseFile(DataFile):
    """One file of weights. store: the folder or URL that `key` is in."""

    store: str


class Base(JsonObject):
    """Every parameter of a model, under our names ("model/embedding.weight"), in files that are not the run's own.

    place: absolute, as `model.init` said. model: the model section, as far as the weights settle it. Dtypes are those
    of the files.
    """

    place: str
    model: dict[str, JsonValue]
    shards: Annotated[tuple[BaseFile, ...], Field(strict=False, min_length=1)]
    tensors: Annotated[tuple[TensorEntry, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        files = [(file.key, file.size) for file in self.shards]
        check_blocks(self._tensors, files=files, first_byte=_FIRST_BYTE)
        return self

    @property
    def _tensors(self) -> list[Tensor]:
        return [Tensor(entry.name, entry.global_shape, entry.blocks) for entry in self.tensors]

    @cached_property
    def identity(self) -> str:
        """Of the weights: equal for the same files in another place."""
        fields = self.model_dump(mode="json", include={"tensors"})
        fields["files"] = [[file.size, file.unit_bytes, file.unit_crc64nvme] for file in self.shards]
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def state(self) -> dict[str, JsonValue]:
        """As of a checkpoint: nothing came with these weights."""
        return {}

    @property
    def weights_only(self) -> bool:
        return True

    def tensors_in(self, shard: int, begin: int, end: int) -> list[str]:
        """Names of the tensors that have bytes in this range of a file."""
        found = Ranges.of(self._tensors).tensors_in(shard, begin, end)
        return sorted(self.tensors[index].name for index in found)


@dataclass(frozen=True)
class BaseRef:
    """A base, ready to be read as a checkpoint is: for `load_checkpoint`, which asks no more of one."""

    manifest: Base

    @property
    def uri(self) -> str:
        return self.manifest.place

    def file(self, index: int) -> tuple[Store, str]:
        file = self.manifest.shards[index]
        return Store(file.store), file.key


Readable = CheckpointRef | BaseRef | HeldRef


def keep_base(store: Store, base: Base, *, name: str = BASE_NAME) -> None:
    """In the run's store, for its ranks. The driver calls it, before they start."""
    store.replace(name, base.to_json().encode())


def find_base(store: Store, *, name: str = BASE_NAME) -> Base | None:
    """What the run at `store` began with; None for one that began with first weights. CheckpointDamaged."""
    try:
        return parsed(Base, store.read(name), what=store.uri(name))
    except KeyMissing:
        return None


def base_of(store: Store, *, name: str = BASE_NAME) -> BaseRef:
    """The same, to load from. CheckpointError where there is none."""
    if (base := find_base(store, name=name)) is None:
        raise CheckpointError(
            f"{store.url} has no {name}, which says where the run's first weights are: the driver writes it "
            "before ranks start; start the run again"
        )
    return BaseRef(base)
