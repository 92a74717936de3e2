"""Stores in S3 (s3://bucket/prefix): copied into a folder of this machine, used from there.

A local folder is used in place.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from raynium.config.schema import DataSection
from raynium.data.manifest import MANIFEST_NAME, StoreManifest
from raynium.data.store import (
    DocumentStore,
    local_manifest,
    no_store,
    open_store,
    refuse_other_data,
    refuse_other_recipe,
    refuse_other_tokenizer,
    refuse_small_vocabulary,
)
from raynium.data.store_build import build_store
from raynium.data.survey import Survey, Tell, survey
from raynium.data.tokenizer import Tokenizer, check_vocab_size
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyExists, KeyMissing
from raynium.storage.checksum import FileChecksums, to_text
from raynium.storage.local_files import exclusive, file_checksums, sync_folder, write_atomically
from raynium.storage.store import Store
from raynium.storage.verify import wrong_units

logger = logging.getLogger(__name__)

# Requests in flight: they hide S3's latency, and one stream of S3 is slower than any network card.
STREAMS = 8
# The most bytes of one request; each stream holds as many.
REQUEST_BYTES = 16 * 2**20


def check_data(data: DataSection, *, model_vocab_size: int, tell: Tell) -> Survey | None:
    """All that can be known of the data before anything is written: the store's manifest if there is one, else the
    tokenizer and every document of the source, of which it returns the survey for `prepare_store`.

    Raises DataError if there is neither store nor source, or if they do not fit the config.
    """
    if data.end_of_document is not None and data.tokenizer is None:
        raise DataError(
            f"data.end_of_document = {data.end_of_document!r} names a token of data.tokenizer, which is not set; set "
            "both, or neither: a tokenizer that is trained here has its own"
        )
    manifest = find_manifest(data.path)
    if manifest is not None:
        _refuse_unfit(manifest, data, model_vocab_size=model_vocab_size)
        return None
    if data.source is None:
        raise no_store(data.path)
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer, end_of_document=data.end_of_document)
        refuse_small_vocabulary(model_vocab_size, tokenizer.vocab_size, f"tokenizer {data.tokenizer!r}")
    else:
        check_vocab_size(model_vocab_size)
    found = survey(data.source, heldout_fraction=data.heldout_fraction, max_left_out=data.max_left_out, tell=tell)
    # No tokenizer makes more of a document than a token of each byte, one before it and one after it.
    most_tokens = found.num_train_bytes + 2 * len(found.train_bytes)
    if most_tokens <= data.seq_len:
        raise DataError(
            f"data.source = {data.source!r} has at most {most_tokens:,} training tokens; one sample takes "
            f"data.seq_len + 1 = {data.seq_len + 1}. Give more text, or a shorter data.seq_len"
        )
    return found


def prepare_store(
    data: DataSection,
    *,
    model_vocab_size: int,
    cache_dir: str | Path,
    surveyed: Survey | None = None,
    tell: Tell = logger.info,
) -> DocumentStore:
    """What the driver calls before training: the config's store, built first if it is missing and `source` is given.

    A store at a URL is built in `cache_dir` and then uploaded. surveyed: from `check_data`. Raises DataError if there
    is neither store nor source, or if the store does not fit the config.
    """
    path = local_path(data.path)
    if data.source is not None and (path is not None or find_manifest(data.path) is None):
        store = build_store(
            path or _cache_folder(data.path, cache_dir, "build"),
            source=data.source,
            vocab_size=model_vocab_size,
            tokenizer_path=data.tokenizer,
            end_of_document=data.end_of_document,
            heldout_fraction=data.heldout_fraction,
            max_left_out=data.max_left_out,
            surveyed=surveyed,
            tell=tell,
        )
        if path is None:
            publish(store, data.path)
    store = open_store(localize(data.path, cache_dir), identity=data.identity)
    _refuse_unfit(store.manifest, data, model_vocab_size=model_vocab_size)
    return store


def _refuse_unfit(manifest: StoreManifest, data: DataSection, *, model_vocab_size: int) -> None:
    """Raises DataError if the store is not the one that the config means."""
    refuse_other_data(manifest, data.identity, where=data.path)
    if data.source is not None:
        refuse_other_recipe(manifest, source=data.source, heldout_fraction=data.heldout_fraction, where=data.path)
    refuse_other_tokenizer(
        manifest,
        model_vocab_size=model_vocab_size,
        path=data.tokenizer,
        end_of_document=data.end_of_document,
        where=data.path,
    )


def find_identity(data: DataSection) -> str | None:
    """Of the store at `data.path`, from its manifest alone; None if there is no store yet.

    Raises DataError if what is there cannot be read, or is not the data.identity that the config asks for.
    """
    manifest = find_manifest(data.path)
    if manifest is None:
        return None
    refuse_other_data(manifest, data.identity, where=data.path)
    return manifest.identity


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
    folder = _cache_folder(url, cache_dir, hashlib.sha256(content).hexdigest()[:16])
    try:
        with exclusive(folder / ".copy.lock", f"copy of {url}"):
            # An earlier call verified the contents before it wrote the manifest: then sizes are enough.
            contents_verified = (folder / MANIFEST_NAME).exists()
            for name, expected in manifest.checksums.items():
                if not _is_there(folder / name, expected, contents_verified):
                    _fetch_file(url, name, expected, folder / name)
            write_atomically(folder / MANIFEST_NAME, content)
    except OSError as error:
        raise DataError(
            f"{url} cannot be copied to {folder}: {error}; check permissions and free space there"
        ) from error
    return folder


def publish(store: DocumentStore, url: str) -> None:
    """Upload a store, manifest last, so that nobody sees half of it.

    What an upload that died left there is used or replaced. Raises DataError if the URL cannot be written, or has
    another store by now.
    """
    with _errors(url, "written"):
        target = Store(url)
        for name, expected in store.manifest.checksums.items():
            try:
                target.upload_file(name, store.path / name)
            except KeyExists:
                if target.stored_checksum(name) != (expected.size, to_text(expected.crc)):
                    target.delete(name)
                    target.upload_file(name, store.path / name)
        try:
            target.write_new(MANIFEST_NAME, store.manifest.to_json())
        except KeyExists as error:
            if find_manifest(url) != store.manifest:
                raise DataError(
                    f"document store {store.path} cannot be uploaded to {url}: another one was put there meanwhile; "
                    "give another data.path"
                ) from error
    logger.info("uploaded document store %s to %s", store.path, url)


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


def _cache_folder(url: str, cache_dir: str | Path, version: str) -> Path:
    """version: what distinguishes folders of the same URL."""
    return Path(cache_dir) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{version}"
