"""The index that says which documents lie in a row of a store.

    packed/<key>/part-00000.bin …  a `PackedPart` each: see `part_content`
    packed/<key>/index.json        written last: without it the folder is no index

The key is of the data's identity, the row's length, the policy and the packer, so an index is never an older store's.
It lies beside the store, or where that place cannot be written in the run's own. It is a pure function of the store:
whoever makes a part, and however often, writes the same bytes. In a folder it is mapped where it lies; from S3 a part
is copied to the node's disk when it is first used.
"""

import contextlib
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynium.config.local_folders import scratch_folder
from raynium.config.schema import DataSection
from raynium.data.packing.packer import PACKER_VERSION, PackedPart, TooLong
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import checksum, list_from_text, list_to_text, to_text
from raynium.storage.local_files import exclusive, mapped, write_atomically
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
# Parts that are copied at once: they hide S3's latency.
COPIES = 8
_MAX_INDEX_BYTES = 2**30
_INDEX_DTYPE = np.dtype("<i8")

Count = Annotated[int, Field(ge=0, lt=2**60)]


class PartFacts(NamedTuple):
    """What the index keeps of a part. crc: of its file. The first ones are at the beginning of that, in this order."""

    rows: int
    pieces: int
    documents: int
    split: int
    left_out: int
    left_out_tokens: int
    cut: int
    cut_tokens: int
    unlearned: int
    unlearned_tokens: int
    shortest: int
    longest: int
    filled: int
    crc: int


_NUM_FACTS = len(PartFacts._fields) - 1
# What became of the documents: of a part, and in sum of an index.
_COUNTS = ("documents", "split", "left_out", "left_out_tokens", "cut", "cut_tokens", "unlearned", "unlearned_tokens")


def part_content(part: PackedPart) -> tuple[bytes, PartFacts]:
    """The file of a part, int64: its facts, row_begins, pieces; and last the CRC64NVME of all that."""
    counts = {name: value for name, value in part._asdict().items() if name not in ("row_begins", "pieces")}
    sizes = {"rows": len(part.row_begins) - 1, "pieces": len(part.pieces), "filled": int(part.pieces[:, 1].sum())}
    facts = PartFacts(**sizes, **counts, crc=0)
    arrays = (np.array(facts[:_NUM_FACTS]), part.row_begins, part.pieces)
    content = b"".join(each.astype(_INDEX_DTYPE).tobytes() for each in arrays)
    facts = facts._replace(crc=checksum(content))
    return content + facts.crc.to_bytes(8, "little"), facts


def part_facts(content: bytes) -> PartFacts | None:
    """Of a part's file that was found; None unless it is whole."""
    crc = int.from_bytes(content[-8:], "little")
    if len(content) < 8 * _NUM_FACTS + 8 or checksum(memoryview(content)[:-8]) != crc:
        return None
    facts = np.frombuffer(content, _INDEX_DTYPE, _NUM_FACTS).tolist()
    return PartFacts(**dict(zip(PartFacts._fields, [*facts, crc], strict=True)))


def part_name(number: int) -> str:
    return f"part-{number:05d}.bin"


def index_key(identity: str, data: DataSection) -> str:
    known_by = [identity, data.seq_len, data.too_long, PACKER_VERSION]
    return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:16]


class PackedIndex(BaseModel):
    """`index.json`. rows, pieces: of each part; crc64nvme_of_parts: of their files, all in one text.

    documents: that are in rows, of them `split` in several, or `cut` to one; filled: positions of rows that hold a
    token of a document, which of a flagged store need not be a label. unlearned: see `PackedPart`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    crc64nvme: str
    identity: str
    seq_len: Count
    too_long: TooLong
    packer_version: Count
    rows: list[Count]
    pieces: list[Count]
    crc64nvme_of_parts: str
    documents: Count
    split: Count
    left_out: Count
    left_out_tokens: Count
    cut: Count
    cut_tokens: Count
    unlearned: Count
    unlearned_tokens: Count
    filled: Count

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def efficiency(self) -> float:
        """Share of the positions of all rows that hold a token of a document."""
        return self.filled / (self.num_rows * self.seq_len)

    @classmethod
    def of(cls, parts: Sequence[PartFacts], **known: Any) -> Self:
        """parts: all, in their order."""
        sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in (*_COUNTS, "filled")}
        blank = cls(
            crc64nvme="",
            packer_version=PACKER_VERSION,
            rows=[part.rows for part in parts],
            pieces=[part.pieces for part in parts],
            crc64nvme_of_parts=list_to_text([part.crc for part in parts]),
            **sums,
            **known,
        )
        return blank.model_copy(update={"crc64nvme": _crc(blank.model_dump())})

    @classmethod
    def read(cls, folder: Store) -> Self | None:
        """None if there is none. Raises DataError for a damaged one, StoreError."""
        try:
            content = folder.read(INDEX_NAME, max_bytes=_MAX_INDEX_BYTES)
        except KeyMissing:
            return None
        try:
            index = cls.model_validate_json(content)
        except ValidationError as error:
            raise _damaged(folder.url, INDEX_NAME) from error
        if index.crc64nvme != _crc(index.model_dump()):
            raise _damaged(folder.url, INDEX_NAME)
        return index

    def facts(self) -> dict[str, int | float]:
        """What became of the documents, for records."""
        return {
            "rows": self.num_rows,
            "efficiency": round(self.efficiency, 6),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def in_words(self) -> str:
        words = [
            f"{self.documents:,} documents packed into {self.num_rows:,} rows of {self.seq_len}, "
            f"{100 * self.efficiency:.1f} % of their positions filled"
        ]
        if self.split:
            words.append(f"{self.split:,} longer ones split")
        if self.cut:
            words.append(f"{self.cut:,} longer ones cut ({self.cut_tokens:,} tokens)")
        if self.left_out:
            words.append(f"{self.left_out:,} longer ones left out ({self.left_out_tokens:,} tokens)")
        if self.unlearned:
            words.append(f"{self.unlearned:,} pieces without a label left out ({self.unlearned_tokens:,} tokens)")
        return ", ".join(words)


class OpenIndex:
    """An index where it lies. Not thread-safe; any number of processes may have it open."""

    def __init__(self, folder: Store, index: PackedIndex):
        self.folder, self.index = folder, index
        self._parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def part(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """row_begins and pieces, mapped. Raises DataError unless they are what was made, StoreError."""
        if number not in self._parts:
            numbers = np.frombuffer(self._content(number), _INDEX_DTYPE)
            row_begins, end = self.index.rows[number] + 1, len(numbers) - 1
            self._parts[number] = (
                numbers[_NUM_FACTS : _NUM_FACTS + row_begins],
                numbers[_NUM_FACTS + row_begins : end].reshape(-1, 2),
            )
        return self._parts[number]

    def copy_all(self) -> None:
        """Have all parts on this node, where they are not read where they lie. One process copies, the others wait."""
        if self.folder.local_path is None:
            with ThreadPoolExecutor(COPIES, thread_name_prefix="index-copy") as pool:
                list(pool.map(self._content, range(len(self.index.rows))))

    @cached_property
    def _crcs(self) -> "array[int]":
        return list_from_text(self.index.crc64nvme_of_parts)

    def _content(self, number: int) -> memoryview:
        folder, name = self.folder.local_path, part_name(number)
        if folder is not None:
            if (content := self._mapped(folder / name, number)) is None:
                raise _damaged(self.folder.url, name)
            return content
        copies = scratch_folder() / "data/packed" / self.folder.url.rpartition("/")[2]
        copy = copies / name
        with on_this_disk(copies), exclusive(copy.with_suffix(".lock"), f"copy of {self.folder.uri(name)}"):
            if (content := self._mapped(copy, number)) is None:
                with contextlib.suppress(KeyMissing):
                    write_atomically(copy, self.folder.read_range(name, 0, self._num_bytes(number)))
                content = self._mapped(copy, number)
        if content is None:
            copy.unlink(missing_ok=True)
            raise _damaged(self.folder.url, name)
        return content

    def _num_bytes(self, number: int) -> int:
        return 8 * (_NUM_FACTS + self.index.rows[number] + 1 + 2 * self.index.pieces[number] + 1)

    def _mapped(self, path: Path, number: int) -> memoryview | None:
        """None unless this file is the part."""
        size = self._num_bytes(number)
        try:
            with path.open("rb") as file:
                content = mapped(file, size) if os.fstat(file.fileno()).st_size == size else None
        except FileNotFoundError:
            return None
        return content if content is not None and checksum(content[:-8]) == self._crcs[number] else None


@contextlib.contextmanager
def on_this_disk(folder: Path) -> Iterator[None]:
    """What the system refuses becomes the data's error."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}, where this node keeps what it knows of packed rows, cannot be written: {error.strerror}; make "
            "room there, or set TMPDIR on the nodes to a folder that can be written and has room"
        ) from error


def find_index(key: str, homes: Sequence[str]) -> OpenIndex | None:
    """The index of this key in the first of these folders and URLs that has it. DataError for a damaged one."""
    for home in homes:
        folder = Store(home).child(f"packed/{key}")
        try:
            if index := PackedIndex.read(folder):
                return OpenIndex(folder, index)
        except StoreError as error:
            # The next place may have it, and else it is made there.
            logger.warning("no index of packed rows can be read from %s: %s", folder.url, error)
    return None


def _damaged(place: str, name: str) -> DataError:
    return DataError(f"{place}/{name} is damaged, so no row is read by it: delete {place}, and it is made again")


def _crc(fields: dict[str, Any]) -> str:
    content = {name: value for name, value in fields.items() if name != "crc64nvme"}
    return to_text(checksum(json.dumps(content, sort_keys=True).encode()))
