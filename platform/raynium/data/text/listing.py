"""What a source holds, found without opening a file of it."""

import os
import sysconfig
from collections.abc import Set as AbstractSet
from pathlib import Path

from raynium.config.plain_file import plain_size
from raynium.data.text.documents import Kind, SourceFile
from raynium.data.text.left_out import LeftOut
from raynium.errors import DataError

PYTHON_STDLIB = "python-stdlib"
# These lie inside the standard library's folder.
THIRD_PARTY_FOLDERS = frozenset({"site-packages", "dist-packages"})
# By ending; capital letters do not matter.
KINDS: dict[str, Kind] = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
# Kinds that hold text as a rule, but not for our readers: a user who gives such files must hear that they are not read.
COMPRESSED_ENDINGS = frozenset({".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z"})
UNREAD_ENDINGS = COMPRESSED_ENDINGS | {
    *(".json", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".csv", ".tsv", ".xml", ".html", ".htm"),
    *(".tex", ".rst", ".epub", ".pdf", ".doc", ".docx", ".odt", ".warc", ".db", ".sqlite", ".npy", ".npz", ".tfrecord"),
}
_ENDINGS = ", ".join(KINDS)

Listed = tuple[list[SourceFile], list[LeftOut]]


def list_source(source: str) -> Listed:
    """All files of a source, and what is none, both by name. Raises DataError; see `sources.open_source`."""
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        # What is not meant to be in it is not left out of it.
        return _folder(root, {".py"}, without=THIRD_PARTY_FOLDERS, given=source)[0], []
    path = Path(source.removeprefix("file://"))
    try:
        if path.is_dir():
            return _folder(path, KINDS.keys(), without=frozenset(), given=source)
        num_bytes = plain_size(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        problem = "there is no such folder or file on this machine" if missing else getattr(error, "strerror", error)
        raise DataError(
            f"data.source = {source!r}: {problem}; give an existing folder of {_ENDINGS} files, one such file, or "
            f"{PYTHON_STDLIB!r}"
        ) from error
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"data.source = {source!r}: a file that ends in {path.suffix or 'nothing'} is not read; give one of "
            f"{_ENDINGS}"
        )
    kind = "pieces" if kind == "text" else kind
    return [SourceFile(path.name, str(path), num_bytes, kind, path.stat().st_mtime)], []


def _folder(root: Path, endings: AbstractSet[str], *, without: frozenset[str], given: str) -> Listed:
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
                item = _file(Path(folder, name), (inside / name).as_posix(), endings)
                files += [item] if isinstance(item, SourceFile) else []
                left_out += [item] if isinstance(item, LeftOut) else []
    if not files:
        found = f"; it has {left_out[0].name} ({left_out[0].reason})" if left_out else ""
        raise DataError(
            f"data.source = {given!r}: no {', '.join(KINDS)} file under {root}{found}; "
            f"give a folder that holds some, or {PYTHON_STDLIB!r}"
        )
    return sorted(files, key=lambda file: file.name), sorted(left_out)


def _file(path: Path, name: str, endings: AbstractSet[str]) -> SourceFile | LeftOut:
    try:
        num_bytes = plain_size(path)
        modified_unix = path.stat().st_mtime
    except OSError:
        return LeftOut(name, "no file")
    ending = path.suffix.lower()
    if ending in endings:
        return SourceFile(name, str(path), num_bytes, KINDS[ending], modified_unix)
    if ending in UNREAD_ENDINGS:
        inner = Path(path.stem).suffix.lower() if ending in COMPRESSED_ENDINGS else ""
        return LeftOut(name, "unread kind", num_bytes, f"{inner[:20]}{ending}")
    return LeftOut(name, "other kind", num_bytes)
