"""The document store: a folder of token shards, the held-out documents, their tokenizer, and a manifest.

    train-00000.bin …       training documents, each followed by the end-of-document token: one long stream
    train-token-counts.bin  how often each token occurs in that stream, int64 [vocab_size]
    heldout-00000.bin …     held-out documents one after the other, nothing between
    heldout-documents.json  where each begins and ends, in the order of the hash of their names
    tokenizer.json
    chat-template.json      of a store of chats
    *.crc                   beside each of these files: the checksums of its units
    manifest.json           written last: without it the folder is no store

`build/` writes it; what is here reads it, and compares each unit (256 KiB) of a file with its checksum before its first
use. Opening one maps no file: a shard is opened when something of it is first read. Any number of processes may have
one store open.
"""

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raynium.config.plain_file import read_plain
from raynium.data.manifest import MANIFEST_NAME, StoreManifest
from raynium.data.records.template import OWN_NAME, ChatTemplate
from raynium.data.tokenizer import TOKENIZER_NAME, Tokenizer
from raynium.data.tokens import (
    Shards,
    Tokens,
    TokenStream,
    check_unit,
    mapped_file,
    size_in_words,
    unit_checksums,
)
from raynium.errors import DataError

TOKEN_COUNTS_NAME = "train-token-counts.bin"
HELDOUT_INDEX_NAME = "heldout-documents.json"
MAX_MANIFEST_BYTES = 2**30
TOKEN_COUNT_DTYPE = np.dtype("<i8")


class HeldoutDocument(NamedTuple):
    """One held-out document; its tokens are `[offset, offset + num_tokens)` of the held-out stream.

    utf8_bytes: of its text. zlib_bytes: of its text alone, compressed by zlib at level 9, as a baseline.
    """

    name: str
    offset: int
    num_tokens: int
    utf8_bytes: int
    zlib_bytes: int


class OpenStore(ABC):
    """A store that can be read, wherever its files lie. `place`: of it, for people."""

    manifest: StoreManifest

    @property
    @abstractmethod
    def place(self) -> str: ...

    @abstractmethod
    def train_stream(self) -> Tokens:
        """All training tokens, in the order of the source."""

    @abstractmethod
    def heldout_stream(self) -> Tokens: ...

    @abstractmethod
    def read_file(self, name: str) -> bytes:
        """A file's whole content, verified."""

    def heldout_documents(self, max_documents: int | None = None) -> list[HeldoutDocument]:
        """The held-out documents by hash of name, or the first `max_documents` of them. DataError for damage."""
        documents = json.loads(self.read_file(HELDOUT_INDEX_NAME))
        return [HeldoutDocument(**document) for document in documents[:max_documents]]

    def train_token_counts(self) -> np.ndarray:
        """int64 [vocab_size]: occurrences in the training stream. DataError for damage."""
        return np.frombuffer(self.read_file(TOKEN_COUNTS_NAME), dtype=TOKEN_COUNT_DTYPE).astype(np.int64)

    def chat_template(self) -> ChatTemplate | None:
        """That its chats were rendered with; None for a store of something else."""
        if all(file.name != OWN_NAME for file in self.manifest.files):
            return None
        return ChatTemplate.load(lambda name: self.read_file(name) if name == OWN_NAME else None, self.place)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(
            self.read_file(TOKENIZER_NAME).decode(),
            f"{self.place}/{TOKENIZER_NAME}",
            end_of_document=self.manifest.end_of_document_id,
        )


@dataclass(frozen=True)
class DocumentStore(OpenStore):
    """A store in a folder; `open_store` opens one."""

    path: Path
    manifest: StoreManifest

    @property
    def place(self) -> str:
        return str(self.path)

    def train_stream(self) -> TokenStream:
        return TokenStream(self._train_shards, self.manifest.train_shards.tokens)

    def heldout_stream(self) -> TokenStream:
        return TokenStream(self._heldout_shards, self.manifest.heldout_shards.tokens)

    def read_file(self, name: str) -> bytes:
        file = self.manifest.small_file(name)
        content, expected = mapped_file(self.path, file), unit_checksums(self.path, file, self.manifest.unit_bytes)
        for unit in range(len(expected.unit_crcs)):
            check_unit(self.path / name, content, expected, unit)
        return bytes(content)

    def check_sizes(self) -> None:
        """Raises DataError that names every file that is missing or of another size than the manifest says."""
        damaged = []
        for file in self.manifest.files:
            try:
                size_bytes = os.stat(f"{self.path}/{file.name}").st_size
            except (FileNotFoundError, NotADirectoryError):
                size_bytes = None
            if size_bytes != file.size_bytes:
                damaged.append(f"{file.name} ({size_in_words(size_bytes, file.size_bytes)})")
        if damaged:
            raise DataError(
                f"document store {self.path} is damaged: {', '.join(damaged)}; "
                "delete the folder and build or copy the store again"
            )

    # All streams share the shards, so that each unit is verified once.

    @cached_property
    def _train_shards(self) -> Shards:
        return Shards(self.path, self.manifest.train_shards, self.manifest)

    @cached_property
    def _heldout_shards(self) -> Shards:
        return Shards(self.path, self.manifest.heldout_shards, self.manifest)


def open_store(path: str | Path, *, identity: str | None = None) -> DocumentStore:
    """Open a store in a local folder by its manifest. Its files, and what is in them, are checked when they are read:
    `check_sizes` looks at all of them. identity: that the store must have (`StoreManifest.identity`).

    Raises DataError if the folder is no store, another one, or was written by another format.
    """
    path = Path(path)
    manifest = local_manifest(path)
    if manifest is None:
        raise no_store(path)
    refuse_other_data(manifest, identity, where=str(path))
    return DocumentStore(path, manifest)


def local_manifest(path: Path) -> StoreManifest | None:
    """None if the folder holds no store."""
    try:
        content = read_plain(path / MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"data.path = {str(path)!r}: {MANIFEST_NAME} cannot be read: {error.strerror}; give another data.path"
        ) from error
    return StoreManifest.parse(content, f"document store {path}")


def no_store(place: str | Path, *, in_mixture: bool = False) -> DataError:
    named, remedy = (
        ("data.mixture's store", "build it with `raynium data build`")
        if in_mixture
        else ("data.path =", "set data.source to build one there")
    )
    return DataError(
        f"{named} {str(place)!r} is no document store: it has no {MANIFEST_NAME}; "
        f"{remedy}, or give the path or URL of a finished store"
    )


def refuse_other_data(manifest: StoreManifest, identity: str | None, *, where: str) -> None:
    """Raises DataError unless the store has this identity; None: any will do."""
    if identity not in (None, manifest.identity):
        raise DataError(
            f"document store {where} holds other data (identity {manifest.identity}) than data.identity = {identity!r} "
            "says; give a data.path with that data, or leave out data.identity to take what is there"
        )
