"""What a checkpoint says about itself, and the two notes that lead to it, as frozen types with strict JSON. No torch.

    rank ── ImageInfo ──► node agent ── ShardEntry ──► run coordinator ── Manifest ──► the store

FORMAT.md says the same for other programs. What is read is not trusted: every field is checked, and so is that blocks
lie in their files, do not overlap, and cover each tensor exactly once.
"""

import json
import math
import re
from collections import defaultdict
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from raynium.checkpoint.boxes import Box, tiling_problem
from raynium.checkpoint.checksum import FileChecksums, checksum, from_text, list_from_text, num_units, to_text
from raynium.errors import CheckpointDamaged, CheckpointError

FORMAT_NAME, FORMAT_VERSION = "raynium-checkpoint", 1
CHECKPOINTS_FOLDER, MANIFEST_NAME = "checkpoints", "manifest.json"
ALIGNMENT_BYTES = 4096  # of a shard's data, and divides every unit: no element straddles two units

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

GENERATION_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
_SHARD_PATTERN = rf"({GENERATION_PATTERN})/shard-[0-9]{{5,9}}\.safetensors"
_STEP_FOLDER = re.compile(r"step-([0-9]{9,18})", re.ASCII)
_HEADER_BYTES = 200  # the first line of a manifest is shorter, in every version

Count = Annotated[int, Field(ge=0, lt=2**60)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, max_length=32)]  # JSON has lists, we keep tuples
Generation = Annotated[str, Field(pattern=f"^{GENERATION_PATTERN}$")]
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,499}$")]
Crc = Annotated[str, Field(max_length=12)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=2**53)]


class CheckpointTooNew(CheckpointError):
    """A whole checkpoint, written by a newer Raynium in a format that this one does not know."""


class Record(BaseModel):
    """A frozen JSON object; unknown or missing fields and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of `to_json`. CheckpointDamaged, naming the field, for anything else."""
        return parsed(cls, text, what=cls.__name__)


class SavedBlock(Record):
    """One block of one logical tensor, and the bytes of the file that hold it (C order, little-endian)."""

    name: TensorName
    dtype: str
    global_shape: Counts
    offsets: Counts
    shape: Counts
    begin: Count
    end: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_range(self.name, self.dtype, self.shape, self.begin, self.end)
        return self


class ImageInfo(Record):
    """A rank's finished file image in shared memory: what it tells its node agent."""

    step: Count
    path: str
    size: Count
    tensors: Annotated[tuple[SavedBlock, ...], Field(strict=False)]
    stall_seconds: Seconds = 0.0  # that the training thread stood still for it


class FileEntry(Record):
    """One data file: its key below the step's folder, and CRC64NVME (base64) of the whole and of each unit."""

    key: Annotated[str, Field(pattern=f"^{_SHARD_PATTERN}$")]
    size: Count
    crc64nvme: Crc
    unit_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**30, multiple_of=ALIGNMENT_BYTES)]
    unit_crc64nvme: str  # of all units in one text: a terabyte has four million

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.checksums.unit_crcs)
        if count != num_units(self.size, self.unit_bytes):
            raise ValueError(f"{self.key}: {count} unit checksums for {self.size} bytes")
        if self.checksums.crc != from_text(self.crc64nvme):
            raise ValueError(f"{self.key}: the units' checksums do not combine to that of the whole")
        return self

    @cached_property
    def checksums(self) -> FileChecksums:
        return FileChecksums(self.size, self.unit_bytes, list_from_text(self.unit_crc64nvme))


class ShardEntry(Record):
    """An uploaded and verified file: what a node agent tells the run coordinator."""

    step: Count
    file: FileEntry
    tensors: Annotated[tuple[SavedBlock, ...], Field(strict=False)]
    stall_seconds: Seconds = 0.0  # as in ImageInfo


class Block(Record):
    """Where a part of a tensor lies: `shard` counts in the manifest's `shards`."""

    shard: Count
    offsets: Counts
    shape: Counts
    begin: Count
    end: Count

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.shape)


class TensorEntry(Record):
    """A logical tensor, whatever layout it was saved in."""

    name: TensorName
    dtype: str
    global_shape: Counts
    blocks: Annotated[tuple[Block, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for block in self.blocks:
            _check_range(self.name, self.dtype, block.shape, block.begin, block.end)
        if problem := tiling_problem(self.global_shape, [block.box for block in self.blocks]):
            raise ValueError(f"{self.name}: {problem}")
        return self


class Timing(Record):
    """What this checkpoint cost, in seconds; of many ranks the longest."""

    stall_seconds: Seconds  # a rank's training thread stood still
    upload_seconds: Seconds  # from the snapshot handed over to the last shard durable and confirmed
    commit_seconds: Seconds  # from then on until the manifest was ready to be written


class Manifest(Record):
    """A whole checkpoint. Its existence is the commit."""

    step: Count
    generation: Generation  # of the ranks that saved it
    parent_step: Count | None  # the checkpoint that this generation started from
    committed_unix: Annotated[float, Field(ge=0, lt=2**53)]
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    layout: dict[str, JsonValue]  # how the ranks were laid out; for people, loading does not need it
    state: dict[str, JsonValue]  # step, data position, seeds, facts of the config that must not change
    metrics: dict[str, FiniteFloat]  # of the held-out text at this step; empty if it was not evaluated
    timing: Timing | None  # None: it was not trained here but imported
    shards: Annotated[tuple[FileEntry, ...], Field(strict=False, min_length=1)]
    tensors: Annotated[tuple[TensorEntry, ...], Field(strict=False, min_length=1)]

    @field_validator("layout", "state")
    @classmethod
    def _check_numbers(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(value, allow_nan=False)  # ValueError: NaN and infinity are no JSON
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
        self._check_ranges()
        return self

    def _check_ranges(self) -> None:
        """Every block lies inside its file, and no byte belongs to two."""
        ranges: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for tensor in self.tensors:
            for block in tensor.blocks:
                if block.shard >= len(self.shards):
                    raise ValueError(f"{tensor.name}: shard {block.shard} of {len(self.shards)}")
                if block.end > self.shards[block.shard].size:
                    raise ValueError(f"{tensor.name}: bytes {block.begin}-{block.end} lie outside its shard")
                ranges[block.shard].append((block.begin, block.end, tensor.name))
        for shard, found in ranges.items():
            found.sort()
            for (_, end, name), (begin, _, next_name) in pairwise(found):
                if begin < end:
                    raise ValueError(f"{name} and {next_name} share bytes of {self.shards[shard].key}")

    def tensors_in(self, shard: int, begin: int, end: int) -> list[str]:
        """Names of the tensors that have bytes in this range of a data file."""
        return sorted(
            tensor.name
            for tensor in self.tensors
            if any(block.shard == shard and block.begin < end and begin < block.end for block in tensor.blocks)
        )

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
    return _header(FORMAT_VERSION, rest) + rest


def manifest_from_bytes(data: bytes, *, where: str) -> Manifest:
    """Inverse of `manifest_to_bytes`. CheckpointDamaged names the field; CheckpointTooNew for a newer format."""
    head, newline, rest = data.partition(b"\n")
    if not newline or len(head) > _HEADER_BYTES or not head.endswith(b","):
        raise CheckpointDamaged(f"{where} is not a checkpoint manifest: its first line is not a manifest's")
    try:
        fields = json.loads(head[:-1] + b"}")
        version = fields["version"]
        whole = type(version) is int and head + newline == _header(version, rest)
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
    return parsed(Manifest, b"{" + rest, what=where)


def _header(version: int, rest: bytes) -> bytes:
    # The version is under the checksum too, so that a flipped bit in it is damage and not a newer format
    crc = to_text(checksum(b"%d\n" % version + rest))
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

R = TypeVar("R", bound=Record)


def parsed(kind: type[R], text: str | bytes, *, what: str) -> R:
    """`text` as a `kind`. CheckpointDamaged for bad JSON, a repeated, unknown, missing or wrong field."""
    try:
        return kind.model_validate(json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant))
    except ValidationError as error:
        raise CheckpointDamaged(f"{what} is damaged: {first_problem(error)}") from error
    except (ValueError, RecursionError) as error:  # ValueError: JSON, text encoding, endless numbers
        raise CheckpointDamaged(f"{what} is damaged: {error}") from error


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, with the field's path."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(step) for step in problem["loc"])
    return f"{path}: {problem['msg']}" if path else problem["msg"]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a field is given twice among {sorted(fields)[:5]}")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_range(name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype[:20]!r} is not one of {', '.join(DTYPES)}")
    item_bytes = DTYPES[dtype][1]
    if end - begin != math.prod(shape) * item_bytes:
        raise ValueError(f"{name}: bytes {begin}-{end} do not fit a {dtype} block of shape {shape}")
    if begin < ALIGNMENT_BYTES or begin % item_bytes:
        raise ValueError(f"{name}: byte {begin} is no place for a {dtype}")
