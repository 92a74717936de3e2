"""The document store: a folder of token shards, the held-out documents, their tokenizer, and a manifest.

    train-00000.bin …       training documents, each followed by the end-of-document token: one long stream
    train-token-counts.bin  how often each token occurs in that stream, int64 [vocab_size]
    heldout-00000.bin …     held-out documents one after the other, nothing between
    heldout-documents.json  where each begins and ends, in the order of the hash of their names
    tokenizer.json
    manifest.json           written last: without it the folder is no store

`store_build.py` writes it; what is here reads it. Any number of processes may have one store open.
"""

import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raynium.data.manifest import MANIFEST_NAME, Manifest
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError
from raynium.storage.local_files import checksum

TOKENIZER_NAME = "tokenizer.json"
TOKEN_COUNTS_NAME = "train-token-counts.bin"
HELDOUT_INDEX_NAME = "heldout-documents.json"
TOKEN_COUNT_DTYPE = np.dtype("<i8")


class HeldoutDocument(NamedTuple):
    """One held-out document; its tokens are `[offset, offset + num_tokens)` of the held-out stream."""

    name: str
    offset: int
    num_tokens: int
    utf8_bytes: int  # of its text
    zlib_bytes: int  # of its text alone, compressed by zlib at level 9: a baseline


class TokenStream:
    """The tokens of memory-mapped shards as one long sequence."""

    def __init__(self, shards: list[np.ndarray]):
        """shards: token ids, each [tokens of the shard]"""
        # plain arrays over the same memory: slicing numpy's memmap class costs five times as much
        self._shards = [shard.view(np.ndarray) for shard in shards]
        self._begins = [0, *accumulate(len(shard) for shard in self._shards)]

    def __len__(self) -> int:
        return self._begins[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), in the shards' dtype; a view of the file unless they cross shards."""
        assert 0 <= start < start + length <= len(self)
        shard = bisect_right(self._begins, start) - 1
        begin = start - self._begins[shard]
        piece = self._shards[shard][begin : begin + length]
        if len(piece) == length:
            return piece
        return np.concatenate([piece, self.read(start + len(piece), length - len(piece))])

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[rows, length] in the shards' dtype: row r holds tokens [starts[r], starts[r] + length)."""
        if len(self._shards) == 1:
            # The shard seen as all its windows, [tokens - length + 1, length] over the same memory: one numpy call
            # copies every row, up to five times as fast as the loop below when rows are short.
            shard = self._shards[0]
            all_windows = np.ndarray(
                (len(shard) - length + 1, length), shard.dtype, buffer=shard, strides=2 * shard.strides
            )
            return all_windows[starts]
        rows = np.empty((len(starts), length), dtype=self._shards[0].dtype)
        for row, start in enumerate(starts.tolist()):
            rows[row] = self.read(start, length)
        return rows


@dataclass(frozen=True)
class DocumentStore:
    """An open store; `open_store` makes one."""

    path: Path
    manifest: Manifest

    def train_stream(self) -> TokenStream:
        """All training tokens, in the order of the source."""
        return self._map_shards(self.manifest.train.shards)

    def heldout_stream(self) -> TokenStream:
        return self._map_shards(self.manifest.heldout.shards)

    def heldout_documents(self, max_documents: int | None = None) -> list[HeldoutDocument]:
        """The held-out documents by hash of name, or the first `max_documents` of them."""
        try:
            documents = json.loads((self.path / HELDOUT_INDEX_NAME).read_bytes())
            return [HeldoutDocument(**document) for document in documents[:max_documents]]
        except (ValueError, TypeError) as error:
            raise self._damage([f"{HELDOUT_INDEX_NAME} ({error})"]) from error

    def train_token_counts(self) -> np.ndarray:
        """int64 [vocab_size]: occurrences in the training stream."""
        return np.fromfile(self.path / TOKEN_COUNTS_NAME, dtype=TOKEN_COUNT_DTYPE).astype(np.int64)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / TOKENIZER_NAME)

    def verify(self) -> None:
        """Read every file and compare checksums. Raises DataError that names all damaged files."""
        damaged = []
        for file in self.manifest.files:
            path = self.path / file.name
            if not path.is_file() or checksum(path) != file.crc64nvme:
                damaged.append(file.name)
        if damaged:
            raise self._damage(damaged)

    def check_fits(self, *, model_vocab_size: int, tokenizer_path: str | None) -> None:
        """Raises DataError if the model's vocabulary is too small, or the config names another tokenizer."""
        if tokenizer_path is not None:
            wanted = Tokenizer.load(tokenizer_path).sha256
            if wanted != self.manifest.tokenizer_sha256:
                raise DataError(
                    f"document store {self.path} was tokenised with another tokenizer (sha256 "
                    f"{self.manifest.tokenizer_sha256}) than data.tokenizer = {tokenizer_path!r} (sha256 {wanted}); "
                    "remove data.tokenizer to use the store's own, or give another data.path to build a new store"
                )
        refuse_small_vocabulary(model_vocab_size, self.manifest.vocab_size, f"document store {self.path}")

    def check_recipe(self, *, source: str, heldout_fraction: float) -> None:
        """Raises DataError if the store was built from something else than the config asks for now."""
        for name, built_with, asked_for in (
            ("source", self.manifest.source, source),
            ("heldout_fraction", self.manifest.heldout_fraction, heldout_fraction),
        ):
            if built_with != asked_for:
                raise DataError(
                    f"document store {self.path} was built with data.{name} = {built_with!r}, the config says "
                    f"{asked_for!r}; set it back, give another data.path, or delete the folder to build it anew"
                )

    def check_sizes(self) -> None:
        """Raises DataError that names every file that is missing or of another size than the manifest says."""
        damaged = []
        for file in self.manifest.files:
            path = self.path / file.name
            size_bytes = path.stat().st_size if path.is_file() else None
            if size_bytes != file.size_bytes:
                found = "missing" if size_bytes is None else f"{size_bytes} bytes"
                damaged.append(f"{file.name} ({found}, expected {file.size_bytes} bytes)")
        if damaged:
            raise self._damage(damaged)

    def _damage(self, damaged: list[str]) -> DataError:
        return DataError(
            f"document store {self.path} is damaged: {', '.join(damaged)}; "
            "delete the folder and build or copy the store again"
        )

    def _map_shards(self, names: list[str]) -> TokenStream:
        dtype = self.manifest.numpy_dtype
        return TokenStream([np.memmap(self.path / name, dtype=dtype, mode="r") for name in names])


def open_store(path: str | Path) -> DocumentStore:
    """Open a store in a local folder, checking that each file is there in its right size (contents: `verify()`).

    Raises DataError if the folder is no store, is damaged, or was written by a newer Raynium.
    """
    path = Path(path)
    try:
        content = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"data.path = {str(path)!r} is no document store: it has no {MANIFEST_NAME}; "
            "set data.source to build one there, or give the path of a finished store"
        ) from error
    store = DocumentStore(path, Manifest.parse(content, f"document store {path}"))
    store.check_sizes()
    return store


def refuse_small_vocabulary(model_vocab_size: int, vocab_size: int, holder: str) -> None:
    """Raises DataError if the model lacks tokens that `holder` has; spare ones do no harm."""
    if model_vocab_size < vocab_size:
        raise DataError(
            f"model.vocab_size = {model_vocab_size}: {holder} has token ids up to {vocab_size - 1}; "
            f"set model.vocab_size to {vocab_size} or more"
        )
