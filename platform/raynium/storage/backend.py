"""What a kind of storage must do, and the words that stores and backends share. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from raynium.errors import StoreError
from raynium.storage.checksum import FileChecksums


class KeyExists(StoreError):
    """An exclusive create found the key taken; nothing was written."""


class KeyMissing(StoreError):
    """The key to read does not exist."""


class Head(NamedTuple):
    """What storage says of a key without reading it.

    crc64nvme: base64; None where the server keeps none: file systems, and S3 servers older than that checksum. version:
    another one whenever the bytes are others: S3's ETag, or a file's time of writing in nanoseconds.
    """

    num_bytes: int
    crc64nvme: str | None
    version: str


@dataclass(frozen=True)
class Listing:
    """What lies under a folder; names are relative to the store.

    sizes: key → bytes. modified_unix: key → seconds by the storage's clock, on S3 whole ones. versions: key → as in
    `Head`. folders: one level down, without the closing slash; empty for a recursive listing.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    modified_unix: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()


class Backend(Protocol):
    """What a kind of storage must do. Keys are already checked and relative to the store; errors are StoreErrors."""

    def put(self, key: str, data: bytes, *, exclusive: bool) -> None: ...
    # One version of it, also while it is being replaced.
    def read(self, key: str, *, max_bytes: int) -> bytes: ...
    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None: ...
    def head(self, key: str) -> Head: ...
    def list(self, folder: str, *, recursive: bool) -> Listing: ...
    def delete(self, key: str) -> None: ...
    def delete_prefix(self, folder: str) -> int: ...
    def discard_unfinished(self, under: str, *, older_than_unix: float) -> int: ...
    def upload_file(self, key: str, path: Path, *, unit_bytes: int) -> FileChecksums: ...
    def check_reachable(self, *, need_bytes: int) -> None: ...


def refuse_large(uri: str, size: int, max_bytes: int) -> None:
    """For backends: before anything is read."""
    if size > max_bytes:
        raise StoreError(f"{uri} has {size:,} bytes, more than the {max_bytes:,} a record may have")
