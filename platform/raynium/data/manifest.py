"""`manifest.json` of a document store: what the folder holds, and the proof that it is whole.

It is written last. A folder without a valid one is not a store. It holds nothing that differs between two builds of the
same documents (no dates, no host), so equal stores have equal manifests. What grows with the store is in columns: a
trillion tokens have 17,000 shards, and whoever begins to read must not wait for their manifest. The checksums of a
file's units are not in here but beside the file, in `train-00012.crc` for `train-00012.bin`: eight bytes each,
little-endian. They are read when the file is first used, and combine to the one checksum that is here.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Self, overload

import numpy as np
from awscrt.checksums import combine_crc64nvme
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynium.data.records.flags import NUM_FLAGS
from raynium.data.records.registry import RecordsRecipe
from raynium.data.text.left_out import LeftOutGroup
from raynium.errors import DataError
from raynium.storage.checksum import FileChecksums, checksum, from_text, list_from_text, num_units, to_text

MANIFEST_NAME = "manifest.json"
# Format 1 had no checksum per unit, format 2 did not say what was left out, format 3 listed each shard on its own.
FORMAT_VERSION = 4

Count = Annotated[int, Field(ge=0, lt=2**60)]
Positive = Annotated[int, Field(ge=1, lt=2**60)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _JsonObject(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredFile(NamedTuple):
    """One file of a store. crc: CRC64NVME of all of it."""

    name: str
    size_bytes: int
    crc: int

    @property
    def units_name(self) -> str:
        """Of the file beside it that holds the checksums of its units."""
        return str(PurePosixPath(self.name).with_suffix(".crc"))

    def units(self, content: bytes, unit_bytes: int, *, where: str) -> FileChecksums:
        """content: of the file at `units_name`. where: names the store. DataError unless it is what was built."""
        if len(content) == 8 * num_units(self.size_bytes, unit_bytes):
            expected = FileChecksums(self.size_bytes, unit_bytes, _little_endian(array("Q", content)))
            if expected.crc == self.crc:
                return expected
        raise DataError(
            f"{where}/{self.units_name} is damaged: its checksums do not combine to that of {self.name} in "
            f"{MANIFEST_NAME}, so nothing in that file can be trusted; delete the store, and build or copy it again"
        )


def units_content(checksums: FileChecksums) -> bytes:
    """Of the file at `units_name`."""
    return _little_endian(array("Q", checksums.unit_crcs)).tobytes()


class ShardFiles(Sequence[StoredFile]):
    """The files of a subset, in the order of the stream. One is made when it is asked for: there may be 17,000.

    tokens: in each.
    """

    def __init__(self, subset_name: str, shards: "Shards", token_bytes: int):
        self.tokens = shards.tokens
        self._subset_name, self._numbers, self._token_bytes = subset_name, shards.numbers, token_bytes
        self._crcs = list_from_text(shards.crc64nvme)

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> StoredFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredFile]: ...
    def __getitem__(self, index: int | slice) -> StoredFile | list[StoredFile]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        name = shard_name(self._subset_name, self._numbers[index])
        return StoredFile(name, self.tokens[index] * self._token_bytes, self._crcs[index])


class SmallFile(_JsonObject):
    """A file that a store has one of, however large it is."""

    # No shard's, and no path: a manifest fetched from elsewhere must not name files outside its folder.
    name: Annotated[str, Field(pattern=r"^[a-z][a-z-]{0,99}\.[a-z]{1,9}$")]
    size_bytes: Count
    crc64nvme: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{10}[AEIMQUYcgkosw048]=$")]

    @classmethod
    def of(cls, name: str, checksums: FileChecksums) -> Self:
        return cls(name=name, size_bytes=checksums.size, crc64nvme=to_text(checksums.crc))


class Shards(_JsonObject):
    """Files of little-endian token ids, in columns of one length, in the order of the stream.

    numbers: rising; a shard has that of the split of the source that it was made from, and a split without tokens has
    none. tokens: in each. crc64nvme: of each file, all in one text, as a checkpoint's manifest has those of units.
    """

    numbers: Annotated[list[Count], Field(min_length=1)]
    tokens: list[Positive]
    crc64nvme: str


class Subset(_JsonObject):
    """Training or held-out documents. The training tokens include one end-of-document token per document.

    utf8_bytes: of the text.
    """

    documents: Positive
    tokens: Positive
    utf8_bytes: Positive
    shards: Shards


class Lengths(_JsonObject):
    """Tokens of a training document, without the one that ends it. Each figure is at most 2 % too large."""

    least: Count
    p10: Count
    p50: Count
    p90: Count
    p99: Count
    most: Count


class Recipe(_JsonObject):
    """What a store was made from, and how; the tokenizer is in the manifest itself."""

    sources: Annotated[list[str], Field(min_length=1)]
    text_field: str
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)]
    # exact: of equal texts the first one in the order of the sources was kept.
    dedup: Literal["none", "exact"]
    # None: of texts, whose tokens are all labels, and which the end-of-document token ends.
    records: RecordsRecipe | None = None


class StoreManifest(_JsonObject):
    """`of` makes one, `parse` reads one: both give only what is consistent.

    crc64nvme: of all else in here. left_out: of the sources.
    """

    format_version: Literal[4]
    crc64nvme: str
    # What a run knows its data by: equal for stores of the same tokens and tokenizer, wherever they lie.
    identity: Sha256
    recipe: Recipe
    left_out: list[LeftOutGroup]
    tokenizer_sha256: Sha256
    vocab_size: Positive
    end_of_document_id: Count
    token_dtype: Literal["uint16", "uint32"]
    train: Subset
    heldout: Subset
    lengths: Lengths
    # Of whole tokens. The last unit of a file may be shorter.
    unit_bytes: Annotated[int, Field(ge=8, le=2**30, multiple_of=8)]
    small_files: list[SmallFile]

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """fields: all but the format, the checksum and the identity."""
        blank = cls(format_version=FORMAT_VERSION, crc64nvme="", identity="0" * 64, **fields)
        identified = blank.model_copy(update={"identity": blank._identity()})
        manifest = identified.model_copy(update={"crc64nvme": _crc(identified.model_dump())})
        assert (contradiction := manifest._contradiction()) is None, contradiction
        return manifest

    @classmethod
    def parse(cls, content: str | bytes, where: str) -> Self:
        """where: names the store in errors. Raises DataError for anything but a consistent manifest of this format."""
        damaged = f"{where}: {MANIFEST_NAME} is damaged"
        remedy = "delete the folder and build the store again"
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            # A ValueError is text that is not JSON, or not even UTF-8.
            raise DataError(f"{damaged}: not JSON ({error}); {remedy}") from error
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise DataError(
                f"{where}: the store has format {version}, this Raynium reads {FORMAT_VERSION}; "
                "upgrade Raynium, or give another data.path"
            )
        if type(version) is int and 1 <= version < FORMAT_VERSION:
            raise DataError(
                f"{where}: the store has format {version}, of an older Raynium, and this one reads {FORMAT_VERSION}; "
                f"{remedy} (a run that was trained on it needs the older one to go on: its data has another identity)"
            )
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise DataError(f"{damaged}: {problems}; {remedy}") from error
        if contradiction := manifest._contradiction():
            raise DataError(f"{damaged}: {contradiction}; {remedy}")
        if manifest.crc64nvme != _crc(fields):
            raise DataError(f"{damaged}: its crc64nvme does not match its contents; {remedy}")
        return manifest

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=2) + "\n").encode()

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the tokens in shards."""
        return shard_dtype(self.token_dtype)

    @property
    def flagged(self) -> bool:
        """Whether tokens have flags in their top bits, that say what is learned: see `records/flags.py`."""
        return self.recipe.records is not None

    @property
    def documents_per_record(self) -> int:
        """Neighbours in the stream, which are learned together where they are more than one."""
        return 1 if self.recipe.records is None else self.recipe.records.sequences

    @property
    def num_bytes(self) -> int:
        """Size of the files together."""
        return sum(file.size_bytes for file in self.files)

    @cached_property
    def train_shards(self) -> ShardFiles:
        return ShardFiles("train", self.train.shards, self.numpy_dtype.itemsize)

    @cached_property
    def heldout_shards(self) -> ShardFiles:
        return ShardFiles("heldout", self.heldout.shards, self.numpy_dtype.itemsize)

    @cached_property
    def files(self) -> list[StoredFile]:
        """All but the manifest, and those beside them that hold the checksums of their units."""
        small = [self.small_file(file.name) for file in self.small_files]
        return [*self.train_shards, *self.heldout_shards, *small]

    def small_file(self, name: str) -> StoredFile:
        [found] = [file for file in self.small_files if file.name == name]
        return StoredFile(found.name, found.size_bytes, from_text(found.crc64nvme))

    def _identity(self) -> str:
        """Of the two streams of tokens however they are cut, not of the held-out index: that holds sizes by zlib, whose
        builds differ.
        """
        streams = [_joined(files) for files in (self.train_shards, self.heldout_shards)]
        known_by = [self.tokenizer_sha256, self.vocab_size, self.end_of_document_id, self.token_dtype, *streams]
        if self.recipe.records is not None:
            known_by.append(self.recipe.records.model_dump())
        return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()

    def _contradiction(self) -> str | None:
        if len({file.name for file in self.small_files}) < len(self.small_files):
            return "two files have the same name"
        for subset_name, subset in (("train", self.train), ("heldout", self.heldout)):
            numbers, tokens = subset.shards.numbers, subset.shards.tokens
            try:
                crcs = list_from_text(subset.shards.crc64nvme)
            except ValueError as error:
                return f"{subset_name}.shards.crc64nvme: {error}"
            if not len(numbers) == len(tokens) == len(crcs):
                return f"the columns of {subset_name}.shards are {len(numbers)}, {len(tokens)} and {len(crcs)} long"
            if any(after <= before for before, after in pairwise(numbers)):
                return f"{subset_name}.shards.numbers do not rise"
            if sum(tokens) != subset.tokens:
                return f"{subset_name}.shards.tokens do not add up to {subset.tokens}"
        if self.vocab_size > 2 ** (8 * self.numpy_dtype.itemsize - (NUM_FLAGS if self.flagged else 0)):
            return f"vocab_size {self.vocab_size} does not fit token_dtype {self.token_dtype}"
        if self.end_of_document_id >= self.vocab_size:
            return f"end_of_document_id {self.end_of_document_id} is outside the vocabulary of {self.vocab_size}"
        return None


def shard_name(subset_name: str, number: int) -> str:
    return f"{subset_name}-{number:05d}.bin"


def _joined(files: Sequence[StoredFile]) -> tuple[int, int]:
    """Size and CRC64NVME of the files, one after the other."""
    crc = 0
    for file in files:
        crc = combine_crc64nvme(crc, file.crc, file.size_bytes)
    return sum(file.size_bytes for file in files), crc


def _crc(fields: dict[str, Any]) -> str:
    content = {name: value for name, value in fields.items() if name != "crc64nvme"}
    return to_text(checksum(json.dumps(content, sort_keys=True).encode()))


def _little_endian(numbers: "array[int]") -> "array[int]":
    """Changed in place, from or to this machine's order of bytes."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def shard_dtype(token_dtype: str) -> np.dtype[Any]:
    """numpy's type for tokens in shard files."""
    return np.dtype(token_dtype).newbyteorder("<")


def token_dtype_for(vocab_size: int, *, flagged: bool = False) -> Literal["uint16", "uint32"]:
    """The smallest token type that holds every id below `vocab_size`, and its flags. Raises DataError if none does."""
    flags = NUM_FLAGS if flagged else 0
    if vocab_size <= 2 ** (16 - flags):
        return "uint16"
    if vocab_size <= 2 ** (32 - flags):
        return "uint32"
    raise DataError(
        f"vocab_size {vocab_size}: token shards hold ids below {2 ** (32 - flags)}; use a smaller tokenizer"
    )
