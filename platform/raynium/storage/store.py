"""The run's store: one folder, on a file system or in S3, that holds everything a run keeps. No torch.

    Store("/data/runs/first")            a folder of this machine, or of a file system that all nodes mount
    Store("file:///data/runs/first")     the same folder
    Store("s3://bucket/runs/first")      S3, through s3fs; reads the usual AWS environment

Two writers may race for one key: `write_new` and `upload_file` create a key or raise `KeyExists`, and a key is
never seen half-written. Every failure is a `StoreError` that names the store, the key, the cause and what to do.
"""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from raynium.config.local_folders import local_path
from raynium.config.plain_file import read_plain
from raynium.errors import StoreError
from raynium.storage.backend import Backend, KeyMissing, Listing
from raynium.storage.checksum import UNIT_BYTES, FileChecksums

# `read` is for records and manifests; data goes through `read_into`.
MAX_READ_BYTES = 2**30
# No leading dot: those are our temporary files.
_KEY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}", re.ASCII)
# Of pyarrow's and fsspec's addresses. They may hold secrets.
_OPTIONS = re.compile(r"[?&][^/?&=]+=")
# S3 allows 1,024 bytes, of which the store's own prefix takes some.
_MAX_KEY_CHARS = 700


class Store:
    """One run's folder (or, for the driver, the folder of all runs). Safe to use from several threads and processes.

    url: a path, a file:// URL or an s3:// URL; StoreError for any other. `options` go to s3fs
    (`endpoint_url`, `key`, `secret`); without them it reads the AWS environment and profile.
    """

    def __init__(
        self, url: str | Path, *, options: Mapping[str, Any] | None = None, limit_seconds: float | None = None
    ):
        """limit_seconds: a call that takes longer fails; None: S3 has a limit for each request, a file system none."""
        self.url, self._backend = open_backend(str(url), options or {}, limit_seconds=limit_seconds)
        self._options, self._limit_seconds = options, limit_seconds

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def child(self, folder: str) -> "Store":
        """The same storage, one or more levels down."""
        return Store(self.uri(folder), options=self._options, limit_seconds=self._limit_seconds)

    def uri(self, key: str) -> str:
        """Where `key` lies, for people, logs and MLflow."""
        return f"{self.url}/{checked_key(key)}"

    @property
    def local_path(self) -> Path | None:
        """The folder, on a file system; None in S3."""
        return Path(self.url.removeprefix("file://")) if self.url.startswith("file://") else None

    def write_new(self, key: str, data: bytes) -> None:
        """Create `key`. KeyExists if another call of this, anywhere, created it; this call's own retries are known."""
        self._backend.put(checked_key(key), data, exclusive=True)

    def replace(self, key: str, data: bytes) -> None:
        """Write `key` whole, over what was there. Readers see the old or the new bytes, never a mixture."""
        self._backend.put(checked_key(key), data, exclusive=False)

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """All of a small object. KeyMissing; StoreError if it is larger than `max_bytes`."""
        return self._backend.read(checked_key(key), max_bytes=max_bytes)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`. KeyMissing; StoreError if the object ends before."""
        buffer = bytearray(length)
        self.read_into(key, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, key: str, start: int, *buffers: memoryview) -> None:
        """Fill `buffers` (flat bytes), one after the other, from byte `start` of `key`, in one request.

        KeyMissing; StoreError if the object ends before.
        """
        if filled := [buffer for buffer in buffers if len(buffer)]:
            self._backend.read_into(checked_key(key), start, filled)

    def size(self, key: str) -> int:
        """Bytes of `key`. KeyMissing."""
        return self._backend.head(checked_key(key)).num_bytes

    def stored_checksum(self, key: str) -> tuple[int, str | None]:
        """Bytes of `key`, and the CRC64NVME (base64) that the server keeps of it, in one request. KeyMissing.

        None where it keeps none: file systems, and S3 servers older than that checksum.
        """
        return self._backend.head(checked_key(key))[:2]

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except KeyMissing:
            return False
        return True

    def list(self, folder: str = "", *, recursive: bool = True) -> Listing:
        """Everything under `folder` ("" is the whole store), however many; nothing if there is no such folder.

        recursive=False lists one level: the keys in it, and the folders.
        """
        return self._backend.list(checked_key(folder) if folder else "", recursive=recursive)

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens if it is not there."""
        self._backend.delete(checked_key(key))

    def delete_prefix(self, folder: str) -> int:
        """Remove all keys under `folder`, which may not be the whole store. Returns how many there were.

        Several may do so at once; what one writes there meanwhile may stay.
        """
        return self._backend.delete_prefix(checked_key(folder))

    def discard_unfinished(self, under: str = "", *, older_than_unix: float) -> int:
        """Remove what killed writers left of the key `under`, or in the folder of that name ("" is the whole store).

        In S3 these are multipart uploads begun before that time, which no listing shows and which are paid for; on a
        file system, temporary files not written to since then. Returns how many there were. A writer that still works
        on one fails, so give it time (hours), or know that it is dead.
        """
        return self._backend.discard_unfinished(checked_key(under) if under else "", older_than_unix=older_than_unix)

    def upload_file(self, key: str, path: str | Path, *, unit_bytes: int = UNIT_BYTES) -> FileChecksums:
        """Create `key` from a file of any size, durably, and say what was sent. KeyExists if it is there already.

        The file is sent from the page cache without a copy, so it must not change before this returns; S3 checks the
        checksums on arrival and refuses bytes that changed. Whatever ends this early, the key does not appear.
        """
        return self._backend.upload_file(checked_key(key), Path(path), unit_bytes=unit_bytes)

    def check_writable(self, *, need_bytes: int = 0) -> None:
        """Write, read and delete a probe, so that a run that could not save fails before it starts.

        Every permission that a run needs is tried, on S3 also for multipart uploads. need_bytes: also refuse a file
        system with less free space (S3 has no such limit). StoreError; a probe that may not be deleted stays.
        """
        probe = f"probe-{uuid4().hex}"
        data = probe.encode()
        self._backend.check_reachable(need_bytes=need_bytes)
        self.write_new(probe, data)
        if self.read(probe) != data:
            raise StoreError(f"{self.url} does not give back what was written to it; use another store")
        # Last, since a role without s3:DeleteObject leaves this one key, and the error names it.
        self.delete(probe)


def checked_key(key: str) -> str:
    """`key` itself if it names something inside a store. StoreError otherwise."""
    if len(key) > _MAX_KEY_CHARS or not all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        raise StoreError(
            f"{key[:200]!r} is not a valid key: use parts of letters, digits and ._=+- that start with a letter or "
            f"digit, joined by single slashes, at most {_MAX_KEY_CHARS} characters in all"
        )
    return key


def read_place(place: str, *, max_bytes: int) -> bytes:
    """All of one file that a user has named, by its path or URL. Raises OSError or StoreError."""
    if "://" not in place:
        return read_plain(place, max_bytes=max_bytes)
    folder, _, name = place.rpartition("/")
    return Store(folder).read(name, max_bytes=max_bytes)


def open_backend(url: str, options: Mapping[str, Any], *, limit_seconds: float | None = None) -> tuple[str, Backend]:
    """The normalised address (never with credentials, so it can be logged) and the backend for `url`.

    What follows the scheme is taken character for character, as AWS's own tools do with a key: `%20` is no space, and
    `#` and `?` begin nothing.
    """
    if "://" not in url:
        url = f"file://{local_path(url)}"
    scheme, _, place = url.partition("://")
    bucket, _, folder = place.partition("/")
    scheme, folder = scheme.lower(), folder.rstrip("/")
    # Not echoed: it may hold a secret.
    if "@" in bucket or (scheme != "file" and _OPTIONS.search(place)):
        raise StoreError(
            f"a {scheme}:// store address may not hold credentials or options (?name=value), because addresses are "
            "logged: put credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a profile"
        )
    if ".." in folder.split("/"):
        raise StoreError(f"{url!r} holds '..': give the folder's own path")
    if scheme == "file":
        return _open_file(url, bucket, folder, limit_seconds)
    if scheme == "s3":
        return _open_s3(url, bucket, folder, dict(options), limit_seconds)
    raise StoreError(f"{url!r} has the scheme {scheme!r}: use a path, file:// or s3://")


def _open_file(url: str, host: str, folder: str, limit_seconds: float | None) -> tuple[str, Backend]:
    from raynium.storage.file_store import FileBackend

    if host not in ("", "localhost") or not folder:
        raise StoreError(f"{url!r} is not a local folder: a file address has three slashes, as in file:///data/runs")
    _refuse_unprintable(url)
    folder = folder.lstrip("/")
    url, backend = f"file:///{folder}", FileBackend(Path(f"/{folder}"))
    if limit_seconds is None:
        return url, backend
    # Ranks have none, and are to import nothing.
    from raynium.storage.limited import limited

    return url, limited(backend, url=url, seconds=limit_seconds)


def _open_s3(
    url: str, bucket: str, folder: str, options: dict[str, Any], limit_seconds: float | None
) -> tuple[str, Backend]:
    # s3fs takes a second to import, and whoever uses files must not pay it.
    from raynium.storage.s3_store import S3Backend

    if not bucket:
        raise StoreError(f"{url!r} names no bucket: write s3://bucket/folder")
    if bucket.startswith("arn:"):
        raise StoreError(
            f"{url!r} names a bucket by an ARN: give the access point's alias in its place (its name ends in -s3alias; "
            "`aws s3control get-access-point` prints it), as in s3://name-of-it-s3alias/folder"
        )
    # S3 keeps an empty folder name; some servers drop it from some answers and not from others. A backslash is a
    # character to S3, and a slash to SeaweedFS.
    for unsure in ("//", "\\"):
        if unsure in f"/{folder}":
            raise StoreError(f"{url!r} holds {unsure!r}: separate folders by single slashes")
    _refuse_unprintable(url)
    return f"s3://{bucket}/{folder}".rstrip("/"), S3Backend(bucket, folder, options, limit=limit_seconds)


def _refuse_unprintable(url: str) -> None:
    """What no terminal shows, no XML answer of S3 carries, or no file of ours can hold as text."""
    if bad := [character for character in url if unicodedata.category(character) in ("Cc", "Cs")]:
        raise StoreError(
            f"the store address {url!a} holds {bad[0]!a}, which is no character of a text: rename the folder. If its "
            "name looks right to you, this shell's locale is not UTF-8 (see `locale`; LC_ALL=C.UTF-8 is)"
        )
