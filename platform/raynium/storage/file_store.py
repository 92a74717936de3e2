"""A store in a folder. Every node of the run must see the same folder (a laptop's disk, or FSx/EFS/NFS). No torch."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from raynium.errors import StoreError
from raynium.storage.backend import Head, KeyExists, KeyMissing, Listing, refuse_large
from raynium.storage.checksum import PART_BYTES, FileChecksums, checksum_units
from raynium.storage.local_files import mapped, sync_folder

# No key may begin with a dot, so listings tell these apart.
_TEMPORARY_PREFIX = ".tmp-"
_PROBE_BYTES = 64 * 1024
_FOLDER_ATTEMPTS = 5
# Of one system call; IOV_MAX is 1,024.
_MAX_BUFFERS = 1000

_REMEDIES = {
    errno.EACCES: "give this user write permission there, or set run.root to a folder it owns",
    errno.EPERM: "give this user write permission there, or set run.root to a folder it owns",
    errno.EROFS: "the file system is mounted read-only: remount it, or set run.root to another",
    errno.ENOSPC: "free space there, or set run.root to a larger file system",
    errno.EDQUOT: "raise the quota or free space there, or set run.root to another file system",
    errno.ENOTDIR: "a file is where a folder is needed: remove it, or set run.root to another folder",
    errno.EISDIR: "a folder is where a file is needed: remove it, or set run.root to another folder",
    errno.EMLINK: "the file system cannot make hard links, which exclusive creation needs: use another, or s3://",
    errno.EOPNOTSUPP: "the file system cannot make hard links, which exclusive creation needs: use another, or s3://",
}


class FileBackend:
    """Keys are paths under `root`. A key appears by link or rename of a finished, synced temporary file beside it."""

    def __init__(self, root: Path):
        self.root = root

    def put(self, key: str, data: bytes, *, exclusive: bool) -> None:
        with self._errors(key), self._new_file(key, exclusive=exclusive) as file:
            file.write(data)

    def read(self, key: str, *, max_bytes: int) -> bytes:
        # A folder is not a key: `head` refuses it.
        self.head(key)
        # Whatever replaces the file, the one opened here is read.
        with self._errors(key), (self.root / key).open("rb") as file:
            refuse_large(self._uri(key), os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        waiting, position = list(buffers), start
        with self._errors(key), (self.root / key).open("rb", buffering=0) as file:
            while waiting:
                count = os.preadv(file.fileno(), waiting[:_MAX_BUFFERS], position)
                if count == 0:
                    needed = position + sum(map(len, waiting))
                    raise StoreError(f"{self._uri(key)} ends at byte {position:,} of {needed:,} needed")
                position += count
                waiting = after(waiting, count)

    def head(self, key: str) -> Head:
        with self._errors(key):
            path = self.root / key
            # As in S3, a folder is not a key.
            if path.is_dir():
                raise KeyMissing(f"{self._uri(key)} does not exist")
            stat = path.stat()
        return Head(stat.st_size, None, str(stat.st_mtime_ns))

    def list(self, folder: str, *, recursive: bool) -> Listing:
        stats: dict[str, os.stat_result] = {}
        folders: list[str] = []
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            for entry in self._entries(current):
                name = f"{current}/{entry.name}" if current else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (waiting if recursive else folders).append(name)
                else:
                    try:
                        stats[name] = entry.stat()
                    except FileNotFoundError:
                        # Deleted since we read the folder: then it is not there.
                        continue
        found = sorted(stats.items())
        return Listing(
            sizes={key: stat.st_size for key, stat in found},
            modified_unix={key: stat.st_mtime for key, stat in found},
            versions={key: str(stat.st_mtime_ns) for key, stat in found},
            folders=tuple(sorted(folders)),
        )

    def delete(self, key: str) -> None:
        with self._errors(key):
            (self.root / key).unlink(missing_ok=True)

    def delete_prefix(self, folder: str) -> int:
        count = len(self.list(folder, recursive=True).sizes)
        with self._errors(folder):
            # Not shutil.rmtree: another process may delete, or begin to write, in here at the same time
            for current, _, names in os.walk(self.root / folder, topdown=False, onerror=_raise_unless_missing):
                for name in names:
                    Path(current, name).unlink(missing_ok=True)
                try:
                    Path(current).rmdir()
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                        raise
        return count

    def discard_unfinished(self, under: str, *, older_than_unix: float) -> int:
        count = 0
        with self._errors(under):
            for path in self._temporary_files(self.root / under):
                try:
                    if path.stat().st_mtime < older_than_unix:
                        path.unlink()
                        count += 1
                except FileNotFoundError:
                    # Its writer has just finished, or another process discards too.
                    continue
        return count

    def _temporary_files(self, under: Path) -> Iterator[Path]:
        """Those of writes to the key `under`, and to keys in the folder of that name."""
        if under != self.root and under.parent.is_dir():
            yield from under.parent.glob(f"{_TEMPORARY_PREFIX}{under.name}-*")
        if under.is_dir():
            for current, _, names in os.walk(under, onerror=_raise_unless_missing):
                yield from (Path(current, name) for name in names if name.startswith(_TEMPORARY_PREFIX))

    def upload_file(self, key: str, path: Path, *, unit_bytes: int) -> FileChecksums:
        crcs: list[int] = []
        part_bytes = max(1, PART_BYTES // unit_bytes) * unit_bytes
        with self._errors(key, source=path), path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            view = mapped(source, size)
            with self._new_file(key, exclusive=True) as file:
                for begin in range(0, size, part_bytes):
                    part = view[begin : begin + part_bytes]
                    crcs += checksum_units(part, unit_bytes).unit_crcs
                    file.write(part)
        return FileChecksums(size, unit_bytes, tuple(crcs))

    def check_reachable(self, *, need_bytes: int) -> None:
        probe = f"probe-{uuid4().hex}"
        # The probe is large enough to meet a full disk.
        self.put(probe, bytes(_PROBE_BYTES), exclusive=True)
        self.delete(probe)
        with self._errors(""):
            free = shutil.disk_usage(self.root).free
        if free < need_bytes:
            raise StoreError(
                f"file://{self.root} has {free:,} bytes free and the run needs {need_bytes:,}: "
                "free space there, lower checkpoint.keep_last, or set run.root to a larger file system"
            )

    def _uri(self, key: str) -> str:
        return f"file://{self.root}/{key}".rstrip("/")

    def _entries(self, folder: str) -> Sequence[os.DirEntry[str]]:
        with self._errors(folder):
            try:
                with os.scandir(self.root / folder) as entries:
                    return list(entries)
            except FileNotFoundError:
                # As in S3, a folder is there only if a key is in it.
                return []

    @contextmanager
    def _new_file(self, key: str, *, exclusive: bool) -> Iterator[BinaryIO]:
        """A file to write, which becomes `key` when the block ends well and vanishes when it does not."""
        target = self.root / key
        temporary = target.parent / f"{_TEMPORARY_PREFIX}{target.name}-{uuid4().hex}"
        try:
            with _new_in_new_folder(temporary) as file:
                yield _WholeWrites(file)  # pyright: ignore[reportReturnType]
                # Else a crash of the machine could leave the name without its bytes.
                os.fsync(file.fileno())
            try:
                if exclusive:
                    # Unlike rename, link fails if the name is taken.
                    os.link(temporary, target)
                else:
                    temporary.replace(target)
            except FileNotFoundError as error:
                # Not tried again: somebody took its writer for dead.
                raise StoreError(
                    f"{self._uri(key)}: its unfinished file was deleted while it was written; see who deletes there "
                    "(rm, another driver of this run), and write it again if that was not meant"
                ) from error
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)

    @contextmanager
    def _errors(self, key: str, source: Path | None = None) -> Iterator[None]:
        """Turn the operating system's errors into StoreErrors that say what to do."""
        try:
            yield
        except FileExistsError as error:
            # This is not from link(): a file is in the way of a folder.
            if error.filename2 is None:
                raise StoreError(f"{self._uri(key)}: {error}; {_REMEDIES[errno.ENOTDIR]}") from error
            raise KeyExists(f"{self._uri(key)} exists already; another writer was first") from error
        except FileNotFoundError as error:
            if source is not None and error.filename == str(source):
                raise StoreError(f"cannot upload {source} to {self._uri(key)}: there is no such file") from error
            raise KeyMissing(f"{self._uri(key)} does not exist") from error
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "check the file system")
            raise StoreError(f"{self._uri(key)}: {error.strerror or error}; {remedy}") from error


def _new_in_new_folder(path: Path) -> BinaryIO:
    """Create `path` for writing, and its folder.

    Whoever deletes the last key of a folder removes the folder too, perhaps between the two: nothing of ours was in
    it, so to make it again is right. Once the file is there nobody removes the folder without deleting the file.
    """
    for attempt in range(1, _FOLDER_ATTEMPTS + 1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb", buffering=0)  # pyright: ignore[reportReturnType]
        except (FileNotFoundError, FileExistsError):
            # mkdir says FileExistsError of a folder that is gone when it looks.
            if attempt == _FOLDER_ATTEMPTS:
                raise
    raise AssertionError("returned or raised above")


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class _WholeWrites:
    """An unbuffered file whose `write` writes all of its argument (the system call may stop short)."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left to fill of `buffers` once the first `count` bytes are."""
    left = list(buffers)
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
    return left
