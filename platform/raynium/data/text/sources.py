"""Where text comes from: a source named in the config becomes a stream of documents, each with a stable name.

A source is listed first, without opening a file; `plan_splits` cuts that list into what one task reads, and
`read_split` gives its documents, and what is none as `LeftOut`. A new kind of file is a row of `listing.KINDS` and a
reader. Nothing here tokenises or writes. A document's name decides whether it is held out, so what is held out does not
depend on which other documents exist, on their order, on how the source is cut, or on the machine.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import SEEK_END, BufferedReader
from itertools import islice, pairwise
from typing import Any

from raynium.data.text.documents import Column, Compression, Item, Kind, Part, SourceFile, Split, Wanted
from raynium.data.text.left_out import LeftOut
from raynium.data.text.listing import list_source
from raynium.data.text.readers import BadRecord, json_lines, json_values, text_pieces, whole_text
from raynium.data.text.tables import table_rows
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.reading import open_each, open_reading, version_of, will_read

# So that a small source still has parts for many tasks, and a large one's tasks end within minutes.
LEAST_SPLIT_BYTES = 8 * 10**6
MOST_SPLIT_BYTES = 256 * 10**6
SPLITS = 64
# So that a split of tiny files stays small itself.
MOST_PARTS = 4096
# Kinds whose files may be read in parts, where they are not packed.
_CUT = frozenset({"pieces", "jsonl", "parquet"})
# Few records are longer.
RECORD_BYTES = 2**16
# A bad line so far into a file is told by its number, which is counted then; one beyond that by its byte.
COUNTED_BYTES = 2**30
PROBED_FILES, PROBED_DOCUMENTS = 2, 8
_BUFFER_BYTES = 2**20
# In zstd's words.
_WIDE_WINDOW = "requires too much memory"


@dataclass(frozen=True)
class Source:
    """What a source holds, before a file of it was opened. Both in the order of their names."""

    files: list[SourceFile]
    left_out: list[LeftOut]
    wanted: Wanted
    profile: str | None

    def items(self) -> Iterator[Item]:
        """All documents by file name, and what is none; can be called again for another pass. Raises DataError."""
        yield from self.left_out
        for split in plan_splits(self):
            yield from read_split(split)


def open_source(
    source: str, *, text_field: str = "text", columns: tuple[Column, ...] = (), profile: str | None = None
) -> Source:
    """List a source: "python-stdlib" (this Python's standard library, one document per .py file, without installed
    packages), a folder, one file, a glob of files (`web/**/*.parquet`), or a dataset that `datasets` saved to disk; on
    this machine or at s3://.

    A .txt, .py or .md file is one document (one that is itself the source is cut into pieces). Of the others, each line
    of .jsonl and .ndjson, each object of .json (one, an array of them, or one after the other) and each row of .parquet
    and .arrow holds one. All but the last two may be packed (.gz, .zst). Capital letters do not matter. Sub-folders are
    read, linked ones are not followed; a .json file beside files of text is left out, unless a glob names it.

    text_field: where a record's text is; "a.b" is the field b of the object in its field a. columns: of records
    that are no texts, in its place: a document is then a JSON object of them. profile: of the AWS
    configuration of each machine that reads, for a source at s3:// that the environment's credentials do not open.

    Raises DataError for what is not there or cannot be listed, and where no such file is found.
    """
    listing = list_source(source, profile=profile)
    return Source(listing.files, listing.left_out, columns or text_field, profile)


def probe(source: Source) -> None:
    """Read the first documents of the first files of each kind: a wrong field is told before anything starts.

    Raises DataError, as `read_split`.
    """
    probed: Counter[tuple[Kind, Compression]] = Counter()
    for file in source.files:
        probed[file.kind, file.compression] += 1
        if probed[file.kind, file.compression] <= PROBED_FILES:
            split = Split((Part(file, 0, file.num_bytes),), source.wanted, source.profile)
            for _ in islice(read_split(split), PROBED_DOCUMENTS):
                pass


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
            splits.append(Split(tuple(waiting), source.wanted, source.profile))
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
    number = -(-file.num_bytes // limit) if file.kind in _CUT and not file.compression else 1
    if number <= 1:
        return [Part(file, 0, file.num_bytes)]
    places = [file.num_bytes * index // number for index in range(number + 1)]
    return [Part(file, begin, end) for begin, end in pairwise(places)]


def read_split(split: Split) -> Iterator[Item]:
    """Its documents, and what is none, in order. Memory is bounded: by the longest document, or some rows of a table.

    Raises DataError for a file that is missing, damaged, cannot be read or has changed since it was listed, and for a
    record that holds no text where it should.
    """
    places = [part.file.place for part in split.parts]
    with closing(open_each(places, profile=split.profile)) as streams:
        for part in split.parts:
            file = part.file
            stream = _next_opened(streams, file)
            if file.kind != "parquet":
                # Also the byte before the first, which may be the end of a line, and the end of the last record.
                will_read(stream, max(part.begin - 1, 0), part.end + RECORD_BYTES)
            if file.compression:
                # Nobody knows how many bytes come out; all of them are this part's.
                part = Part(file, 0, sys.maxsize)
            with _unpacked(stream, file) as content, _problems(file, split.profile, stream):
                yield from _read(content, part, split.wanted)


def _read(stream: BufferedReader, part: Part, wanted: Wanted) -> Iterator[Item]:
    match part.file.kind:
        case "text":
            return whole_text(stream, part)
        case "pieces":
            return text_pieces(stream, part)
        case "jsonl":
            return json_lines(stream, part, wanted)
        case "json":
            return json_values(stream, part, wanted)
        case "parquet" | "arrow":
            return table_rows(stream, part, wanted)


def _next_opened(streams: "Iterator[BufferedReader[Any]]", file: SourceFile) -> "BufferedReader[Any]":
    try:
        stream = next(streams)
    except (OSError, KeyMissing) as error:
        raise DataError(_unreadable(file, error)) from error
    except StoreError as error:
        # It says which object, why, and what to do.
        raise DataError(str(error)) from error
    num_bytes = stream.seek(0, SEEK_END)
    if num_bytes != file.num_bytes:
        raise DataError(
            f"{file.shown} has {num_bytes:,} bytes, and had {file.num_bytes:,} when its folder was listed: let nothing "
            "write to a source while it is read, then try again"
        )
    if version_of(stream) != file.version:
        raise DataError(
            f"{file.shown} was written to after its folder was listed: let nothing write to a source while it is read, "
            "then try again"
        )
    stream.seek(0)
    return stream


def _unpacked(stream: "BufferedReader[Any]", file: SourceFile) -> "BufferedReader[Any]":
    """What is in it, to read from its beginning to its end; an unpacked file itself."""
    if not file.compression:
        return stream
    if file.num_bytes == 0:
        raise DataError(_damaged(file, "it is empty", stream))
    import pyarrow as pa

    codec = {"gz": "gzip", "zst": "zstd"}[file.compression]
    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec), _BUFFER_BYTES)


def place_of(split: Split, name: str) -> str:
    """Where the document of this name stands, for a message: the file, and the line or row."""
    files = {part.file.name: part.file for part in split.parts}
    file_name, _, at = name.rpartition(":")
    if file_name not in files:
        return files[name].shown
    return f"{files[file_name].shown}, {_record(files[file_name], split.profile, int(at))}"


def _record(file: SourceFile, profile: str | None, at: int) -> str:
    """at: as in `BadRecord`."""
    if file.kind != "jsonl":
        return f"row {at} (from 0)"
    return f"line {_line(file, profile, at)}" if at <= COUNTED_BYTES else f"the line at byte {at:,}"


@contextmanager
def _problems(file: SourceFile, profile: str | None, stream: BufferedReader) -> Iterator[None]:
    """Turn what goes wrong inside a file into DataErrors that say where."""
    try:
        yield
    except BadRecord as error:
        raise DataError(f"{file.shown}, {_record(file, profile, error.at)}: {error.problem}") from error
    except OSError as error:
        if error.errno is not None:
            raise DataError(_unreadable(file, error)) from error
        if _WIDE_WINDOW in str(error):
            raise DataError(
                f"{file.shown} was packed with a window above 128 MiB (`zstd --long=28` and more), which every task "
                f"would hold in memory: pack it anew, with `zstd -dc --long=31 FILE | zstd --long=27 -o NEW`"
            ) from error
        raise DataError(_damaged(file, error, stream)) from error
    except ValueError as error:
        raise DataError(_damaged(file, error, stream)) from error
    except StoreError as error:
        raise DataError(str(error)) from error


def _unreadable(file: SourceFile, error: Exception) -> str:
    problem = error.strerror or error if isinstance(error, OSError) else error
    return (
        f"{file.shown} cannot be read: {problem}; give this user permission to read it, or take it out of data.source"
    )


def _damaged(file: SourceFile, error: Exception | str, stream: BufferedReader) -> str:
    return (
        f"{file.shown} is cut off or damaged ({error}), before byte {stream.tell():,} of {file.num_bytes:,}: copy it "
        "again, or take it out of data.source"
    )


def _line(file: SourceFile, profile: str | None, offset: int) -> int:
    """The number of the line that begins at this byte of what is unpacked, from 1."""
    number = 1
    with open_reading(file.place, profile=profile) as packed, _unpacked(packed, file) as stream:
        while offset > 0 and (some := stream.read(min(_BUFFER_BYTES, offset))):
            number += some.count(b"\n")
            offset -= len(some)
    return number
