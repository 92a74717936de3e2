"""The weights of a Hugging Face folder, where they lie: which bytes of which file each parameter of the model is.

Only safetensors are read, never a pickle, and only through the store: a folder of this machine and one in S3 alike.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raynium.checkpoint.base import Base, BaseFile
from raynium.checkpoint.format.manifest import DTYPES, TensorEntry
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.schema import ModelSection
from raynium.convert.export import INDEX_NAME, SINGLE_NAME
from raynium.convert.folder import Folder
from raynium.convert.parameters import Shapes, check_shapes, parameter_shapes
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, some
from raynium.models.names import hugging_face_names
from raynium.storage.checksum import UNIT_BYTES, FileChecksums, checksum_units, list_to_text, to_text

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# By safetensors' code. Each of their numbers is a float32 number.
TAKEN_DTYPES = {DTYPES[name][0]: name for name in ("float32", "bfloat16", "float16")}
# In the folder itself.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", re.ASCII)
# Old files store RoPE's frequencies.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# As the library has it.
_MAX_HEADER_BYTES = 100_000_000
# By the same codes: unsigned integers of that size, and the bits of the exponent.
_EXPONENTS = {"F32": (np.uint32, 0x7F80_0000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}
_NUMBERS_AT_ONCE = 2**17
# Read and summed at a time, by each of so many threads.
_PART_BYTES, _READERS = 64 * UNIT_BYTES, 4


@dataclass(frozen=True)
class Stored:
    """A tensor in one of the folder's files. dtype: safetensors' code. begin, end: bytes of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# ---- what the files hold ------------------------------------------------------------------------------------------


def find_weights(folder: Folder, model: ModelSection) -> dict[str, Stored]:
    """Every parameter of the model by Hugging Face's name, from the files' headers alone.

    CheckpointMismatch naming what is not there, too much, or of another shape; CheckpointError, CheckpointDamaged.
    """
    stored: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for name, tensor in header_of(folder, file).items():
            if name in stored:
                first = folder.path(stored[name].file)
                raise CheckpointMismatch(f"{name} is in {first} and in {folder.path(file)}: remove one of the files")
            stored[name] = tensor
    stored = {name: tensor for name, tensor in stored.items() if not _DERIVED.fullmatch(name)}
    expected = parameter_shapes(model)
    if _HEAD in stored and _HEAD not in expected and _EMBEDDING in stored:
        # Qwen3-0.6B, for one, holds its tied head as well.
        _refuse_untied(folder, stored)
        del stored[_HEAD]
    shapes: Shapes = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(shapes, expected, where=str(folder), described_by="config.json")
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in stored.items() if tensor.dtype not in TAKEN_DTYPES]:
        raise CheckpointMismatch(
            f"{folder} holds {some(odd)}: weights that can be imported are {', '.join(TAKEN_DTYPES)}; convert it first"
        )
    if odd := [name for name, tensor in stored.items() if tensor.begin % DTYPES[TAKEN_DTYPES[tensor.dtype]][1]]:
        raise CheckpointMismatch(
            f"{folder} holds {some(odd)}, which begins at no multiple of the size of its numbers: save it again with "
            "transformers (save_pretrained)"
        )
    return stored


def _weight_files(folder: Folder) -> list[str]:
    """The folder's weights, as transformers chooses them: one file if it is there, else those of the index."""
    names = folder.names()
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    if INDEX_NAME not in names:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        found = f"only {some(pickled)}, and reading those can run code" if pickled else "none of them"
        raise CheckpointError(
            f"{folder} has {found}: weights must be in {SINGLE_NAME}, or in files that {INDEX_NAME} names"
        )
    weight_map = folder.json(INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointDamaged(f"{folder.path(INDEX_NAME)} has no weight_map")
    files = sorted({str(name) for name in weight_map.values()})
    if odd := [name for name in files if not _FILE_NAME.fullmatch(name)]:
        raise CheckpointDamaged(f"{folder.path(INDEX_NAME)} names {some(odd)}, which are no files of this folder")
    if missing := [name for name in files if name not in names or not folder.is_file(name)]:
        raise CheckpointDamaged(f"{folder} lacks {some(missing)}, which {INDEX_NAME} names: download it again")
    return files


def header_of(folder: Folder, file: str) -> dict[str, Stored]:
    """A safetensors file: eight bytes say how long the header is, JSON says where tensors are in what follows it."""
    size = folder.size(file)

    def damaged(why: str, error: Exception | None = None) -> CheckpointDamaged:
        return CheckpointDamaged(f"{folder.path(file)} is not a whole safetensors file: {why}; download it again")

    if size < 8:
        raise damaged(f"it has {size} bytes")
    length = int.from_bytes(folder.store.read_range(file, 0, 8), "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise damaged(f"it has {size:,} bytes, and its header alone would have {length:,}")
    try:
        header = json.loads(folder.store.read_range(file, 8, length))
        header.pop("__metadata__", None)
        found = {name: _stored(file, fields, first_byte=8 + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"its header cannot be read ({type(error).__name__}: {str(error)[:100]})") from error
    # As the library has it: no byte is of two tensors, or of none.
    position = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise damaged(f"{name[:100]} begins at byte {tensor.begin:,}, and what is before it ends at {position:,}")
        position = tensor.end
    if position != size:
        raise damaged(f"it has {size:,} bytes, and its tensors end at {position:,}")
    return found


def _stored(file: str, fields: Mapping[str, Any], *, first_byte: int) -> Stored:
    """ValueError, KeyError or TypeError for what no such file has."""
    dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**60 for number in (*shape, begin, end)) or len(fields) != 3:
        raise ValueError("no shape and place of a tensor")
    item_bytes = next((item_bytes for code, item_bytes in DTYPES.values() if code == dtype), None)
    if item_bytes is not None and end - begin != math.prod(shape) * item_bytes:
        raise ValueError(f"{end - begin} bytes for a shape of {math.prod(shape)} numbers")
    return Stored(file, str(dtype), shape, first_byte + begin, first_byte + end)


def _refuse_untied(folder: Folder, stored: Mapping[str, Stored]) -> None:
    head, embedding = stored[_HEAD], stored[_EMBEDDING]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    for begin in range(0, head.end - head.begin if same else 0, _PART_BYTES):
        length = min(_PART_BYTES, head.end - head.begin - begin)
        first, second = (folder.store.read_range(each.file, each.begin + begin, length) for each in (head, embedding))
        same = same and first == second
    if not same:
        raise CheckpointMismatch(
            f"config.json says that embedding and head are tied, but {_HEAD} in {folder.path(head.file)} is not "
            f"{_EMBEDDING}: set tie_word_embeddings to false there"
        )


# ---- what is in them ----------------------------------------------------------------------------------------------


def base_of_folder(folder: Folder, model: ModelSection, stored: Mapping[str, Stored]) -> Base:
    """Reads every byte once, for the checksums. stored: from `find_weights`.

    CheckpointDamaged where a number is NaN or infinite: every loss would be, and every text noise.
    """
    ours = {theirs: MODEL_PREFIX + name for name, theirs in hugging_face_names(model).items()}
    files = sorted({tensor.file for tensor in stored.values()})
    entries = [entry_of(ours[name], tensor, shard=files.index(tensor.file)) for name, tensor in stored.items()]
    return Base(
        place=str(folder),
        model=model.model_dump(mode="json"),
        shards=tuple(
            summed(folder, file, [(ours[name], each) for name, each in stored.items() if each.file == file])
            for file in files
        ),
        tensors=tuple(sorted(entries, key=lambda entry: entry.name)),
    )


def entry_of(name: str, tensor: Stored, *, shard: int) -> TensorEntry:
    """As a manifest has it. name: ours, in full. shard: number of its file."""
    return TensorEntry(
        name=name,
        dtype=TAKEN_DTYPES[tensor.dtype],
        global_shape=tensor.shape,
        shards=np.array([shard]),
        offsets=tuple(np.array(0) for _ in tensor.shape),
        shapes=tuple(np.array(size) for size in tensor.shape),
        begins=np.array(tensor.begin),
    )


def summed(folder: Folder, file: str, tensors: Sequence[tuple[str, Stored]]) -> BaseFile:
    store, size = folder.store, folder.size(file)

    def units(begin: int) -> Sequence[int]:
        part = bytearray(min(_PART_BYTES, size - begin))
        store.read_into(file, begin, memoryview(part))
        for name, tensor in tensors:
            low, high = max(tensor.begin, begin), min(tensor.end, begin + len(part))
            if low < high:
                _refuse_odd_bits(name, memoryview(part)[low - begin : high - begin], tensor.dtype)
        return checksum_units(memoryview(part), UNIT_BYTES).unit_crcs

    # Of two parts at most, this thread is as fast.
    begins, parts = range(0, size, _PART_BYTES), list[Sequence[int]]()
    if len(begins) <= 2:
        parts += map(units, begins)
    else:
        with ThreadPoolExecutor(_READERS, thread_name_prefix="base-sums") as pool:
            parts += pool.map(units, begins)
    crcs = [crc for part in parts for crc in part]
    sums = FileChecksums(size, UNIT_BYTES, crcs)
    return BaseFile(
        store=store.url,
        key=file,
        size=size,
        crc64nvme=to_text(sums.crc),
        unit_bytes=UNIT_BYTES,
        unit_crc64nvme=list_to_text(crcs),
    )


def _refuse_odd_bits(name: str, data: memoryview, dtype: str) -> None:
    """`refuse_odd_numbers` of bytes: a number whose exponent has all its bits is none, or infinite.

    Not by torch: in each reader's thread it would start threads of its own, which keep 10 MB.
    """
    kind, exponent = _EXPONENTS[dtype]
    numbers = np.frombuffer(data, dtype=kind)
    for begin in range(0, len(numbers), _NUMBERS_AT_ONCE):
        if (numbers[begin : begin + _NUMBERS_AT_ONCE] & exponent).max() == exponent:
            raise _odd_numbers(name)


def refuse_odd_numbers(name: str, tensor: torch.Tensor) -> None:
    """CheckpointDamaged if a number of it is none, or infinite."""
    # Both are NaN if one number is, and this takes no memory of the tensor's size.
    if tensor.numel() and not all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist()):
        raise _odd_numbers(name)


def _odd_numbers(name: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"{name} holds numbers that are NaN or infinite: the model was saved broken, or not wholly; get it again"
    )
