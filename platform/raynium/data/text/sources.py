"""Where text comes from: a source named in the config becomes a stream of documents, each with a stable name.

A source is listed first, without opening a file; `plan_splits` cuts that list into what one task reads, and
`read_split` gives its documents, and what is none as `LeftOut`. A new kind of file is a row of `listing.KINDS` and a
reader. Nothing here tokenises or writes. A document's name decides whether it is held out, so what is held out does not
depend on which other documents exist, on their order, on how the source is cut, or on the machine.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from itertools import pairwise
from typing import Any

from raynium.data.text.documents import Item, Part, SourceFile, Split
from raynium.data.text.left_out import LeftOut
from raynium.data.text.listing import list_source
from raynium.data.text.readers import BadRecord, json_lines, text_pieces, whole_text
from raynium.errors import DataError

# So that a small source still has parts for many tasks, and a large one's tasks end within minutes.
LEAST_SPLIT_BYTES = 8 * 10**6
MOST_SPLIT_BYTES = 256 * 10**6
SPLITS = 64
# So that a split of tiny files stays small itself.
MOST_PARTS = 4096
_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """What a source holds, before a file of it was opened. Both in the order of their names."""

    files: list[SourceFile]
    left_out: list[LeftOut]
    text_field: str

    def items(self) -> Iterator[Item]:
        """All documents by file name, and what is none; can be called again for another pass. Raises DataError."""
        yield from self.left_out
        for split in plan_splits(self):
            yield from read_split(split)


def open_source(source: str, *, text_field: str = "text") -> Source:
    """List a source: "python-stdlib" (this Python's standard library, one document per .py file, without installed
    packages), a folder, or one file.

    A .txt, .py or .md file is one document (one that is itself the source is cut into pieces), a line of a .jsonl or
    .ndjson file another; capital letters do not matter. Sub-folders are read, linked ones are not followed.

    text_field: where a record's text is; "a.b" is the field b of the object in its field a.

    Raises DataError for what is not there, and a folder without such files.
    """
    files, left_out = list_source(source)
    return Source(files, left_out, text_field)


def plan_splits(source: Source, *, most_bytes: int = MOST_SPLIT_BYTES) -> list[Split]:
    """Cut a source into splits of at most `most_bytes` each, in its order: a pure function of the listing.

    Small files stand together in one split, large ones are cut. Read one after the other, splits give the documents of
    the source, each once, in the source's order.
    """
    limit = min(most_bytes, max(LEAST_SPLIT_BYTES, sum(file.num_bytes for file in source.files) // SPLITS))
    splits: list[Split] = []
    waiting: list[Part] = []

    def close() -> None:
        if waiting:
            splits.append(Split(tuple(waiting), source.text_field))
            waiting.clear()

    waiting_bytes = 0
    for file in source.files:
        for part in _cut(file, limit):
            waiting_bytes += part.end - part.begin
            if waiting_bytes > limit or len(waiting) == MOST_PARTS:
                close()
                waiting_bytes = part.end - part.begin
            waiting.append(part)
    close()
    return splits


def _cut(file: SourceFile, limit: int) -> list[Part]:
    """Its parts, of about equal size; one where only the whole file can be read."""
    number = -(-file.num_bytes // limit) if file.kind in ("pieces", "jsonl") else 1
    if number <= 1:
        return [Part(file, 0, file.num_bytes)]
    places = [file.num_bytes * index // number for index in range(number + 1)]
    return [Part(file, begin, end) for begin, end in pairwise(places)]


def read_split(split: Split) -> Iterator[Item]:
    """Its documents, and what is none, in order; memory is bounded by the longest document.

    Raises DataError for a file that is missing, cannot be read or has changed since it was listed, and for a record
    that holds no text where it should.
    """
    for part in split.parts:
        file = part.file
        try:
            with _opened(file) as stream:
                if file.kind == "text":
                    yield from whole_text(stream, part)
                elif file.kind == "pieces":
                    yield from text_pieces(stream, part)
                else:
                    yield from json_lines(stream, part, split.text_field)
        except BadRecord as error:
            raise DataError(f"{file.place}, line {_line(file, error.offset)}: {error.problem}") from error
        except OSError as error:
            raise DataError(
                f"{file.place} cannot be read: {error.strerror or error}; give this user permission to read it, or "
                "take it out of data.source"
            ) from error


@contextmanager
def _opened(file: SourceFile) -> "Iterator[BufferedReader[Any]]":
    with BufferedReader(FileIO(file.place), _BUFFER_BYTES) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes != file.num_bytes:
            raise DataError(
                f"{file.place} has {num_bytes:,} bytes, and had {file.num_bytes:,} when its folder was listed: let "
                "nothing write to a source while it is read, then try again"
            )
        yield stream


def _line(file: SourceFile, offset: int) -> int:
    """The number of the line that begins at this byte, from 1."""
    number = 1
    with _opened(file) as stream:
        while offset > 0 and (some := stream.read(min(_BUFFER_BYTES, offset))):
            number += some.count(b"\n")
            offset -= len(some)
    return number
