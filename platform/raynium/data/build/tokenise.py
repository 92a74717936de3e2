"""One split of a source to its shards: a pure function, run on whichever node, as often as it takes.

The shards go straight to the store's place; the split's part (`building/parts/00012-<digest>.json`) is written last, so
that what a part says is there. Its digest is that of everything the tokens depend on.
"""

import base64
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from raynium.config.local_folders import temporary_parent
from raynium.data.build.dedup import duplicates_in
from raynium.data.build.lease import BUILDING
from raynium.data.build.lengths import LengthCounts
from raynium.data.build.recorded import learnable
from raynium.data.build.work import NumberedSplit, Work, ahead
from raynium.data.manifest import StoredFile, shard_dtype, shard_name, token_dtype_for, units_content
from raynium.data.records.flags import token_ids
from raynium.data.records.formats import RecordFormat
from raynium.data.store import HeldoutDocument
from raynium.data.text.documents import Document, Split, is_held_out, name_hash
from raynium.data.text.left_out import LeftOut, LeftOutGroup, Tally
from raynium.data.text.sources import read_split
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError
from raynium.storage.backend import KeyExists
from raynium.storage.checksum import FileChecksums, checksum, to_text
from raynium.storage.own_folder import temporary_folder
from raynium.storage.store import Store

PARTS = f"{BUILDING}/parts"
# So many are tokenised together; the library's results take about 100 bytes a token.
BATCH_CHARACTERS = 4_000_000
# Held-out documents of a split whose tokens are read back: all of them would cost as much as a tenth of their encoding.
CHECKED = 16


@dataclass(frozen=True)
class SplitSubset:
    """The training or the held-out documents of a split; crc: of their shard."""

    documents: int
    tokens: int
    utf8_bytes: int
    crc: int


@dataclass(frozen=True)
class Part:
    """What tokenising a split gave. heldout_documents: offsets are those in the split's own shard. least_hash: of the
    names of training documents.

    lengths: as `LengthCounts.pairs`. token_counts: as `packed_counts`. num_altered: of num_checked held-out documents
    those whose text the tokenizer does not give back.
    """

    train: SplitSubset
    heldout: SplitSubset
    heldout_documents: list[HeldoutDocument]
    least_hash: int
    lengths: list[tuple[int, int]]
    token_counts: str
    num_checked: int
    num_altered: int
    left_out: list[LeftOutGroup]

    def to_json(self) -> bytes:
        """With a checksum in front."""
        fields = asdict(self) | {"left_out": [group.model_dump() for group in self.left_out]}
        content = json.dumps(fields).encode()
        return to_text(checksum(content)).encode() + b"\n" + content

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        crc, _, content = text.partition(b"\n")
        if crc != to_text(checksum(content)).encode():
            raise DataError(f"{where} is damaged: its checksum is another; delete it, and start the build again")
        fields: dict[str, Any] = json.loads(content)
        fields["train"], fields["heldout"] = SplitSubset(**fields["train"]), SplitSubset(**fields["heldout"])
        fields["heldout_documents"] = [HeldoutDocument(*each) for each in fields["heldout_documents"]]
        fields["left_out"] = [LeftOutGroup(**group) for group in fields["left_out"]]
        return cls(**fields)


@dataclass(frozen=True)
class Done:
    """What one task has to say to people."""

    documents: int
    tokens: int
    source_bytes: int

    def plus(self, other: "Done") -> "Done":
        return Done(
            self.documents + other.documents, self.tokens + other.tokens, self.source_bytes + other.source_bytes
        )


def part_key(work: Work, numbered: NumberedSplit) -> str:
    return f"{PARTS}/{numbered.number:05d}-{work.digest(numbered.split)}.json"


def tokenise_split(work: Work, numbered: NumberedSplit) -> Done:
    """Writes the split's shards and its part. Raises DataError as `read_split`, StoreError."""
    store, tokenizer = work.store(), work.tokenizer()
    with temporary_folder("split", temporary_parent()) as folder:
        subsets = _Subsets(folder, tokenizer, work, numbered.split)
        # Filled by the thread that reads ahead.
        tally = Tally()
        with subsets:
            drop = duplicates_in(work, numbered) if work.recipe.dedup == "exact" else None
            for documents in ahead(_batches(numbered.split, tally, drop)):
                subsets.add(documents)
        crcs = {}
        for name in ("train", "heldout"):
            key, path = shard_name(name, numbered.number), folder / name
            crcs[name] = put_file(store, key, path, work.unit_bytes).crc if path.stat().st_size else 0
    for group in subsets.left_out.groups():
        tally.add(group)
    part = subsets.part(crcs, tally.groups())
    store.replace(part_key(work, numbered), part.to_json())
    return Done(
        part.train.documents + part.heldout.documents,
        part.train.tokens + part.heldout.tokens,
        numbered.split.num_bytes,
    )


def put_file(store: Store, key: str, path: Path, unit_bytes: int) -> FileChecksums:
    """The file, and beside it the checksums of its units, over what a task that died has left there."""
    try:
        checksums = store.upload_file(key, path, unit_bytes=unit_bytes)
    except KeyExists:
        store.delete(key)
        checksums = store.upload_file(key, path, unit_bytes=unit_bytes)
    store.replace(StoredFile(key, checksums.size, checksums.crc).units_name, units_content(checksums))
    return checksums


class _Subsets:
    """The tokens of a split's documents, in one file for each subset, and what there is to count."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, work: Work, split: Split):
        self._folder, self._tokenizer, self._heldout_fraction = folder, tokenizer, work.recipe.heldout_fraction
        self._format, self._split = work.format, split
        self._dtype = shard_dtype(token_dtype_for(tokenizer.vocab_size, flagged=work.format is not None))
        self._end = np.array([tokenizer.end_of_document_id])
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._lengths = LengthCounts()
        self._heldout: list[HeldoutDocument] = []
        self._num_train = self._train_tokens = self._train_bytes = self._heldout_tokens = 0
        self._least_hash = 2**64 - 1
        self._num_checked = self._num_altered = 0
        self.left_out = Tally()
        self._files = ExitStack()

    def __enter__(self) -> None:
        self._train_file = self._files.enter_context((self._folder / "train").open("wb"))
        self._heldout_file = self._files.enter_context((self._folder / "heldout").open("wb"))

    def __exit__(self, *_: object) -> None:
        with _writing(self._folder):
            self._files.close()

    def add(self, documents: list[Document]) -> None:
        """Raises DataError for a document that the tokenizer would end in the middle, and for a full folder."""
        if self._format is not None:
            self._add_records(self._format, documents)
            return
        train: list[np.ndarray] = [self._end[:0]]
        tokens_of_documents = self._tokenizer.encode_batch([document.text for document in documents])
        for document, tokens in zip(documents, tokens_of_documents, strict=True):
            if not len(tokens):
                self.left_out.add(LeftOut(document.name, "no tokens", len(document.text.encode())))
                continue
            if self._end[0] in tokens:
                raise DataError(
                    f"{document.name}: the tokenizer makes {self._tokenizer.end_of_document!r}, which ends a document, "
                    "of a part of its text: name another token to end documents with (end_of_document)"
                )
            if is_held_out(document.name, self._heldout_fraction):
                self._hold_out(document, tokens)
                continue
            self._least_hash = min(self._least_hash, name_hash(document.name))
            self._num_train += 1
            self._train_bytes += len(document.text.encode())
            self._lengths.add(len(tokens))
            train += [tokens, self._end]
        self._write_train(np.concatenate(train).astype(self._dtype))

    def _add_records(self, format: RecordFormat, documents: list[Document]) -> None:
        train: list[np.ndarray] = [np.empty(0, self._dtype)]
        for each in learnable(format, documents, self._split, self._tokenizer, self._dtype):
            if is_held_out(each.name, self._heldout_fraction):
                self._hold_out(Document(each.name, each.text), each.stored)
                continue
            self._least_hash = min(self._least_hash, name_hash(each.name))
            self._num_train += 1
            self._train_bytes += len(each.text.encode())
            self._lengths.add(len(each.stored))
            train.append(each.stored)
        self._write_train(np.concatenate(train))

    def _write_train(self, stream: np.ndarray) -> None:
        """stream: as it is stored."""
        with _writing(self._folder):
            self._train_file.write(stream.tobytes())
        self._train_tokens += len(stream)
        tokens = stream if self._format is None else token_ids(stream)
        self._counts += np.bincount(tokens, minlength=len(self._counts))

    def _hold_out(self, document: Document, tokens: np.ndarray) -> None:
        text = document.text.encode()
        zlib_bytes = len(zlib.compress(text, level=9))
        self._heldout.append(HeldoutDocument(document.name, self._heldout_tokens, len(tokens), len(text), zlib_bytes))
        with _writing(self._folder):
            self._heldout_file.write(tokens.astype(self._dtype).tobytes())
        self._heldout_tokens += len(tokens)
        # What records are judged by is no bits of their text.
        if self._num_checked < CHECKED and self._format is None:
            self._num_checked += 1
            self._num_altered += self._tokenizer.decode(tokens) != document.text

    def part(self, crcs: dict[str, int], left_out: list[LeftOutGroup]) -> Part:
        heldout_bytes = sum(document.utf8_bytes for document in self._heldout)
        return Part(
            train=SplitSubset(self._num_train, self._train_tokens, self._train_bytes, crcs["train"]),
            heldout=SplitSubset(len(self._heldout), self._heldout_tokens, heldout_bytes, crcs["heldout"]),
            heldout_documents=self._heldout,
            least_hash=self._least_hash,
            lengths=self._lengths.pairs(),
            token_counts=packed_counts(self._counts),
            num_checked=self._num_checked,
            num_altered=self._num_altered,
            left_out=left_out,
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises DataError where the disk is full."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the tokens of a split cannot be written to {folder}, where they lie until the store has them: "
            f"{error.strerror}. Free space there, or set TMPDIR to a folder that has more"
        ) from error


def packed_counts(counts: np.ndarray) -> str:
    """int64 [vocab_size], most of which are small."""
    return base64.b64encode(zlib.compress(counts.astype("<i8").tobytes(), level=1)).decode()


def unpacked_counts(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8")


def _batches(split: Split, tally: Tally, drop: np.ndarray | None) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_CHARACTERS. drop: numbers of those that are duplicates, rising."""
    dropped = set() if drop is None else set(drop.tolist())
    batch: list[Document] = []
    num_characters = number = 0
    for item in read_split(split):
        if isinstance(item, LeftOut):
            tally.add(item)
            continue
        number += 1
        if number - 1 in dropped:
            tally.add(LeftOut(item.name, "duplicate", len(item.text.encode())))
            continue
        batch.append(item)
        num_characters += len(item.text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
