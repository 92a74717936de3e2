"""Stores in S3 (s3://bucket/prefix): copied into a folder of this machine, used from there.

A local folder is used in place.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from raynium.config.schema import DataSection
from raynium.data.manifest import MANIFEST_NAME, StoredFile, StoreManifest
from raynium.data.store import (
    local_manifest,
    no_store,
    refuse_other_data,
)
from raynium.data.tokens import unit_checksums
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import FileChecksums
from raynium.storage.local_files import exclusive, file_checksums, sync_folder, write_atomically
from raynium.storage.store import Store
from raynium.storage.verify import wrong_units

logger = logging.getLogger(__name__)

# Requests in flight: they hide S3's latency, and one stream of S3 is slower than any network card.
STREAMS = 8
# The most bytes of one request; each stream holds as many.
REQUEST_BYTES = 16 * 2**20


def find_identity(data: DataSection) -> str | None:
    """Of the store at `data.path`, from its manifest alone; None if there is no store yet.

    Raises DataError if what is there cannot be read, or is not the data.identity that the config asks for.
    """
    manifest = find_manifest(data.place)
    if manifest is None:
        return None
    refuse_other_data(manifest, data.identity, where=data.place)
    return manifest.identity


def find_identities(data: DataSection) -> list[str | None]:
    """`find_identity` of each store of a mixture, or of the one."""
    return [find_identity(each) for each in data.of_each_store()]


def find_manifest(path: str | Path) -> StoreManifest | None:
    """Of the store that `path` names; None if there is none. Raises DataError."""
    folder = local_path(path)
    if folder is not None:
        return local_manifest(folder)
    content = _fetch_manifest(str(path))
    return None if content is None else StoreManifest.parse(content, f"document store {path}")


def localize(path: str | Path, cache_dir: str | Path) -> Path:
    """A local folder with the store that `path` names: `path` itself, or for a URL a verified copy under `cache_dir`.

    Any number of processes may call it at once: one copies, the others wait for it. After a crash the files that
    arrived whole are kept. A store that was replaced at the same URL gets a folder of its own.

    Raises DataError if there is no store at the URL, it cannot be read, or what arrives differs from its manifest.
    """
    in_place = local_path(path)
    if in_place is not None:
        return in_place
    url = str(path)
    content = _fetch_manifest(url)
    if content is None:
        raise no_store(url)
    manifest = StoreManifest.parse(content, f"document store {url}")
    folder = cache_folder(url, cache_dir, hashlib.sha256(content).hexdigest()[:16])
    try:
        with exclusive(folder / ".copy.lock", f"copy of {url}"):
            # An earlier call verified the contents before it wrote the manifest: then sizes are enough.
            contents_verified = (folder / MANIFEST_NAME).exists()
            for file in manifest.files:
                expected = _fetch_units(url, file, manifest.unit_bytes, folder)
                if not _is_there(folder / file.name, expected, contents_verified):
                    _fetch_file(url, file.name, expected, folder / file.name)
            write_atomically(folder / MANIFEST_NAME, content)
    except OSError as error:
        raise DataError(
            f"{url} cannot be copied to {folder}: {error}; check permissions and free space there"
        ) from error
    return folder


def local_path(path: str | Path) -> Path | None:
    """The folder of this machine that `path` names, or None if it is the URL of something else."""
    plain = str(path).removeprefix("file://")
    return None if "://" in plain else Path(plain)


def _fetch_manifest(url: str) -> bytes | None:
    """None if there is none."""
    with _errors(url, "read"):
        try:
            return Store(url).read(MANIFEST_NAME)
        except KeyMissing:
            return None


def _fetch_units(url: str, file: StoredFile, unit_bytes: int, folder: Path) -> FileChecksums:
    """Those that are in the folder, if they are right; else they are copied there."""
    with contextlib.suppress(DataError):
        return unit_checksums(folder, file, unit_bytes)
    with _errors(url, "read"):
        try:
            content = Store(url).read(file.units_name)
        except KeyMissing:
            content = b""
    expected = file.units(content, unit_bytes, where=url)
    write_atomically(folder / file.units_name, content)
    return expected


def _is_there(path: Path, expected: FileChecksums, contents_verified: bool) -> bool:
    if not path.is_file() or path.stat().st_size != expected.size:
        return False
    return contents_verified or list(file_checksums(path, expected.unit_bytes).unit_crcs) == list(expected.unit_crcs)


def _fetch_file(url: str, name: str, expected: FileChecksums, target: Path) -> None:
    """Copy one file of the store; `target` appears only when all its checksums are right.

    Memory: REQUEST_BYTES for each of STREAMS, whatever the size of the file.
    """
    partial = target.with_name(name + ".partial")
    units_at_once = max(1, REQUEST_BYTES // expected.unit_bytes)
    with (
        _errors(url, "read"),
        partial.open("wb", buffering=0) as file,
        ThreadPoolExecutor(STREAMS, thread_name_prefix="data-copy") as pool,
    ):
        store = Store(url)

        def fetch(units: range) -> None:
            begin = units.start * expected.unit_bytes
            content = memoryview(bytearray(min(units.stop * expected.unit_bytes, expected.size) - begin))
            store.read_into(name, begin, content)
            if wrong := wrong_units(content, expected, units):
                raise DataError(
                    f"{url}/{name} is damaged: unit {wrong[0]} of {expected.unit_bytes:,} bytes has not the checksum "
                    f"in {MANIFEST_NAME}; `raynium data verify {url}` finds all damage; build or upload the store again"
                )
            while content:
                written = os.pwrite(file.fileno(), content, begin)
                begin, content = begin + written, content[written:]

        number = len(expected.unit_crcs)
        lots = [range(first, min(first + units_at_once, number)) for first in range(0, number, units_at_once)]
        try:
            for _ in pool.map(fetch, lots):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        os.fsync(file.fileno())
    partial.replace(target)
    sync_folder(target.parent)


@contextmanager
def _errors(url: str, done: str) -> Iterator[None]:
    """Storage's errors become the data's: they name the place, the cause and what to do."""
    try:
        yield
    except StoreError as error:
        raise DataError(f"data.path = {url!r} cannot be {done}: {error}") from error


def cache_folder(url: str, cache_dir: str | Path, version: str) -> Path:
    """version: what distinguishes folders of the same URL."""
    return Path(cache_dir) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{version}"
