"""Whether nodes copy a store or stream it (`data.access`), and what either needs of them."""

import hashlib
from pathlib import Path

from raynium.config.local_folders import scratch_folder
from raynium.config.schema import DataSection
from raynium.data.manifest import StoreManifest
from raynium.data.packing.packer import window_tokens
from raynium.data.remote import find_manifest, local_path, localize
from raynium.data.store import OpenStore, no_store, open_store
from raynium.data.streamed import open_streamed
from raynium.errors import DataError
from raynium.storage.own_folder import shared_folder
from raynium.storage.range_cache import RangeCache

# Of packed rows a block is at least so many windows: it fetches one more than it uses, where it begins and ends.
BLOCK_WINDOWS = 8


def is_streamed(data: DataSection, path: str, manifest: StoreManifest) -> bool:
    """Whether the store at this path is read where it lies. The same on every node."""
    if data.access != "auto":
        return data.access == "stream"
    return data.shuffle == "blocks" and local_path(path) is None and manifest.num_bytes > data.cache_bytes


def fetch_store(data: DataSection, path: str, cache_dir: str | Path) -> str:
    """Makes the store ready on this node: a copy of it under `cache_dir` where it takes one. Returns the place to open.

    Raises DataError.
    """
    manifest = find_manifest(path)
    if manifest is None:
        raise no_store(path, in_mixture=bool(data.mixture))
    return path if is_streamed(data, path, manifest) else str(localize(path, cache_dir))


def fetch_stores(data: DataSection, cache_dir: str | Path) -> list[str]:
    """`fetch_store` of each store of a mixture, or of the one."""
    return [fetch_store(data, store.store, cache_dir) for store in data.stores]


def open_fetched(data: DataSection, place: str, *, identity: str | None, run: str) -> OpenStore:
    """What `fetch_store` made ready. The ranks of a run on one node share the cache of what they stream; run: names it,
    as no other on the node is named, since each has its own bound. Raises DataError.
    """
    if local_path(place) is not None and data.access != "stream":
        return open_store(place, identity=identity)
    caches = scratch_folder() / "stream"
    try:
        folder = shared_folder(caches, hashlib.sha256(run.encode()).hexdigest()[:16])
    except OSError as error:
        raise DataError(
            f"the data cache {caches} cannot be made: {error.strerror}; remove what is there, or set TMPDIR on the "
            "nodes to a folder that can be written and has room"
        ) from error
    cache = RangeCache(folder, max_bytes=data.cache_bytes)
    return open_streamed(place, cache, identity=identity)


def block_rows(data: DataSection, manifest: StoreManifest) -> int:
    """Samples of one block under `data.shuffle: blocks`. The same for a copy, since it is part of the order."""
    samples = max(1, data.shuffle_block_bytes // row_bytes(data, manifest))
    if data.packing == "documents":
        in_windows = BLOCK_WINDOWS * window_tokens(data.seq_len) // data.seq_len
        return max(samples, in_windows // manifest.documents_per_record)
    return samples


def row_bytes(data: DataSection, manifest: StoreManifest) -> int:
    """Of the tokens of a sample's rows, as they are stored."""
    return data.seq_len * manifest.numpy_dtype.itemsize * manifest.documents_per_record


def refuse_small_cache(data: DataSection, manifests: dict[str, StoreManifest]) -> None:
    """Raises DataError if a node cannot keep the blocks that it reads, and of each lane the one that comes next.

    manifests: of all stores, by their paths.
    """
    need = 0
    for path, manifest in manifests.items():
        if is_streamed(data, path, manifest):
            # A block begins and ends within units, and may lie in two shards.
            of_block = block_rows(data, manifest) * row_bytes(data, manifest) + 4 * manifest.unit_bytes
            if data.packing == "documents":
                # Its documents lie anywhere in the windows that it begins and ends in.
                of_block += 2 * window_tokens(data.seq_len) * manifest.numpy_dtype.itemsize
            blocks = -(-manifest.train.tokens // (block_rows(data, manifest) * data.seq_len))
            need += min(2 * data.shuffle_lanes, blocks) * of_block
    if need > data.cache_bytes:
        remedy = (
            "data.shuffle_lanes" if data.packing == "documents" else "data.shuffle_lanes or data.shuffle_block_bytes"
        )
        raise DataError(
            f"data.cache_bytes = {data.cache_bytes:,}: a node that streams needs {need:,} bytes, for "
            f"data.shuffle_lanes = {data.shuffle_lanes} blocks of each store and as many that come next; set "
            f"data.cache_bytes to {need} or more, or {remedy} lower"
        )
