"""A run's checkpoint as a folder that `transformers` loads, and what reads the same files (vLLM, llama.cpp, …).

config.json, generation_config.json           the model, in Hugging Face's words
model.safetensors                             the weights; or, of a larger model:
model-00001-of-00003.safetensors …            in files of at most `max_shard_bytes`
model.safetensors.index.json                  which tensor is in which of them
tokenizer.json, tokenizer_config.json         the run's own tokenizer, which begins a text as training did
and an imported model's other small files, as they came: its chat template, and its names of special tokens
"""

import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import torch

from raynium.checkpoint.format.batches import in_batches, raw_bytes
from raynium.checkpoint.format.image import TORCH_DTYPES
from raynium.checkpoint.format.manifest import DTYPES
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.local_folders import local_path
from raynium.config.schema import ModelSection
from raynium.convert.config_json import Dtype, saved_model
from raynium.convert.description import RunText
from raynium.convert.merged import ModelWeights, Whole
from raynium.convert.parameters import check_shapes, parameter_shapes
from raynium.errors import CheckpointError
from raynium.models.names import hugging_face_names
from raynium.storage.local_files import look, sync_folder

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2 * 2**30
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written: so many tensors and bytes of weights, in these files."""

    folder: Path
    step: int
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]


def export_checkpoint(
    ref: CheckpointRef, folder: str | Path, *, dtype: Dtype = "float32", max_shard_bytes: int = MAX_SHARD_BYTES
) -> Exported:
    """Write `folder`, which must not exist. One process, on the CPU.

    dtype: float32 gives the bits that training has, bfloat16 rounds them to the nearest. max_shard_bytes: of a file of
    weights, and of the tensors in memory at a time (256 MiB more for what is being read); a tensor that is larger gets
    a file of its own. The folder appears when all of it is durable: a crash leaves at most a hidden folder beside it.
    CheckpointError, CheckpointMismatch, CheckpointDamaged, StoreError.
    """
    if dtype not in get_args(Dtype):
        raise CheckpointError(f"dtype is {dtype!r}: export to one of {', '.join(get_args(Dtype))}")
    if max_shard_bytes < 1:
        raise CheckpointError(f"the largest file is to have {max_shard_bytes} bytes: give 1 or more")
    target = new_folder(folder)
    model = saved_model(ref)
    text = RunText.of_checkpoint(ref, model)
    weights = _Weights(ref, model, dtype, max_shard_bytes)
    with written_folder(target, num_bytes=weights.num_bytes) as temporary:
        weights.write(temporary)
        for name, content in text.files(dtype).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_durably(temporary / name, content)
    logger.info("exported step %d to %s: %d bytes", ref.step, target, weights.num_bytes)
    return Exported(target, ref.step, len(weights.entries), weights.num_bytes, tuple(weights.files))


@contextmanager
def written_folder(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """A hidden folder beside `target`, which becomes it when all is written. num_bytes: of what will be, for messages.

    CheckpointError if it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        temporary.rename(new_folder(target))
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the export {target}: {error.strerror or error}; check the permissions and the free space "
            f"there ({num_bytes:,} bytes are needed)"
        ) from error
    finally:
        # It is gone already when all went well.
        shutil.rmtree(temporary, ignore_errors=True)


def new_folder(folder: str | Path) -> Path:
    """The absolute path to write. CheckpointError if it exists or is a URL."""
    if "://" in str(folder):
        raise CheckpointError(f"{folder} is a URL: export to a folder of this machine, and copy that one")
    path = local_path(folder)
    if look(path.exists) or path.is_symlink():
        raise CheckpointError(f"{path} exists: give a folder that does not, or remove it first")
    return path


class _Weights:
    """The files that hold tensors: their plan, made of the manifest alone, and then their bytes."""

    def __init__(self, ref: CheckpointRef, model: ModelSection, dtype: Dtype, max_shard_bytes: int):
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._source = ModelWeights(ref)
        renamed = {MODEL_PREFIX + ours: theirs for ours, theirs in hugging_face_names(model).items()}
        self.entries = self._source.parameters
        self._names = {entry.name: renamed.get(entry.name, entry.name) for entry in self.entries}
        check_shapes(
            {self._names[entry.name]: entry.global_shape for entry in self.entries},
            parameter_shapes(model),
            where=ref.uri,
            described_by="its config",
        )
        shards = list(in_batches(self.entries, max_bytes=max_shard_bytes, dtype=TORCH_DTYPES[dtype]))
        self.files: dict[str, list[Whole]] = {
            SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
            for number, shard in enumerate(shards, 1)
        }

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes(entry) for entry in self.entries)

    def write(self, folder: Path) -> None:
        """All files, in one pass over the checkpoint, and the index where there are several."""
        tensors = self._tensors()
        for file_name, entries in self.files.items():
            with (folder / file_name).open("xb") as file:
                file.write(self._header(entries))
                for _ in entries:
                    file.write(raw_bytes(next(tensors)))
                _sync(file)
        if len(self.files) > 1:
            weight_map = {
                self._names[entry.name]: file_name for file_name, entries in self.files.items() for entry in entries
            }
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_durably(folder / INDEX_NAME, json.dumps(index, indent=2).encode())

    def _tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor once, in order, converted; each is let go of when the next is asked for."""
        for batch in in_batches(self.entries, max_bytes=self._max_shard_bytes):
            waiting = deque(self._source.read(batch).values())
            while waiting:
                yield waiting.popleft().to(TORCH_DTYPES[self._dtype])

    def _header(self, entries: Sequence[Whole]) -> bytes:
        """The begin of a safetensors file; its tensors follow in this order without gaps."""
        # Transformers asks for the format.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for entry in entries:
            end = position + self._bytes(entry)
            header[self._names[entry.name]] = {
                "dtype": DTYPES[self._dtype][0],
                "shape": list(entry.global_shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Tensor data begins at a multiple of 8.
        padded = text.ljust(-(-len(text) // 8) * 8)
        return len(padded).to_bytes(8, "little") + padded

    def _bytes(self, entry: Whole) -> int:
        return math.prod(entry.global_shape) * DTYPES[self._dtype][1]


def write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
