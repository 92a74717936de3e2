"""What a source holds, found without opening a file of text."""

import json
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from raynium.data.text.documents import Compression, Kind, SourceFile
from raynium.data.text.left_out import LeftOut
from raynium.data.text.made_chats import made_chats_file, made_preferences_file
from raynium.errors import DataError, StoreError, some, spelled
from raynium.storage.backend import KeyMissing
from raynium.storage.reading import Found, find_file, find_object, list_objects, open_reading

PYTHON_STDLIB = "python-stdlib"
MADE = {"made-chats": made_chats_file, "made-preferences": made_preferences_file}
# These lie inside the standard library's folder.
THIRD_PARTY_FOLDERS = frozenset({"site-packages", "dist-packages"})
# By ending; capital letters do not matter.
KINDS: dict[str, Kind] = {
    **{".txt": "text", ".md": "text", ".py": "text"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"},
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
# These pack their columns themselves, and are read from the end.
NEVER_PACKED = frozenset({"parquet", "arrow"})
# Kinds that hold text as a rule, but not for our readers: a user who gives such files must hear that they are not read.
COMPRESSED_ENDINGS = frozenset({".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z"})
UNREAD_ENDINGS = COMPRESSED_ENDINGS | {
    *(".feather", ".orc", ".avro", ".csv", ".tsv", ".xml", ".html", ".htm", ".tex", ".rst", ".epub", ".pdf", ".doc"),
    *(".docx", ".odt", ".warc", ".db", ".sqlite", ".npy", ".npz", ".tfrecord"),
}
ENDINGS = f"{', '.join(KINDS)}, and all but the last two also .gz and .zst"
# What `datasets` writes beside a saved dataset's files, which state.json names.
HUGGING_FACE = frozenset({"state.json", "dataset_info.json"})
HUGGING_FACE_SPLITS = "dataset_dict.json"
_MAX_STATE_BYTES = 2**24
_WILDCARD = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"(?:^|/)([\w.-]+)/([\w-][\w.-]*)/?$", re.ASCII)


@dataclass(frozen=True)
class Listing:
    """The files of a source, and what is none, both by name."""

    files: list[SourceFile]
    left_out: list[LeftOut]


def list_source(source: str, *, profile: str | None) -> Listing:
    """See `sources.open_source`. Raises DataError."""
    if source == PYTHON_STDLIB:
        found = _of_folder(_Folder(str(sysconfig.get_paths()["stdlib"]), source, profile), without=THIRD_PARTY_FOLDERS)
        files = [file for file in found.files if file.name.endswith(".py")]
        # What is not meant to be in it is not left out of it.
        return Listing(files, [])
    try:
        if source in MADE:
            path = MADE[source]()
            return _of_file(find_file(path), str(path), source)
        if source.startswith("s3://"):
            return _in_s3(source, profile)
        return _on_disk(source, source.removeprefix("file://"))
    except StoreError as error:
        raise DataError(f"data.source = {source!r}: {error}") from error
    except (OSError, ValueError) as error:
        problem = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise DataError(f"data.source = {source!r}: {problem}; {_what_to_give(source)}") from error


def _on_disk(source: str, place: str) -> Listing:
    path = Path(place)
    if path.is_dir():
        return _of_folder(_Folder(place.rstrip("/") or "/", source, None))
    # A file whose name has an asterisk in it is a file.
    if _WILDCARD.search(place) and not os.path.lexists(path):
        root, pattern = _cut_at_wildcard(place)
        return _of_folder(_Folder(root or ".", source, None), pattern=pattern)
    try:
        return _of_file(find_file(path), place, source)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, "there is no such folder or file on this machine") from error


def _in_s3(source: str, profile: str | None) -> Listing:
    bucket = source.removeprefix("s3://").partition("/")[0]
    if _WILDCARD.search(bucket):
        raise DataError(
            f"data.source = {source!r}: the bucket's name {bucket!r} has a wildcard, and one bucket is read; give its "
            "whole name, wildcards may stand after it, as in s3://bucket/web/*.jsonl"
        )
    if _WILDCARD.search(source):
        root, pattern = _cut_at_wildcard(source)
        return _of_folder(_Folder(root, source, profile), pattern=pattern)
    if _kind(PurePosixPath(source).name) is not None:
        # If there is no such object: a folder may have such a name, too.
        with suppress(KeyMissing):
            return _of_file(find_object(source, profile=profile), source, source)
    return _of_folder(_Folder(source.rstrip("/"), source, profile))


def _cut_at_wildcard(place: str) -> tuple[str, str]:
    """A glob's last folder without a wildcard, and the rest."""
    folder = place[: _WILDCARD.search(place).start()].rpartition("/")[0]  # pyright: ignore[reportOptionalMemberAccess]
    return folder, place[len(folder) :].lstrip("/")


def _what_to_give(source: str) -> str:
    given = f"give an existing folder of files ({ENDINGS}), one such file, a glob, or {PYTHON_STDLIB!r}"
    hub = _HUB_ID.search(source)
    if hub is None or "://" in source or Path(source).parent.exists() or _kind(hub[2]) is not None:
        return given
    return (
        f"{given}. If {hub[1]}/{hub[2]} is a dataset of the Hugging Face hub, download it first: `hf download "
        f"{hub[1]}/{hub[2]} --repo-type dataset --local-dir {hub[2]}`, then data.source='{hub[2]}/**/*.parquet'"
    )


# ---- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """place: its path or URL, without a slash at its end. source: as the user gave it."""

    place: str
    source: str
    profile: str | None

    def entries(self, *, recursive: bool, without: frozenset[str]) -> Iterator[Found | LeftOut]:
        if self.place.startswith("s3://"):
            for found in list_objects(self.place, recursive=recursive, profile=self.profile):
                hidden = any(part.startswith(".") for part in found.name.split("/"))
                yield LeftOut(found.name, "hidden") if hidden else found
        else:
            yield from _walk(Path(self.place), recursive, without, self.source)

    def read_json(self, name: str) -> dict[str, object]:
        with open_reading(f"{self.place}/{name}", profile=self.profile) as stream:
            record = json.loads(stream.read(_MAX_STATE_BYTES))
        if not isinstance(record, dict):
            raise ValueError(f"{self.place}/{name} holds no JSON object")
        return record


def _of_folder(folder: _Folder, *, pattern: str = "", without: frozenset[str] = frozenset()) -> Listing:
    recursive = not pattern or "/" in pattern or "**" in pattern
    found: list[Found] = []
    left_out: list[LeftOut] = []
    for entry in folder.entries(recursive=recursive, without=without):
        if pattern and not _is_asked_for(entry, pattern.split("/")):
            continue
        if isinstance(entry, LeftOut):
            left_out.append(entry)
        else:
            found.append(entry)
    if not pattern:
        found = _of_saved_dataset(folder, found)
    files: list[SourceFile] = []
    for entry in found:
        item = _source_file(entry, f"{folder.place}/{entry.name}")
        files += [item] if isinstance(item, SourceFile) else []
        left_out += [item] if isinstance(item, LeftOut) else []
    if not pattern and any(file.kind == "text" for file in files):
        # Code has its settings in such files; a dataset is not mixed with text.
        left_out += [
            LeftOut(file.name, "beside text", file.num_bytes, ".json") for file in files if file.kind == "json"
        ]
        files = [file for file in files if file.kind != "json"]
    if not files:
        raise DataError(_nothing(folder, pattern, sorted(left_out)))
    return Listing(sorted(files, key=lambda file: file.name), sorted(left_out))


def _nothing(folder: _Folder, pattern: str, left_out: list[LeftOut]) -> str:
    there = f"; there is {spelled(left_out[0].name)} ({left_out[0].reason})" if left_out else ""
    if pattern:
        return (
            f"data.source = {folder.source!r}: no file under {folder.place} matches {pattern!r} and is of a kind that "
            f"is read ({ENDINGS}){there}; * stands for characters other than /, and **/ for folders, any number of them"
        )
    return (
        f"data.source = {folder.source!r}: no file of a kind that is read ({ENDINGS}) under {folder.place}{there}; "
        f"give a folder that holds some, or {PYTHON_STDLIB!r}"
    )


def _walk(root: Path, recursive: bool, without: frozenset[str], source: str) -> Iterator[Found | LeftOut]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"data.source = {source!r}: {spelled(str(error.filename))} cannot be read: {error.strerror}; "
            "give this user permission to read it, or move it elsewhere"
        ) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        inside = Path(folder).relative_to(root)
        for name in [*folders, *names]:
            if name.startswith("."):
                yield LeftOut((inside / name).as_posix(), "hidden")
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                yield LeftOut((inside / name).as_posix(), "linked folder")
        if not recursive:
            folders.clear()
        for name in names:
            if not name.startswith("."):
                path, relative = Path(folder, name), (inside / name).as_posix()
                try:
                    yield replace(find_file(path), name=relative)
                except OSError:
                    yield LeftOut(relative, "no file")


def _is_asked_for(entry: Found | LeftOut, pattern: list[str]) -> bool:
    """Whether a glob takes it, or would take files in it if it were followed."""
    name, reason = entry.name.split("/"), entry.reason if isinstance(entry, LeftOut) else None
    if reason == "linked folder":
        beginnings = [pattern[:depth] for depth in range(1, len(pattern))]
        return any(_matches(name, each) for each in [*beginnings, *([pattern] if pattern[-1] == "**" else [])])
    # A glob takes no hidden files, as in a shell.
    return reason != "hidden" and _matches(name, pattern)


def _matches(name: list[str], pattern: list[str]) -> bool:
    """Of a path's parts: each fits its own as in a shell, and "**" any number of folders, also none."""
    if not name or not pattern:
        return name == pattern
    if pattern[0] == "**":
        return pattern[1:] == [] or any(_matches(name[depth:], pattern[1:]) for depth in range(len(name)))
    return fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def _of_saved_dataset(folder: _Folder, found: list[Found]) -> list[Found]:
    """Of what `datasets.save_to_disk` wrote, the files that hold its rows; anything else as it is."""
    names = {entry.name for entry in found}
    if HUGGING_FACE_SPLITS in names:
        splits = folder.read_json(HUGGING_FACE_SPLITS).get("splits")
        listed = [f"{folder.place}/{name}" for name in splits] if isinstance(splits, list) else []
        raise DataError(
            f"data.source = {folder.source!r} is a Hugging Face dataset of several splits: give one of them, "
            f"{some(listed)}"
        )
    if not names >= HUGGING_FACE:
        return found
    state = folder.read_json("state.json").get("_data_files")
    held = [str(file.get("filename")) for file in state if isinstance(file, dict)] if isinstance(state, list) else []
    if lacking := sorted({*held} - names):
        raise DataError(
            f"data.source = {folder.source!r} lacks {some(lacking)}, which its state.json names: copy the dataset again"
        )
    return [entry for entry in found if entry.name in held]


# ---- files -----------------------------------------------------------------------------------------------------------


def _kind(name: str) -> tuple[Kind, Compression] | None:
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix, "")
    kind = KINDS.get(PurePosixPath(path.stem).suffix if compression else path.suffix)
    return None if kind is None or (compression and kind in NEVER_PACKED) else (kind, compression)


def _source_file(found: Found, place: str) -> SourceFile | LeftOut:
    known = _kind(found.name)
    if known is not None:
        return SourceFile(found.name, place, found.num_bytes, *known, found.version)
    path = PurePosixPath(found.name.lower())
    if path.suffix in UNREAD_ENDINGS:
        inner = spelled(PurePosixPath(path.stem).suffix) if path.suffix in COMPRESSED_ENDINGS else ""
        return LeftOut(found.name, "unread kind", found.num_bytes, f"{inner[:20]}{path.suffix}")
    return LeftOut(found.name, "other kind", found.num_bytes)


def _of_file(found: Found, place: str, source: str) -> Listing:
    known = _kind(found.name)
    if known is None:
        ending = PurePosixPath(found.name).suffix or "nothing"
        raise DataError(f"data.source = {source!r}: a file that ends in {ending} is not read; give one of {ENDINGS}")
    kind, compression = known
    kind = "pieces" if kind == "text" else kind
    return Listing([SourceFile(found.name, place, found.num_bytes, kind, compression, found.version)], [])
