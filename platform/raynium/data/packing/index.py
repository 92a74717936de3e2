"""The index that says which documents lie in a row of a store.

    packed/<key>/part-00000.bin …  what `packer.pack_part` finds, int64: row_begins, then pieces
    packed/<key>/index.json        written last: without it the folder is no index

The key is of the data's identity, the row's length, the policy and the packer, so an index is never an older store's.
It lies in the store's folder, or, where there is none that can be written, in the node's cache of data. It is a pure
function of the store: whichever process finds it missing makes it, while others wait.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynium.config.local_folders import scratch_folder
from raynium.config.plain_file import read_plain
from raynium.config.schema import DataSection
from raynium.data.packing.packer import PACKER_VERSION, PackedPart, Stream, TooLong, num_parts, pack_part
from raynium.errors import DataError
from raynium.storage.checksum import checksum, list_to_text, to_text
from raynium.storage.local_files import exclusive, mapped, write_atomically

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
_MAX_INDEX_BYTES = 2**30
_INDEX_DTYPE = np.dtype("<i8")

Count = Annotated[int, Field(ge=0, lt=2**60)]


class Packable(NamedTuple):
    """What packing needs of a store. place: of it, for people. folder: on this machine, None if it is elsewhere."""

    stream: Stream
    end_of_document: int
    identity: str
    place: str
    folder: Path | None


class PackedIndex(BaseModel):
    """`index.json`. rows, pieces: of each part; crc64nvme_of_parts: of their files, all in one text.

    documents: that are in rows, of them `split` in several; filled: positions of rows that hold a label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    crc64nvme: str
    identity: str
    seq_len: Count
    too_long: Literal["split", "leave_out"]
    packer_version: Count
    rows: list[Count]
    pieces: list[Count]
    crc64nvme_of_parts: str
    documents: Count
    split: Count
    left_out: Count
    left_out_tokens: Count
    filled: Count

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def efficiency(self) -> float:
        """Share of the positions of all rows that hold a label."""
        return self.filled / (self.num_rows * self.seq_len)

    @classmethod
    def of(cls, parts: list[PackedPart], crcs: list[int], **known: Any) -> Self:
        blank = cls(
            crc64nvme="",
            packer_version=PACKER_VERSION,
            rows=[len(part.row_begins) - 1 for part in parts],
            pieces=[len(part.pieces) for part in parts],
            crc64nvme_of_parts=list_to_text(crcs),
            documents=sum(part.documents for part in parts),
            split=sum(part.split for part in parts),
            left_out=sum(part.left_out for part in parts),
            left_out_tokens=sum(part.left_out_tokens for part in parts),
            filled=sum(int(part.pieces[:, 1].sum()) for part in parts),
            **known,
        )
        return blank.model_copy(update={"crc64nvme": _crc(blank.model_dump())})

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None if there is none. Raises DataError for a damaged one."""
        try:
            content = read_plain(folder / INDEX_NAME, max_bytes=_MAX_INDEX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            index = cls.model_validate_json(content)
        except ValidationError as error:
            raise _damaged(folder / INDEX_NAME) from error
        if index.crc64nvme != _crc(index.model_dump()):
            raise _damaged(folder / INDEX_NAME)
        return index

    def facts(self) -> dict[str, int | float]:
        """What became of the documents, for records."""
        return {
            "rows": self.num_rows,
            "efficiency": round(self.efficiency, 6),
            "documents": self.documents,
            "split": self.split,
            "left_out": self.left_out,
            "left_out_tokens": self.left_out_tokens,
        }

    def in_words(self) -> str:
        words = [
            f"{self.documents:,} documents packed into {self.num_rows:,} rows of {self.seq_len}, "
            f"{100 * self.efficiency:.1f} % of their positions filled"
        ]
        if self.split:
            words.append(f"{self.split:,} longer ones split")
        if self.left_out:
            words.append(f"{self.left_out:,} longer ones left out ({self.left_out_tokens:,} tokens)")
        return ", ".join(words)


def ensure_index(
    store: Packable, data: DataSection, tell: Callable[[str], None] | None = None
) -> tuple[Path, PackedIndex]:
    """The index of a store for rows of data.seq_len, and its folder; made first if it is missing, at some 100 to 1,000
    million tokens a second.

    Raises DataError if no document fits a row, if the store or the index is damaged, or if no folder can be written.
    """
    key = index_key(store.identity, data)
    folders = [scratch_folder() / "data/packed" / key]
    if store.folder is not None:
        folders.insert(0, store.folder / "packed" / key)
    for folder in folders:
        if index := PackedIndex.read(folder):
            return folder, index
    if store.folder is not None and not os.access(store.folder, os.W_OK):
        del folders[0]
    failed: list[str] = []
    for folder in folders:
        try:
            return folder, _ensure(store, folder, data, tell)
        except OSError as error:
            failed.append(f"{folder}: {error.strerror}")
            logger.warning("the index of rows cannot be written to %s", failed[-1])
    raise DataError(
        f"the index of rows cannot be written to {', or to '.join(failed)}; make room there, or set TMPDIR on the "
        "nodes to a folder that can be written and has room"
    )


def _ensure(store: Packable, folder: Path, data: DataSection, tell: Callable[[str], None] | None) -> PackedIndex:
    """Raises OSError where the folder cannot be written; nothing is left in it then."""
    with exclusive(folder.with_name(f"{folder.name}.lock"), f"packing of {store.place}"):
        if index := PackedIndex.read(folder):
            return index
        if tell is not None:
            tell(f"data: packing {len(store.stream):,} tokens into rows of {data.seq_len}")
        folder.mkdir(exist_ok=True)
        try:
            return _make(store, folder, seq_len=data.seq_len, too_long=data.too_long)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def index_key(identity: str, data: DataSection) -> str:
    known_by = [identity, data.seq_len, data.too_long, PACKER_VERSION]
    return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:16]


def read_part(folder: Path, index: PackedIndex, number: int, crc: int) -> tuple[np.ndarray, np.ndarray]:
    """row_begins and pieces of a part, mapped. crc: of its file. Raises DataError unless they are what was made."""
    path, row_begins = folder / _part_name(number), index.rows[number] + 1
    size = _INDEX_DTYPE.itemsize * (row_begins + 2 * index.pieces[number])
    try:
        with path.open("rb") as file:
            content = mapped(file, size) if os.fstat(file.fileno()).st_size == size else None
    except FileNotFoundError:
        content = None
    if content is None or checksum(content) != crc:
        raise _damaged(path)
    numbers = np.frombuffer(content, _INDEX_DTYPE)
    return numbers[:row_begins], numbers[row_begins:].reshape(-1, 2)


def _make(store: Packable, folder: Path, *, seq_len: int, too_long: TooLong) -> PackedIndex:
    counted, crcs, shortest = [], [], []
    for number in range(num_parts(len(store.stream), seq_len)):
        part = pack_part(
            store.stream, number, seq_len=seq_len, too_long=too_long, end_of_document=store.end_of_document
        )
        content = b"".join(each.astype(_INDEX_DTYPE).tobytes() for each in (part.row_begins, part.pieces))
        write_atomically(folder / _part_name(number), content)
        crcs.append(checksum(content))
        counted.append(part)
        shortest += [part.shortest] if part.shortest else []
    index = PackedIndex.of(counted, crcs, identity=store.identity, seq_len=seq_len, too_long=too_long)
    if not index.num_rows:
        raise DataError(
            f"data.seq_len = {seq_len}: no document of {store.place} fits a row, the shortest has {min(shortest)} "
            f"tokens with its end; set data.seq_len to {min(shortest)} or more, or data.too_long to split"
        )
    write_atomically(folder / INDEX_NAME, (index.model_dump_json() + "\n").encode())
    return index


def _part_name(number: int) -> str:
    return f"part-{number:05d}.bin"


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged, so no row is read by it: delete {path.parent}, and it is made again")


def _crc(fields: dict[str, Any]) -> str:
    content = {name: value for name, value in fields.items() if name != "crc64nvme"}
    return to_text(checksum(json.dumps(content, sort_keys=True).encode()))
