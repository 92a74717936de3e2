"""Text to document store: split, train the tokenizer, tokenise, write shards, and last the manifest.

One process needs to call it; more may, on any nodes that share the folder: one builds, the others wait and use it.
"""

import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raynium.data.build.survey import Progress, Survey, Tell, survey
from raynium.data.lengths import LengthCounts
from raynium.data.manifest import (
    MANIFEST_NAME,
    Recipe,
    Shards,
    SmallFile,
    StoreManifest,
    Subset,
    shard_dtype,
    token_dtype_for,
    units_content,
)
from raynium.data.store import (
    HELDOUT_INDEX_NAME,
    TOKEN_COUNT_DTYPE,
    TOKEN_COUNTS_NAME,
    TOKENIZER_NAME,
    DocumentStore,
    HeldoutDocument,
    open_store,
    refuse_other_recipe,
    refuse_other_tokenizer,
    refuse_small_vocabulary,
)
from raynium.data.text.documents import Document, Item, is_held_out, name_hash
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError
from raynium.storage.checksum import UNIT_BYTES, FileChecksums, list_to_text
from raynium.storage.local_files import exclusive, file_checksums, write_atomically

logger = logging.getLogger(__name__)

LOCK_NAME = ".build.lock"
# BPE on 8 MB of the standard library takes 2 s on two cores and costs 1 % more tokens than on all 30 MB (5 s)
TOKENIZER_SAMPLE_BYTES = 8_000_000
# So many are tokenised together; the library's results take about 100 bytes a token.
BATCH_CHARACTERS = 4_000_000
# 512 MB of uint16: a few S3 parts, and quick to fetch again.
SHARD_TOKENS = 2**28


def build_store(
    path: str | Path,
    *,
    source: str,
    vocab_size: int,
    tokenizer_path: str | None = None,
    end_of_document: str | None = None,
    heldout_fraction: float = 0.05,
    max_left_out: float = 0.1,
    surveyed: Survey | None = None,
    tell: Tell = logger.info,
    shard_tokens: int = SHARD_TOKENS,
    tokenizer_sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    unit_bytes: int = UNIT_BYTES,
) -> DocumentStore:
    """Build the store in the local folder `path`, or open the one that is there.

    source: see `sources.open_source`. max_left_out: see `survey`; surveyed: what that gave, if it was called already.
    tokenizer_path: a tokenizer.json to use; None trains one of `vocab_size` tokens on training documents, taken in the
    order of a hash of their names until `tokenizer_sample_bytes` are reached. end_of_document: the token of the former
    that ends a document; None: see `Tokenizer.load`. tell: gets a line before what takes long, and every ten seconds.
    shard_tokens: most tokens of one shard file. unit_bytes: that have a checksum of their own, a multiple of 8.

    A crash at any point leaves no store, and the next call builds it. Raises DataError for unusable text or tokenizer,
    a store there that was built from something else, and a folder that cannot be written.
    """
    path = Path(path)
    finished = path / MANIFEST_NAME
    try:
        # A store on a read-only disk needs no lock. Looked at again under the lock: another process may be faster.
        if not finished.exists():
            with exclusive(path / LOCK_NAME, f"document store {path}"):
                if not finished.exists():
                    found = surveyed or survey(
                        source, heldout_fraction=heldout_fraction, max_left_out=max_left_out, tell=tell
                    )
                    recipe = _Recipe(source, found, heldout_fraction, shard_tokens, unit_bytes, tell)
                    tokenizer = _tokenizer(recipe, vocab_size, tokenizer_path, end_of_document, tokenizer_sample_bytes)
                    manifest = _build(path, recipe, tokenizer)
                    # Dying before this line leaves a folder that is no store; after it, a whole one.
                    write_atomically(finished, manifest.to_json())
    except OSError as error:
        raise DataError(
            f"document store {path} cannot be built: {error}; "
            "check permissions and free space, or set another data.path"
        ) from error
    store = open_store(path)
    refuse_other_recipe(store.manifest, source=source, heldout_fraction=heldout_fraction, where=str(path))
    refuse_other_tokenizer(
        store.manifest,
        model_vocab_size=vocab_size,
        path=tokenizer_path,
        end_of_document=end_of_document,
        where=str(path),
    )
    return store


@dataclass(frozen=True)
class _Recipe:
    """What goes into a store, beside the tokenizer."""

    source: str
    surveyed: Survey
    heldout_fraction: float
    shard_tokens: int
    unit_bytes: int
    tell: Tell


def _tokenizer(
    recipe: _Recipe, vocab_size: int, path: str | None, end_of_document: str | None, sample_bytes: int
) -> Tokenizer:
    if path is not None:
        tokenizer = Tokenizer.load(path, end_of_document=end_of_document)
        refuse_small_vocabulary(vocab_size, tokenizer.vocab_size, f"tokenizer {path!r}")
        return tokenizer
    sample = recipe.surveyed.tokenizer_sample(sample_bytes)
    taken_bytes = sum(recipe.surveyed.train_bytes[name] for name in sample)
    recipe.tell(f"data: a tokenizer of {vocab_size:,} tokens learns from {taken_bytes / 1e6:.1f} MB")
    texts = (document.text for document in _documents(recipe.surveyed.source.items()) if document.name in sample)
    return Tokenizer.train(texts, vocab_size=vocab_size)


def _build(folder: Path, recipe: _Recipe, tokenizer: Tokenizer) -> StoreManifest:
    """All but the manifest, which is returned. The caller holds the lock."""
    started = time.monotonic()
    # A build that died may have cut more shards than this one will.
    for stale in [*folder.glob("train-?????.*"), *folder.glob("heldout-?????.*")]:
        stale.unlink()
    manifest = _write_files(folder, recipe, tokenizer)
    logger.info(
        "built document store %s in %.1f s: %d + %d held-out documents, %d training tokens, %.2f bytes per token",
        folder,
        time.monotonic() - started,
        manifest.train.documents,
        manifest.heldout.documents,
        manifest.train.tokens,
        manifest.train.utf8_bytes / manifest.train.tokens,
    )
    return manifest


class _ShardWriter:
    """Cuts one split's tokens into shard files; `close` makes them durable."""

    def __init__(self, folder: Path, split_name: str, dtype: np.dtype[Any], shard_tokens: int):
        self.names: list[str] = []
        self.num_tokens = 0
        self._folder, self._split_name, self._dtype, self._shard_tokens = folder, split_name, dtype, shard_tokens
        self._file: BinaryIO | None = None

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens) > 0:
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            if self._file is None or room == self._shard_tokens:
                self.close()
                self.names.append(f"{self._split_name}-{len(self.names):05d}.bin")
                self._file = (self._folder / self.names[-1]).open("wb")
            self._file.write(tokens[:room].astype(self._dtype).tobytes())
            self.num_tokens += len(tokens[:room])
            tokens = tokens[room:]

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())


@dataclass(frozen=True)
class _Tokenised:
    """What tokenising wrote and counted.

    heldout_documents: in the order of their tokens. train_token_counts: int64 [vocab_size].
    """

    train: list[str]
    heldout: list[str]
    # Documents, and bytes of their text.
    train_text: tuple[int, int]
    lengths: LengthCounts
    heldout_documents: list[HeldoutDocument]
    train_token_counts: np.ndarray


def _write_files(folder: Path, recipe: _Recipe, tokenizer: Tokenizer) -> StoreManifest:
    """Tokenise all documents and write every file but the manifest, which is returned."""
    token_dtype = token_dtype_for(tokenizer.vocab_size)
    tokenised = _tokenise(folder, recipe, tokenizer, shard_dtype(token_dtype))
    by_hash = sorted(tokenised.heldout_documents, key=lambda document: name_hash(document.name))
    index = json.dumps([document._asdict() for document in by_hash], indent=0)
    write_atomically(folder / HELDOUT_INDEX_NAME, index.encode())
    write_atomically(folder / TOKEN_COUNTS_NAME, tokenised.train_token_counts.astype(TOKEN_COUNT_DTYPE).tobytes())
    write_atomically(folder / TOKENIZER_NAME, tokenizer.file_text.encode())
    files = {
        name: _with_units(folder, name, recipe.unit_bytes)
        for name in [*tokenised.train, *tokenised.heldout, HELDOUT_INDEX_NAME, TOKEN_COUNTS_NAME, TOKENIZER_NAME]
    }
    token_bytes = shard_dtype(token_dtype).itemsize
    num_train_documents, train_bytes = tokenised.train_text
    return StoreManifest.of(
        recipe=Recipe(
            sources=[recipe.source], text_field="text", heldout_fraction=recipe.heldout_fraction, dedup="none"
        ),
        left_out=recipe.surveyed.left_out,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document_id=tokenizer.end_of_document_id,
        token_dtype=token_dtype,
        train=_subset([files[name] for name in tokenised.train], token_bytes, num_train_documents, train_bytes),
        heldout=_subset(
            [files[name] for name in tokenised.heldout],
            token_bytes,
            len(by_hash),
            sum(document.utf8_bytes for document in by_hash),
        ),
        lengths=tokenised.lengths.quantiles(),
        unit_bytes=recipe.unit_bytes,
        small_files=[
            SmallFile.of(name, files[name]) for name in (HELDOUT_INDEX_NAME, TOKEN_COUNTS_NAME, TOKENIZER_NAME)
        ],
    )


def _with_units(folder: Path, name: str, unit_bytes: int) -> FileChecksums:
    checksums = file_checksums(folder / name, unit_bytes)
    write_atomically((folder / name).with_suffix(".crc"), units_content(checksums))
    return checksums


def _subset(files: list[FileChecksums], token_bytes: int, documents: int, utf8_bytes: int) -> Subset:
    tokens = [file.size // token_bytes for file in files]
    shards = Shards(
        numbers=list(range(len(files))), tokens=tokens, crc64nvme=list_to_text([file.crc for file in files])
    )
    return Subset(documents=documents, tokens=sum(tokens), utf8_bytes=utf8_bytes, shards=shards)


def _tokenise(folder: Path, recipe: _Recipe, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> _Tokenised:
    """Write all shards."""
    total_bytes = recipe.surveyed.num_train_bytes
    end_of_document = np.array([tokenizer.end_of_document_id])
    token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    progress, lengths = Progress(recipe.tell), LengthCounts()
    num_train_documents = train_bytes = num_altered = 0
    heldout_documents: list[HeldoutDocument] = []
    with (
        closing(_ShardWriter(folder, "train", dtype, recipe.shard_tokens)) as train_writer,
        closing(_ShardWriter(folder, "heldout", dtype, recipe.shard_tokens)) as heldout_writer,
    ):
        for documents in _batched(_documents(recipe.surveyed.source.items())):
            tokens_of_documents = tokenizer.encode_batch([document.text for document in documents])
            train_tokens: list[np.ndarray] = []
            for document, tokens in zip(documents, tokens_of_documents, strict=True):
                if is_held_out(document.name, recipe.heldout_fraction):
                    heldout_documents.append(_heldout_document(document, len(tokens), heldout_writer.num_tokens))
                    heldout_writer.append(tokens)
                    num_altered += tokenizer.decode(tokens) != document.text
                else:
                    num_train_documents += 1
                    train_bytes += len(document.text.encode())
                    lengths.add(len(tokens))
                    train_tokens += [tokens, end_of_document]
            # The empty slice is for a batch that holds held-out documents only.
            stream = np.concatenate([*train_tokens, end_of_document[:0]])
            train_writer.append(stream)
            token_counts += np.bincount(stream, minlength=tokenizer.vocab_size)
            progress(f"data: {train_bytes / 1e6:,.0f} MB of {total_bytes / 1e6:,.0f} MB tokenised")
    if num_altered:
        logger.warning(
            "the tokenizer does not give back the text of %d of %d held-out documents: bits per byte is approximate",
            num_altered,
            len(heldout_documents),
        )
    return _Tokenised(
        train=train_writer.names,
        heldout=heldout_writer.names,
        train_text=(num_train_documents, train_bytes),
        lengths=lengths,
        heldout_documents=heldout_documents,
        train_token_counts=token_counts,
    )


def _heldout_document(document: Document, num_tokens: int, offset: int) -> HeldoutDocument:
    utf8_text = document.text.encode()
    return HeldoutDocument(
        name=document.name,
        offset=offset,
        num_tokens=num_tokens,
        utf8_bytes=len(utf8_text),
        zlib_bytes=len(zlib.compress(utf8_text, level=9)),
    )


def _documents(items: Iterable[Item]) -> Iterator[Document]:
    return (item for item in items if isinstance(item, Document))


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_CHARACTERS."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
