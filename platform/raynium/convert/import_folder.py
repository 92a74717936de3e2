"""A Hugging Face folder of Llama 3 or Qwen 3 as the first checkpoint of a new run, which training goes on from.

Weights become float32, as training keeps them; the optimizer begins anew. Only safetensors are read, never a pickle.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raynium.checkpoint.state import MODEL_PREFIX, Chunk
from raynium.config.local_folders import local_path
from raynium.config.plain_file import plain_size
from raynium.config.schema import ModelSection
from raynium.convert.description import described_model, read_json
from raynium.convert.export import INDEX_NAME, SINGLE_NAME
from raynium.convert.new_run import Imported, Part, refuse_used, write_first_checkpoint
from raynium.convert.parameters import Shapes, check_shapes, parameter_shapes
from raynium.data.store import TOKENIZER_NAME
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, some
from raynium.models.names import hugging_face_names
from raynium.storage.local_files import look
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

STEP = 0
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Each of their numbers is a float32 number.
_DTYPES = ("F32", "BF16", "F16")
# In the folder itself.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", re.ASCII)
# Old files store RoPE's frequencies.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class _Stored:
    """A tensor in one of the folder's files, with safetensors' code of its dtype."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def import_folder(folder: str | Path, store: Store, *, tokenizer: str | Path | None = None) -> Imported:
    """Commit the folder's weights as step 0 of the run at `store`, which must be new. One process, on the CPU.

    tokenizer: a tokenizer.json, for a folder without one. Nothing is written before config.json, tokenizer and all
    tensors' names, shapes and dtypes were checked. Memory: one tensor, beside the mapped pages of one file of the
    folder and one of ours, which is made in the temporary directory (TMPDIR). CheckpointError, CheckpointMismatch,
    CheckpointDamaged, DataError for the tokenizer, StoreError.
    """
    path = _existing_folder(folder)
    refuse_used(store)
    model, tokenizer_path, text = described_model(path, tokenizer)
    stored = _checked_tensors(path, model)

    ref = write_first_checkpoint(
        store,
        _parts(stored, model),
        step=STEP,
        text=text,
        weights_only=True,
        imported_from=str(path),
        layout={"files": len({tensor.path for tensor in stored.values()})},
    )
    logger.info("imported %s into %s: %d tensors", path, store.url, len(stored))
    local = store.uri(TOKENIZER_NAME).removeprefix("file://")
    return Imported(ref, model, str(tokenizer_path) if "://" in local else local)


def _existing_folder(folder: str | Path) -> Path:
    path = local_path(folder)
    if "://" in str(folder) or not look(path.is_dir):
        raise CheckpointError(f"{folder} is no folder of this machine: give one with config.json and *.safetensors")
    return path


# ---- what the files hold ------------------------------------------------------------------------------------------


def _checked_tensors(folder: Path, model: ModelSection) -> dict[str, _Stored]:
    """Every parameter of the model by Hugging Face's name, from the files' headers alone."""
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        for name, tensor in _header(path).items():
            if name in stored:
                raise CheckpointMismatch(f"{name} is in {stored[name].path} and in {path}: remove one of the files")
            stored[name] = tensor
    stored = {name: tensor for name, tensor in stored.items() if not _DERIVED.fullmatch(name)}
    shapes: Shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = parameter_shapes(model)
    if _HEAD in stored and _HEAD not in expected and shapes.get(_EMBEDDING) == shapes[_HEAD]:
        # Qwen3-0.6B, for one, holds its tied head as well.
        _refuse_untied(stored)
        del stored[_HEAD]
        shapes = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(shapes, expected, where=str(folder), described_by="config.json")
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in stored.items() if tensor.dtype not in _DTYPES]:
        raise CheckpointMismatch(
            f"{folder} holds {some(odd)}: weights that can be imported are {', '.join(_DTYPES)}; convert it first"
        )
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """The folder's weights, as transformers chooses them: one file if it is there, else those of the index."""
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME]
    if not (folder / INDEX_NAME).exists():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {some(pickled)}, and reading those can run code" if pickled else "none of them"
        raise CheckpointError(
            f"{folder} has {found}: weights must be in {SINGLE_NAME}, or in files that {INDEX_NAME} names"
        )
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointDamaged(f"{folder / INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if odd := [name for name in names if not _FILE_NAME.fullmatch(name)]:
        raise CheckpointDamaged(f"{folder / INDEX_NAME} names {some(odd)}, which are no files of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointDamaged(f"{folder} lacks {some(missing)}, which {INDEX_NAME} names: download it again")
    return [folder / name for name in names]


def _header(path: Path) -> dict[str, _Stored]:
    with _opened(path) as file:
        found = {}
        for name in file.keys():  # noqa: SIM118  (no dict)
            tensor = file.get_slice(name)
            found[name] = _Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped and not read; its header was checked by the library."""
    try:
        # The library would wait for a pipe.
        plain_size(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointDamaged(f"{path} is not a whole safetensors file: {error}; download it again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _refuse_untied(stored: Mapping[str, _Stored]) -> None:
    with _opened(stored[_EMBEDDING].path) as first, _opened(stored[_HEAD].path) as second:
        if not torch.equal(first.get_tensor(_EMBEDDING), second.get_tensor(_HEAD)):
            raise CheckpointMismatch(
                f"config.json says that embedding and head are tied, but {_HEAD} in {stored[_HEAD].path} is not "
                f"{_EMBEDDING}: set tie_word_embeddings to false there"
            )


# ---- into our format ----------------------------------------------------------------------------------------------


def _parts(stored: Mapping[str, _Stored], model: ModelSection) -> Iterator[Part]:
    """One file of the folder at a time: it becomes one file of ours."""
    ours = {theirs: MODEL_PREFIX + name for name, theirs in hugging_face_names(model).items()}
    for path in sorted({tensor.path for tensor in stored.values()}):
        theirs = {ours[name]: name for name, tensor in stored.items() if tensor.path == path}
        with _opened(path) as source:
            places = {name: torch.empty(stored[theirs[name]].shape, device="meta") for name in theirs}
            chunks = [Chunk.whole(name, place, saved_here=True) for name, place in places.items()]
            yield chunks, lambda block, source=source, theirs=theirs: source.get_tensor(theirs[block.name])
