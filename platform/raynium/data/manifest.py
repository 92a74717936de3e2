"""`manifest.json` of a document store: what the folder holds, and the proof that it is whole.

It is written last. A folder without a valid one is not a store. It holds nothing that differs between two builds of the
same documents (no dates, no host), so equal stores have equal manifests.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynium.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

Count = Annotated[int, Field(ge=0)]
# never a path: a manifest fetched from elsewhere must not name files outside its folder
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredFile(_Record):
    name: FileName
    size_bytes: Count
    crc64nvme: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Split(_Record):
    """Training or held-out documents. The training tokens include one end-of-document token per document."""

    documents: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    utf8_bytes: Annotated[int, Field(ge=1)]  # of the text
    shards: Annotated[list[FileName], Field(min_length=1)]  # little-endian token ids; the split is their concatenation


class Manifest(_Record):
    format_version: Literal[1]
    source: str
    heldout_fraction: Annotated[float, Field(ge=0, le=1)]
    skipped_undecodable: Count  # files or lines of the source that are no text
    skipped_empty: Count
    tokenizer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    vocab_size: Annotated[int, Field(ge=1)]
    end_of_document_id: Count
    token_dtype: Literal["uint16", "uint32"]
    train: Split
    heldout: Split
    files: list[StoredFile]  # all but the manifest

    @classmethod
    def parse(cls, content: str | bytes, where: str) -> Self:
        """where: names the store in errors. Raises DataError for anything but a consistent manifest of this format."""
        damaged = f"{where}: {MANIFEST_NAME} is damaged"
        remedy = "delete the folder and build the store again"
        try:
            fields = json.loads(content)
        except ValueError as error:  # not JSON, or not even UTF-8
            raise DataError(f"{damaged}: not JSON ({error}); {remedy}") from error
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise DataError(
                f"{where}: the store has format {version}, this Raynium reads up to {FORMAT_VERSION}; "
                "upgrade Raynium, or give another data.path"
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
    def train_sha256(self) -> str:
        """Equal for stores that give the same training samples, wherever they lie; a checkpoint can keep it."""
        shards = [file for file in self.files if file.name in self.train.shards]
        identity = [self.tokenizer_sha256, self.token_dtype, [(file.size_bytes, file.crc64nvme) for file in shards]]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _contradiction(self) -> str | None:
        sizes = {file.name: file.size_bytes for file in self.files}
        for split_name, split in (("train", self.train), ("heldout", self.heldout)):
            if unlisted := [shard for shard in split.shards if shard not in sizes]:
                return f"{split_name}.shards names {unlisted[0]!r}, which is not in files"
            if sum(sizes[shard] for shard in split.shards) != split.tokens * self.numpy_dtype.itemsize:
                return f"the sizes of {split_name}.shards do not add up to {split.tokens} tokens of {self.token_dtype}"
        if self.vocab_size > 2 ** (8 * self.numpy_dtype.itemsize):
            return f"vocab_size {self.vocab_size} does not fit token_dtype {self.token_dtype}"
        if self.end_of_document_id >= self.vocab_size:
            return f"end_of_document_id {self.end_of_document_id} is outside the vocabulary of {self.vocab_size}"
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
