"""`manifest.json` of a document store: what the folder holds, and the proof that it is whole.

It is written last. A folder without a valid one is not a store. It holds nothing that differs between two builds of the
same documents (no dates, no host), so equal stores have equal manifests.
"""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynium.data.text.left_out import LeftOutGroup
from raynium.errors import DataError
from raynium.storage.checksum import FileChecksums, checksum, list_to_text, to_text

MANIFEST_NAME = "manifest.json"
# Format 1 had no checksum per unit, format 2 did not say what was left out.
FORMAT_VERSION = 3

Count = Annotated[int, Field(ge=0, lt=2**60)]
Positive = Annotated[int, Field(ge=1, lt=2**60)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# never a path: a manifest fetched from elsewhere must not name files outside its folder
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,99}$")]


class _JsonObject(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredFile(_JsonObject):
    name: FileName
    size_bytes: Count
    # Of all units in one text, as in a checkpoint's manifest.
    unit_crc64nvme: str

    @classmethod
    def of(cls, name: str, checksums: FileChecksums) -> Self:
        return cls(name=name, size_bytes=checksums.size, unit_crc64nvme=list_to_text(checksums.unit_crcs))


class Split(_JsonObject):
    """Training or held-out documents. The training tokens include one end-of-document token per document.

    utf8_bytes: of the text. shards: files of little-endian token ids; the split is their concatenation.
    """

    documents: Positive
    tokens: Positive
    utf8_bytes: Positive
    shards: Annotated[list[FileName], Field(min_length=1)]


class StoreManifest(_JsonObject):
    """`of` makes one, `parse` reads one: both give only what is consistent.

    crc64nvme: of all else in here. left_out: of the source. files: all but the manifest.
    """

    format_version: Literal[3]
    crc64nvme: str
    # What a run knows its data by: equal for stores of the same tokens and tokenizer, wherever they lie.
    identity: Sha256
    source: str
    heldout_fraction: Annotated[float, Field(ge=0, le=1)]
    left_out: list[LeftOutGroup]
    tokenizer_sha256: Sha256
    vocab_size: Positive
    end_of_document_id: Count
    token_dtype: Literal["uint16", "uint32"]
    train: Split
    heldout: Split
    # Of whole tokens. The last unit of a file may be shorter.
    unit_bytes: Annotated[int, Field(ge=8, le=2**30, multiple_of=8)]
    files: list[StoredFile]

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """fields: all but the format, the checksum and the identity."""
        blank = cls(format_version=FORMAT_VERSION, crc64nvme="", identity="0" * 64, **fields)
        identified = blank.model_copy(update={"identity": blank._identity()})
        manifest = identified.model_copy(update={"crc64nvme": identified._crc()})
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
                f"{remedy} (from the same text: runs go on with it, unless a file of it begins with a byte order mark)"
            )
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise DataError(f"{damaged}: {problems}; {remedy}") from error
        if contradiction := manifest._contradiction():
            raise DataError(f"{damaged}: {contradiction}; {remedy}")
        return manifest

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=2) + "\n").encode()

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the tokens in shards."""
        return shard_dtype(self.token_dtype)

    @property
    def num_bytes(self) -> int:
        """Size of the files together."""
        return sum(file.size_bytes for file in self.files)

    @cached_property
    def checksums(self) -> dict[str, FileChecksums]:
        """By file name."""
        return {
            file.name: FileChecksums.from_text(file.size_bytes, self.unit_bytes, file.unit_crc64nvme)
            for file in self.files
        }

    def _crc(self) -> str:
        content = self.model_dump(exclude={"crc64nvme"})
        return to_text(checksum(json.dumps(content, sort_keys=True).encode()))

    def _identity(self) -> str:
        """Checksums of tokens, not of the held-out index: that holds sizes by zlib, whose builds differ."""
        shards = [
            [(self.checksums[name].size, self.checksums[name].crc) for name in split.shards]
            for split in (self.train, self.heldout)
        ]
        known_by = [self.tokenizer_sha256, self.vocab_size, self.end_of_document_id, self.token_dtype, *shards]
        return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()

    def _contradiction(self) -> str | None:
        try:
            sizes = {name: checksums.size for name, checksums in self.checksums.items()}
        except ValueError as error:
            return f"files: {error}"
        if len(sizes) < len(self.files):
            return "files: two have the same name"
        for split_name, split in (("train", self.train), ("heldout", self.heldout)):
            if unlisted := [shard for shard in split.shards if shard not in sizes]:
                return f"{split_name}.shards names {unlisted[0]!r}, which is not in files"
            if odd := [name for name in split.shards if not sizes[name] or sizes[name] % self.numpy_dtype.itemsize]:
                return f"{split_name}.shards names {odd[0]!r} of {sizes[odd[0]]} bytes, which are not whole tokens"
            if sum(sizes[shard] for shard in split.shards) != split.tokens * self.numpy_dtype.itemsize:
                return f"the sizes of {split_name}.shards do not add up to {split.tokens} tokens of {self.token_dtype}"
        if self.vocab_size > 2 ** (8 * self.numpy_dtype.itemsize):
            return f"vocab_size {self.vocab_size} does not fit token_dtype {self.token_dtype}"
        if self.end_of_document_id >= self.vocab_size:
            return f"end_of_document_id {self.end_of_document_id} is outside the vocabulary of {self.vocab_size}"
        if self.crc64nvme != self._crc():
            return "its crc64nvme does not match its contents"
        if self.identity != self._identity():
            return "its identity is not that of its tokenizer and shards"
        return None


def shard_dtype(token_dtype: str) -> np.dtype[Any]:
    """numpy's type for tokens in shard files."""
    return np.dtype(token_dtype).newbyteorder("<")


def token_dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest token type that holds every id below `vocab_size`. Raises DataError if none does."""
    if vocab_size <= 2**16:
        return "uint16"
    if vocab_size <= 2**32:
        return "uint32"
    raise DataError(f"vocab_size {vocab_size}: token shards hold ids below {2**32}; use a smaller tokenizer")
