"""Stores behind a URL (s3://bucket/prefix): copied into a folder of this machine, used from there.

A local folder is used in place. Anything fsspec knows is a URL.
"""

import hashlib
import logging
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from raynium.config.schema import DataSection
from raynium.data.manifest import MANIFEST_NAME, Manifest, StoredFile
from raynium.data.store import DocumentStore, open_store
from raynium.data.store_build import build_store
from raynium.errors import DataError
from raynium.storage.local_files import checksum, exclusive, write_atomically

logger = logging.getLogger(__name__)


def prepare_store(data: DataSection, *, model_vocab_size: int, cache_dir: str | Path) -> DocumentStore:
    """What the driver calls before training: the config's store, built first if it is missing and `source` is given.

    A store at a URL is built in `cache_dir` and then uploaded. Raises DataError if there is neither store nor source,
    or if the store does not fit the config.
    """
    path = local_path(data.path)
    if data.source is not None and (path is not None or _fetch_manifest(data.path) is None):
        store = build_store(
            path or _cache_folder(data.path, cache_dir, "build"),
            source=data.source,
            vocab_size=model_vocab_size,
            tokenizer_path=data.tokenizer,
            heldout_fraction=data.heldout_fraction,
        )
        if path is None:
            publish(store, data.path)
    store = open_store(localize(data.path, cache_dir))
    if data.source is not None:
        store.check_recipe(source=data.source, heldout_fraction=data.heldout_fraction)
    store.check_fits(model_vocab_size=model_vocab_size, tokenizer_path=data.tokenizer)
    return store


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
        raise DataError(
            f"data.path = {url!r} is no document store: it has no {MANIFEST_NAME}; "
            "set data.source to build one there, or give the URL of a finished store"
        )
    manifest = Manifest.parse(content, f"document store {url}")
    folder = _cache_folder(url, cache_dir, hashlib.sha256(content).hexdigest()[:16])
    try:
        with exclusive(folder / ".copy.lock", f"copy of {url}"):
            contents_verified = (folder / MANIFEST_NAME).exists()  # by an earlier call: then sizes are enough
            for file in manifest.files:
                target = folder / file.name
                right_size = target.is_file() and target.stat().st_size == file.size_bytes
                if not (right_size and (contents_verified or checksum(target) == file.crc64nvme)):
                    _fetch_file(url, file, target)
            write_atomically(folder / MANIFEST_NAME, content)
    except OSError as error:
        raise DataError(
            f"{url} cannot be copied to {folder}: {error}; check permissions and free space there"
        ) from error
    return folder


def publish(store: DocumentStore, url: str) -> None:
    """Upload a store, manifest last, so that nobody sees half of it. Raises DataError if the URL cannot be written."""
    file_system, root = _file_system(url)
    try:
        file_system.makedirs(root, exist_ok=True)
        for name in [*(file.name for file in store.manifest.files), MANIFEST_NAME]:
            file_system.put_file(str(store.path / name), f"{root}/{name}")
    except Exception as error:  # each kind of storage has its own errors
        raise DataError(
            f"document store {store.path} cannot be uploaded to {url}: {error}; "
            "check the URL, credentials and permissions"
        ) from error
    logger.info("uploaded document store %s to %s", store.path, url)


def local_path(path: str | Path) -> Path | None:
    """The folder of this machine that `path` names, or None if it is the URL of something else."""
    plain = str(path).removeprefix("file://")
    return None if "://" in plain else Path(plain)


def _fetch_manifest(url: str) -> bytes | None:
    """None if there is none."""
    file_system, root = _file_system(url)
    try:
        content = file_system.cat_file(f"{root}/{MANIFEST_NAME}")
    except FileNotFoundError:
        return None
    except Exception as error:
        raise DataError(f"{url} cannot be read: {error}; check the URL, credentials and permissions") from error
    assert isinstance(content, bytes)
    return content


def _fetch_file(url: str, file: StoredFile, target: Path) -> None:
    """Copy one file of the store; `target` appears only when its checksum is right."""
    file_system, root = _file_system(url)
    partial = target.with_name(file.name + ".partial")
    try:
        file_system.get_file(f"{root}/{file.name}", str(partial))
    except Exception as error:
        raise DataError(
            f"{url}/{file.name} cannot be copied to {target}: {error}; check access and free space"
        ) from error
    if checksum(partial) != file.crc64nvme:
        raise DataError(
            f"{url}/{file.name} is damaged: its checksum is not the one in {MANIFEST_NAME}; "
            "build or upload the store again"
        )
    partial.replace(target)


def _cache_folder(url: str, cache_dir: str | Path, version: str) -> Path:
    """version: what distinguishes folders of the same URL."""
    return Path(cache_dir) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{version}"


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path in it, without a slash at its end."""
    try:
        file_system, root = url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose library is not installed
        raise DataError(f"data.path = {url!r} cannot be opened: {error}; give a folder or an s3:// URL") from error
    return file_system, root.rstrip("/")
