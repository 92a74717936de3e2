"""What a source is made of: files, the parts of files that one task reads, and the documents in them."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raynium.data.text.left_out import LeftOut
from raynium.errors import spelled

# pieces: a text that is the whole source, cut into documents.
Kind = Literal["text", "pieces", "jsonl", "json", "parquet", "arrow"]
Compression = Literal["", "gz", "zst"]


class Document(NamedTuple):
    """One text to train or evaluate on.

    name: the file's path relative to the source, "/"-separated. Where a file holds several, with ":<number>" besides:
    of lines and pieces the byte of the (uncompressed) file at which it begins, else the row, from 0. text: not empty,
    and encodable as UTF-8.
    """

    name: str
    text: str


Item = Document | LeftOut


class Column(NamedTuple):
    """What a format of records asks for by `name`, and where a source has it: of several names the texts are joined."""

    name: str
    sources: tuple[str, ...]
    required: bool


# The field that holds a text; or what a record is made of, which then is read as a JSON object of these names.
Wanted = str | tuple[Column, ...]


@dataclass(frozen=True)
class SourceFile:
    """As it was listed. place: its path or URL. num_bytes: as it lies there, packed or not. version: as in
    `storage.backend.Head`.
    """

    name: str
    place: str
    num_bytes: int
    kind: Kind
    compression: Compression
    version: str

    @property
    def shown(self) -> str:
        """Its place, for a message."""
        return spelled(self.place)


@dataclass(frozen=True)
class Part:
    """Those documents of a file that begin in its bytes [begin, end)."""

    file: SourceFile
    begin: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.begin == self.file.num_bytes


@dataclass(frozen=True)
class Split:
    """What one task reads: all that it needs to know, on any node that sees the files. Pickles small.

    profile: see `sources.open_source`.
    """

    parts: tuple[Part, ...]
    wanted: Wanted
    profile: str | None

    @property
    def num_bytes(self) -> int:
        return sum(part.end - part.begin for part in self.parts)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out. A larger fraction holds out the same documents and more."""
    return name_hash(name) < fraction * 2**64


def fraction_that_holds_out(least_hash: int) -> float:
    """The least of few digits that holds out the document whose name has this hash."""
    share = (least_hash + 1) / 2**64
    scale = 10 ** (1 - math.floor(math.log10(share)))
    return math.ceil(share * scale) / scale


def name_hash(name: str) -> int:
    """A document's place among all possible names, uniform in [0, 2**64)."""
    # Linux allows names that are no UTF-8; Python spells their bytes as half surrogate pairs.
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
