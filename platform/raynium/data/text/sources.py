"""Where text comes from: a source named in the config becomes a stream of documents, each with a stable name.

A source is listed first, without opening a file; then the reader of each file's kind gives its documents, and what is
none as `LeftOut`. A new kind of file is a row of `READERS`, a new kind of place another way to make a `Source`. Nothing
here tokenises or writes. A document's name decides whether it is held out, so the split does not depend on which other
documents exist, on their order, or on the machine.
"""

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from raynium.config.plain_file import plain_size
from raynium.data.text.left_out import LeftOut
from raynium.errors import DataError

PYTHON_STDLIB = "python-stdlib"
# These lie inside the standard library's folder.
THIRD_PARTY_FOLDERS = frozenset({"site-packages", "dist-packages"})
# One text is in memory as a whole, and its tokens take about 30 times as much.
MAX_DOCUMENT_BYTES = 128 * 2**20
# A text file that is the whole source is cut after lines into pieces of about this size, so that some can be held out.
PIECE_BYTES = 16_384
# Kinds that hold text as a rule, but not for our readers: a user who gives such files must hear that they are not read.
COMPRESSED_ENDINGS = frozenset({".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z"})
UNREAD_ENDINGS = COMPRESSED_ENDINGS | {
    *(".json", ".ndjson", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".csv", ".tsv", ".xml", ".html", ".htm"),
    *(".tex", ".rst", ".epub", ".pdf", ".doc", ".docx", ".odt", ".warc", ".db", ".sqlite", ".npy", ".npz", ".tfrecord"),
}
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Document(NamedTuple):
    """One text to train or evaluate on.

    name: the file's path relative to the source, "/"-separated; with ":<line>" or ":<piece>", from 1. text: not empty,
    and encodable as UTF-8.
    """

    name: str
    text: str


Item = Document | LeftOut
# Given a file and its name in the source. Raises DataError for a line that is malformed.
Reader = Callable[[Path, str], Iterator[Item]]


@dataclass(frozen=True)
class SourceFile:
    name: str
    path: Path
    num_bytes: int
    read: Reader


@dataclass(frozen=True)
class Source:
    """What a source holds, before a file of it was opened. Both in the order of their names."""

    files: list[SourceFile]
    left_out: list[LeftOut]

    def items(self) -> Iterator[Item]:
        """All documents by file name, and what is none; can be called again for another pass. Raises DataError."""
        yield from self.left_out
        for file in self.files:
            try:
                yield from file.read(file.path, file.name)
            except OSError as error:
                raise DataError(
                    f"{file.path} cannot be read: {error.strerror or error}; give this user permission to read it, or "
                    "take it out of data.source"
                ) from error


def open_source(source: str) -> Source:
    """List a source: "python-stdlib" (this Python's standard library, one document per .py file, without installed
    packages), a folder, or one file.

    A .txt, .py or .md file is one document (one that is itself the source is cut into pieces), a line of a .jsonl file
    ({"text": ...}) another; capital letters do not matter. Sub-folders are read, linked ones are not followed.

    Raises DataError for what is not there, and a folder without such files.
    """
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return _listed(root, {".py": _whole_file}, without=THIRD_PARTY_FOLDERS, given=source)
    path = Path(source.removeprefix("file://"))
    endings = ", ".join(READERS)
    try:
        if path.is_dir():
            return _listed(path, READERS, without=frozenset(), given=source)
        num_bytes = plain_size(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        problem = "there is no such folder or file on this machine" if missing else getattr(error, "strerror", error)
        raise DataError(
            f"data.source = {source!r}: {problem}; give an existing folder of {endings} files, one such file, or "
            f"{PYTHON_STDLIB!r}"
        ) from error
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"data.source = {source!r}: a file that ends in {path.suffix or 'nothing'} is not read; give one of "
            f"{endings}"
        )
    reader = _pieces if reader is _whole_file else reader
    return Source([SourceFile(path.name, path, num_bytes, reader)], [])


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out. A larger fraction holds out the same documents and more."""
    return name_hash(name) < fraction * 2**64


def name_hash(name: str) -> int:
    """A document's place among all possible names, uniform in [0, 2**64)."""
    # Linux allows names that are no UTF-8; Python spells their bytes as half surrogate pairs.
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


# ---- listing ---------------------------------------------------------------------------------------------------------


def _listed(root: Path, readers: Mapping[str, Reader], *, without: frozenset[str], given: str) -> Source:
    files: list[SourceFile] = []
    left_out: list[LeftOut] = []

    def refuse(error: OSError) -> None:
        raise DataError(
            f"data.source = {given!r}: {error.filename} cannot be read: {error.strerror}; give this user permission to "
            "read it, or move it elsewhere"
        ) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        inside = Path(folder).relative_to(root)
        hidden = [name for name in [*folders, *names] if name.startswith(".")]
        left_out += [LeftOut((inside / name).as_posix(), "hidden") for name in hidden]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        left_out += [LeftOut((inside / name).as_posix(), "linked folder") for name in linked]
        for name in names:
            if not name.startswith("."):
                item = _file(Path(folder, name), (inside / name).as_posix(), readers)
                files += [item] if isinstance(item, SourceFile) else []
                left_out += [item] if isinstance(item, LeftOut) else []
    if given == PYTHON_STDLIB:
        # What is not meant to be in it is not left out of it.
        left_out = []
    if not files:
        found = f"; it has {left_out[0].name} ({left_out[0].reason})" if left_out else ""
        raise DataError(
            f"data.source = {given!r}: no {', '.join(readers)} file under {root}{found}; "
            f"give a folder that holds some, or {PYTHON_STDLIB!r}"
        )
    return Source(sorted(files, key=lambda file: file.name), sorted(left_out))


def _file(path: Path, name: str, readers: Mapping[str, Reader]) -> SourceFile | LeftOut:
    try:
        num_bytes = plain_size(path)
    except OSError:
        return LeftOut(name, "no file")
    ending = path.suffix.lower()
    if (reader := readers.get(ending)) is not None:
        return SourceFile(name, path, num_bytes, reader)
    if ending in UNREAD_ENDINGS:
        inner = Path(path.stem).suffix.lower() if ending in COMPRESSED_ENDINGS else ""
        return LeftOut(name, "unread kind", num_bytes, f"{inner[:20]}{ending}")
    return LeftOut(name, "other kind", num_bytes)


# ---- readers ---------------------------------------------------------------------------------------------------------


def _whole_file(path: Path, name: str) -> Iterator[Item]:
    with path.open("rb") as file:
        # Bytes, not text: line ends stay as they are.
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        yield LeftOut(name, "too long", path.stat().st_size)
    else:
        yield _document(name, content)


def _pieces(path: Path, name: str) -> Iterator[Item]:
    with path.open("rb") as file:
        if _is_utf_16(file):
            yield LeftOut(name, "utf-16", path.stat().st_size)
            return
        number = 0
        while piece := file.read(PIECE_BYTES):
            piece += file.readline(PIECE_BYTES)
            # Where the line is too long, at least a character stays whole: none has more than 3 bytes after its first.
            for _ in range(3):
                if 0x80 <= (file.peek(1)[:1] or b"\0")[0] < 0xC0:
                    piece += file.read(1)
            number += 1
            yield _document(f"{name}:{number}", piece)


def _json_lines(path: Path, file_name: str) -> Iterator[Item]:
    with path.open("rb") as file:
        if _is_utf_16(file):
            yield LeftOut(file_name, "utf-16", path.stat().st_size)
            return
        number = 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            name, num_bytes = f"{file_name}:{number}", len(line)
            if num_bytes <= MAX_DOCUMENT_BYTES:
                yield _json_document(name, line, where=f"{path}, line {number}")
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_DOCUMENT_BYTES)
                num_bytes += len(line)
            yield LeftOut(name, "too long", num_bytes)


def _json_document(name: str, line: bytes, *, where: str) -> Item:
    if not line.strip():
        return LeftOut(name, "empty")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return LeftOut(name, "not utf-8", len(line))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); each line must be a JSON object") from error
    if isinstance(record, dict) and "text" in record and record["text"] is None:
        return LeftOut(name, "null", len(line))
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: no "text" string; each line must be {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which is no character.
        return LeftOut(name, "not utf-8", len(line))
    return Document(name, text) if text else LeftOut(name, "empty")


def _document(name: str, content: bytes) -> Item:
    if content.startswith(_UTF_16_MARKS):
        return LeftOut(name, "utf-16", len(content))
    try:
        # A byte order mark at the beginning is no text.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return LeftOut(name, "not utf-8", len(content))
    return Document(name, text) if text else LeftOut(name, "empty")


def _is_utf_16(file: BinaryIO) -> bool:
    begin = file.read(2)
    file.seek(0)
    return begin in _UTF_16_MARKS


# By ending.
READERS: dict[str, Reader] = {".txt": _whole_file, ".py": _whole_file, ".md": _whole_file, ".jsonl": _json_lines}
