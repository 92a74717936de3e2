"""Whether all bytes of a document store are those that were built, wherever it lies. No torch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raynium.data.manifest import MANIFEST_NAME, StoreManifest
from raynium.data.remote import find_manifest
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store
from raynium.storage.verify import READERS, stored, wrong_bytes, wrong_size


def verify_store(path: str | Path) -> StoreManifest:
    """Read every byte of the store in this folder or at this URL; returns its manifest if all are right.

    DataError names each damaged range of each file, or says that there is no store or that it cannot be read.
    """
    manifest = find_manifest(path)
    if manifest is None:
        raise DataError(f"{path} is no document store: it has no {MANIFEST_NAME}; give the folder or URL of one")
    damages = []
    try:
        store = Store(path)
        with ThreadPoolExecutor(READERS, thread_name_prefix="data-verify") as pool:
            for file in manifest.files:
                try:
                    content = store.read(file.units_name)
                except KeyMissing:
                    content = b""
                try:
                    expected = file.units(content, manifest.unit_bytes, where=str(path))
                except DataError:
                    damages.append(f"{file.units_name} is missing or damaged: {file.name} cannot be verified")
                    continue
                there = stored(store, file.name)
                found = there[0] if there is not None else None
                problem = wrong_size(found, expected.size, unit_bytes=expected.unit_bytes)
                problems = [problem] if problem is not None else []
                problems += wrong_bytes(store, file.name, expected, found=found, pool=pool)
                damages += [f"{file.name} {each.reason}: bytes {each.begin:,} to {each.end:,}" for each in problems]
    except StoreError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if damages:
        raise DataError(
            f"document store {path} is damaged:"
            + "".join(f"\n  - {damage}" for damage in damages)
            + "\nNothing trains on these bytes. Delete the store, and build or copy it again"
        )
    return manifest
