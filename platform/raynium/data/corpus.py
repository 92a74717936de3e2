"""Where text comes from: a source named in the config becomes a stream of documents, each with a stable name.

Nothing here tokenises or writes. A document's name decides whether it is held out, so the split does not depend on
which other documents exist, on their order, or on the machine.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from raynium.errors import DataError

PYTHON_STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".py", ".md")
THIRD_PARTY_FOLDERS = frozenset({"site-packages", "dist-packages"})  # inside the standard library's folder


class Document(NamedTuple):
    """One text to train or evaluate on."""

    name: str  # file's path relative to the source, "/"-separated; for .jsonl: "<path>:<line>", lines from 1
    text: str  # not empty, and encodable as UTF-8


class Skipped(NamedTuple):
    """A file or line that is not a document; builders count these and say so."""

    name: str
    reason: Literal["undecodable", "empty"]


def read_documents(source: str) -> Iterator[Document | Skipped]:
    """All documents of `source`, sorted by file name; can be called again for another pass.

    source: "python-stdlib" (this Python's standard library, one document per .py file, without installed packages),
        or a folder: one document per .txt, .py or .md file and per line of a .jsonl file ({"text": ...}), in
        sub-folders too. Hidden files and folders are left out.

    Raises DataError for a missing folder, a folder without such files, and a malformed .jsonl line.
    """
    if source == PYTHON_STDLIB:
        root, suffixes, left_out = Path(sysconfig.get_paths()["stdlib"]), (".py",), THIRD_PARTY_FOLDERS
    else:
        root, suffixes, left_out = Path(source), (*TEXT_SUFFIXES, ".jsonl"), frozenset[str]()
    names = _file_names(root, suffixes, left_out)
    if not names:
        raise DataError(
            f"data.source = {source!r}: no {', '.join(suffixes)} file under {root}; "
            f"give a folder that holds some, or {PYTHON_STDLIB!r}"
        )
    return _read_files(root, names)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out. A larger fraction holds out the same documents and more."""
    return name_hash(name) < fraction * 2**64


def name_hash(name: str) -> int:
    """A document's place among all possible names, uniform in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _file_names(root: Path, suffixes: tuple[str, ...], left_out: frozenset[str]) -> list[str]:
    if not root.is_dir():
        raise DataError(
            f"data.source = {str(root)!r}: there is no such folder on this machine; "
            f"give an existing folder of .txt, .py, .md or .jsonl files, or {PYTHON_STDLIB!r}"
        )
    relative_paths = (path.relative_to(root) for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    return sorted(
        path.as_posix()
        for path in relative_paths
        if not any(part.startswith(".") or part in left_out for part in path.parts)
    )


def _read_files(root: Path, names: list[str]) -> Iterator[Document | Skipped]:
    for name in names:
        if name.endswith(".jsonl"):
            yield from _read_jsonl(root / name, name)
            continue
        try:
            text = (root / name).read_bytes().decode()  # bytes, not read_text: line ends stay as they are
        except UnicodeDecodeError:
            yield Skipped(name, "undecodable")
            continue
        yield Document(name, text) if text else Skipped(name, "empty")


def _read_jsonl(path: Path, file_name: str) -> Iterator[Document | Skipped]:
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            name = f"{file_name}:{line_number}"
            if not line.strip():
                yield Skipped(name, "empty")
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                yield Skipped(name, "undecodable")
                continue
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {line_number}: not JSON ({error}); each line must be a JSON object"
                ) from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f'{path}, line {line_number}: no "text" string; each line must be {{"text": "..."}}')
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
                yield Skipped(name, "undecodable")
                continue
            yield Document(name, text) if text else Skipped(name, "empty")
