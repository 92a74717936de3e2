"""What a checkpoint says about itself, and the two notes that lead to it, as frozen types with strict JSON. No torch.

    rank ── ImageInfo ──► node agent ── ShardEntry ──► run coordinator ── Manifest ──► the store

FORMAT.md says the same for other programs. What is read is not trusted: every field is checked, and so is that blocks
lie in their files, do not overlap, and cover each tensor exactly once.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from raynium.checkpoint.format.blocks import ALIGNMENT_BYTES, Blocks, Column, Ranges, Tensor, check_blocks, to_column
from raynium.checkpoint.format.boxes import Ints
from raynium.errors import CheckpointDamaged, CheckpointError
from raynium.storage.checksum import FileChecksums, checksum, from_text, to_text

FORMAT_NAME, FORMAT_VERSION = "raynium-checkpoint", 1
CHECKPOINTS_FOLDER, MANIFEST_NAME = "checkpoints", "manifest.json"

# dtype as torch prints it: (its code in safetensors, bytes per element)
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_MAX_DIMS = 32


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype[:20]!r} is not one of {', '.join(DTYPES)}")
    return sys.intern(dtype)


GENERATION_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
_SHARD_PATTERN = rf"({GENERATION_PATTERN})/shard-[0-9]{{5,9}}\.safetensors"
_STEP_FOLDER = re.compile(r"step-([0-9]{9,18})", re.ASCII)
# The first line of a manifest holds these, and is shorter in every version.
_HEADER_FIELDS, _HEADER_BYTES = ("format", "version", "crc64nvme"), 200

Count = Annotated[int, Field(ge=0, lt=2**60)]
# JSON has lists, we keep tuples.
Counts = Annotated[tuple[Count, ...], Field(strict=False, max_length=_MAX_DIMS)]
# A list of integers in JSON, or one that stands for all; int64 in memory
Numbers = Annotated[Column, PlainValidator(to_column), PlainSerializer(lambda column: column.tolist())]
NumbersOfDims = Annotated[tuple[Numbers, ...], Field(strict=False, max_length=_MAX_DIMS)]
Generation = Annotated[str, Field(pattern=f"^{GENERATION_PATTERN}$")]
# Interned: every rank of hundreds sends the same thousands
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,499}$"), AfterValidator(sys.intern)]
DtypeName = Annotated[str, AfterValidator(_known_dtype)]
Crc = Annotated[str, Field(max_length=12)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=2**53)]


class CheckpointTooNew(CheckpointError):
    """A whole checkpoint, written by a newer Raynium in a format that this one does not know."""


class JsonObject(BaseModel):
    """A frozen JSON object; unknown or missing fields and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of `to_json`. CheckpointDamaged, naming the field, for anything else."""
        return parsed(cls, text, what=cls.__name__)


class Columns(JsonObject):
    """An object with arrays, which do not compare to one truth value: as equal as its JSON."""

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, type(self)) and self.to_json() == other.to_json())

    def __hash__(self) -> int:
        return hash(self.to_json())


@dataclass(frozen=True)
class SavedBlock:
    """One block of one logical tensor, and where its bytes begin in the file (C order, little-endian)."""

    name: str
    dtype: str
    global_shape: Ints
    offsets: Ints
    shape: Ints
    begin: int

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * DTYPES[self.dtype][1]


class SavedBlocks(Columns):
    """All blocks of one file, in columns: hundreds of ranks send thousands of blocks each, at every save.

    dims, begins: [blocks]. Places (shapes and offsets) are the numbers of all blocks one after the other, of each as
    many as it has dims: [sum of dims].
    """

    names: Annotated[tuple[TensorName, ...], Field(strict=False)]
    dtypes: Annotated[tuple[DtypeName, ...], Field(strict=False)]
    dims: Numbers
    global_shapes: Numbers
    offsets: Numbers
    shapes: Numbers
    begins: Numbers

    @classmethod
    def of(cls, blocks: Sequence[SavedBlock]) -> Self:
        def flat(places: Iterator[Ints]) -> Column:
            return np.array([number for place in places for number in place], dtype=np.int64)

        return cls(
            names=tuple(block.name for block in blocks),
            dtypes=tuple(block.dtype for block in blocks),
            dims=np.array([len(block.shape) for block in blocks], dtype=np.int64),
            global_shapes=flat(block.global_shape for block in blocks),
            offsets=flat(block.offsets for block in blocks),
            shapes=flat(block.shape for block in blocks),
            begins=np.array([block.begin for block in blocks], dtype=np.int64),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if np.any(self.dims > _MAX_DIMS):
            raise ValueError(f"a block has more than {_MAX_DIMS} dims")
        for column, length in (
            (self.dtypes, len(self.names)),
            (self.dims, len(self.names)),
            (self.begins, len(self.names)),
            *((places, int(np.sum(self.dims))) for places in (self.global_shapes, self.offsets, self.shapes)),
        ):
            if np.shape(column) != (length,):
                raise ValueError(f"a column has {np.size(column)} values instead of {length}")
        return self

    def rows(self) -> Iterator[SavedBlock]:
        """The blocks one by one, in the order of the file."""
        global_shapes, offsets, shapes = self.global_shapes.tolist(), self.offsets.tolist(), self.shapes.tolist()
        first = 0
        rows = zip(self.names, self.dtypes, self.dims.tolist(), self.begins.tolist(), strict=True)
        for name, dtype, dims, begin in rows:
            cut = slice(first, first + dims)
            yield SavedBlock(
                name=name,
                dtype=dtype,
                global_shape=tuple(global_shapes[cut]),
                offsets=tuple(offsets[cut]),
                shape=tuple(shapes[cut]),
                begin=begin,
            )
            first += dims


class ImageInfo(JsonObject):
    """A rank's finished file image in shared memory, and how long training stood still for it: told to its agent."""

    step: Count
    path: str
    size: Count
    tensors: SavedBlocks
    stall_seconds: Seconds = 0.0


class DataFile(JsonObject):
    """A file that holds tensors: CRC64NVME (base64) of the whole and, in one text, of all units, which are millions."""

    key: str
    size: Count
    crc64nvme: Crc
    unit_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**30, multiple_of=ALIGNMENT_BYTES)]
    unit_crc64nvme: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self._decoded().crc != from_text(self.crc64nvme):
            raise ValueError(f"{self.key}: the units' checksums do not combine to that of the whole")
        return self

    @cached_property
    def checksums(self) -> FileChecksums:
        """Decoded for the files that are read: all of a checkpoint's are many."""
        return self._decoded()

    def _decoded(self) -> FileChecksums:
        return FileChecksums.from_text(self.size, self.unit_bytes, self.unit_crc64nvme)


class FileEntry(DataFile):
    """One of a checkpoint's, below the step's folder."""

    key: Annotated[str, Field(pattern=f"^{_SHARD_PATTERN}$")]


class ShardEntry(JsonObject):
    """An uploaded and verified file: what a node agent tells the run coordinator. stall_seconds: as in ImageInfo."""

    step: Count
    file: FileEntry
    tensors: SavedBlocks
    stall_seconds: Seconds = 0.0


class TensorEntry(Columns):
    """A logical tensor, whatever layout it was saved in.

    Its blocks are columns, of one number per block; of places one column per dim. A number stands for a column of
    equal ones, except in `shards`, which says how many blocks there are. `blocks` shows them as they are meant.
    """

    name: TensorName
    dtype: DtypeName
    global_shape: Counts
    shards: Numbers
    offsets: NumbersOfDims
    shapes: NumbersOfDims
    begins: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.offsets) == len(self.shapes) == len(self.global_shape):
            raise ValueError(f"{self.name}: its blocks have another number of dims than the shape {self.global_shape}")
        assert len(self.blocks)
        return self

    @cached_property
    def blocks(self) -> Blocks:
        """Each block that is somewhere in the checkpoint."""
        return Blocks.of(
            DTYPES[self.dtype][1],
            shards=self.shards,
            offsets=self.offsets,
            shapes=self.shapes,
            begins=self.begins,
        )


class Timing(JsonObject):
    """Seconds that training stood still for this checkpoint, from then on until the last shard was durable and
    confirmed, and then until the manifest was ready to be written; of many ranks the longest.
    """

    stall_seconds: Seconds
    upload_seconds: Seconds
    commit_seconds: Seconds


class Manifest(JsonObject):
    """A whole checkpoint. Its existence is the commit.

    generation: of the ranks that saved it; it started from the checkpoint of parent_step. layout: how the ranks were
    laid out, for people; loading does not need it. state: step, data position, seeds, facts of the config that must not
    change. metrics: of the held-out text, empty if it was not evaluated at this step. timing: None for an import.
    """

    step: Count
    generation: Generation
    parent_step: Count | None
    committed_unix: Annotated[float, Field(ge=0, lt=2**53)]
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    layout: dict[str, JsonValue]
    state: dict[str, JsonValue]
    metrics: dict[str, FiniteFloat]
    timing: Timing | None
    shards: Annotated[tuple[FileEntry, ...], Field(strict=False, min_length=1)]
    tensors: Annotated[tuple[TensorEntry, ...], Field(strict=False, min_length=1)]

    @field_validator("layout", "state", mode="before")
    @classmethod
    def _unpack(cls, value: Any) -> Any:
        return _unpacked(value)

    @field_validator("layout", "state")
    @classmethod
    def _check_numbers(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(value, allow_nan=False)
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys = [shard.key for shard in self.shards]
        if len(set(keys)) < len(keys):
            raise ValueError("shards: two have the same key")
        if stranger := next((key for key in keys if not key.startswith(f"{self.generation}/")), None):
            raise ValueError(f"shards: {stranger} is not of generation {self.generation}")
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) < len(names):
            raise ValueError("tensors: two have the same name")
        check_blocks(self._tensors, files=[(shard.key, shard.size) for shard in self.shards])
        return self

    @property
    def _tensors(self) -> list[Tensor]:
        return [Tensor(entry.name, entry.global_shape, entry.blocks) for entry in self.tensors]

    @cached_property
    def _ranges(self) -> Ranges:
        return Ranges.of(self._tensors)

    def tensors_in(self, shard: int, begin: int, end: int) -> list[str]:
        """Names of the tensors that have bytes in this range of a data file."""
        return sorted(self.tensors[index].name for index in self._ranges.tensors_in(shard, begin, end))

    @property
    def num_bytes(self) -> int:
        """Size of the data files together."""
        return sum(shard.size for shard in self.shards)

    @property
    def weights_only(self) -> bool:
        """Whether it was made of a model alone: whoever starts from it starts with a fresh optimizer."""
        return self.state.get("weights_only") is True


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The manifest's file: one JSON object, whose first line holds the format, the version and the checksum."""
    rest = manifest.to_json().encode()[1:]
    return _header(FORMAT_VERSION, memoryview(rest)) + rest


def manifest_from_bytes(data: bytes, *, where: str) -> Manifest:
    """Inverse of `manifest_to_bytes`. CheckpointDamaged names the field; CheckpointTooNew for a newer format."""
    length = data.find(b"\n", 0, _HEADER_BYTES + 1) + 1
    head, rest = data[:length], memoryview(data)[length:]
    if not head.endswith(b",\n"):
        raise CheckpointDamaged(f"{where} is not a checkpoint manifest: its first line is not a manifest's")
    try:
        version = json.loads(head[:-2] + b"}")["version"]
        whole = type(version) is int and head == _header(version, rest)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointDamaged(f"{where} is damaged: its crc64nvme does not match its contents")
    if version > FORMAT_VERSION:
        raise CheckpointTooNew(
            f"{where} has format version {version}, this Raynium reads up to {FORMAT_VERSION}: upgrade Raynium"
        )
    if version != FORMAT_VERSION:
        raise CheckpointDamaged(f"{where} has format version {version}, which never existed")
    return parsed(Manifest, data, what=where, without=_HEADER_FIELDS, object_of=_packed)


def _header(version: int, rest: memoryview) -> bytes:
    # The version is under the checksum too, so that a flipped bit in it is damage and not a newer format
    crc = to_text(checksum(rest, checksum(b"%d\n" % version)))
    return f'{{"format":"{FORMAT_NAME}","version":{version},"crc64nvme":"{crc}",\n'.encode()


# ---- names --------------------------------------------------------------------------------------------------------


def step_folder(step: int) -> str:
    """Where a step's checkpoint lies in the run's store."""
    return f"{CHECKPOINTS_FOLDER}/step-{step:09d}"


def step_of_folder(folder: str) -> int | None:
    """Inverse of `step_folder`; None for anything else."""
    match = _STEP_FOLDER.fullmatch(folder.rpartition("/")[2])
    return int(match[1]) if match and step_folder(int(match[1])) == folder else None


def manifest_key(step: int) -> str:
    return f"{step_folder(step)}/{MANIFEST_NAME}"


def shard_key(generation: str, rank: int) -> str:
    """A data file's key below the step's folder. The generation keeps writers that should be dead out of the way."""
    if not re.fullmatch(GENERATION_PATTERN, generation):
        raise CheckpointError(
            f"generation {generation!r} is not valid: use 1 to 63 lower-case letters, digits and hyphens"
        )
    return f"{generation}/shard-{rank:05d}.safetensors"


def is_shard(key: str) -> bool:
    """Whether a key below a step's folder is that of a data file, of whatever generation."""
    return re.fullmatch(_SHARD_PATTERN, key, re.ASCII) is not None


def generation_of(key: str) -> str:
    """Who wrote the data file with this key below a step's folder."""
    return key.partition("/")[0]


# ---- strict JSON --------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=JsonObject)


_ObjectOf = Callable[[list[tuple[str, Any]]], Any]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a field is given twice among {sorted(fields)[:5]}")
    return fields


def _packed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`_without_repeats`; where the columns of a tensor may be, they become arrays before the next tensor is read.

    As Python's integers those of a large manifest would take several times the memory of its text.
    """
    fields = _without_repeats(pairs)
    if "begins" in fields:
        for name in fields.keys() & {"shards", "begins"}:
            fields[name] = _packed_column(fields[name])
        for name in ("offsets", "shapes"):
            if type(fields.get(name)) is list:
                fields[name] = [_packed_column(column) for column in fields[name]]
    return fields


def _packed_column(value: Any) -> Any:
    """What is no column stays as it is: `to_column` refuses it where it is known to be meant as one."""
    if type(value) is list:
        with contextlib.suppress(ValueError):
            return to_column(value)
    return value


def _unpacked(value: Any) -> Any:
    """Inverse of `_packed`, for objects that are no tensors but have fields of such names."""
    if isinstance(value, dict):
        return {name: _unpacked(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_unpacked(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def parsed(
    kind: type[R], text: str | bytes, *, what: str, without: Sequence[str] = (), object_of: _ObjectOf = _without_repeats
) -> R:
    """`text` as a `kind`, besides the fields `without`. CheckpointDamaged for bad JSON, a repeated, unknown, missing
    or wrong field. object_of: makes each object of its names and values."""
    try:
        found = json.loads(
            text if isinstance(text, str) else str(text, "utf-8"),
            object_pairs_hook=object_of,
            parse_constant=_no_constant,
        )
        return kind.model_validate({key: found[key] for key in found if key not in without} if without else found)
    except ValidationError as error:
        raise CheckpointDamaged(f"{what} is damaged: {first_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{what} is damaged: {error}") from error


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, with the field's path."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(step) for step in problem["loc"])
    return f"{path}: {problem['msg']}" if path else problem["msg"]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
