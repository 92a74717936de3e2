"""The compile cache that all nodes and runs of one root share: what one has compiled, no other compiles again.

    <run.root>/compile-cache/<key>/ab/cd/<hash>.neff=<16 hex digits>       key: see `Accelerator.compile_cache`

Each name ends with the CRC64NVME of its contents, so one listing says what is there and how to check it, and two nodes
that compiled the same graph into different bytes do not meet. Entries never change: a file is content-addressed by the
compiler. Nothing in here may end a run or hold it up for long; what goes wrong is said in the log, and costs a
compilation. Who may write the bucket decides what runs on the devices: the entries are machine code.
"""

import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from raynium.accelerators.base import Accelerator, CompileCache
from raynium.config.local_folders import cache_home
from raynium.errors import StoreError
from raynium.health.faults import BROKEN_GRAPH
from raynium.run.protocol import RankExit
from raynium.storage.backend import KeyExists
from raynium.storage.checksum import PART_BYTES, checksum
from raynium.storage.store import Store, checked_key

logger = logging.getLogger(__name__)

FOLDER = "compile-cache"
# Ranks wait so long for downloads, which then go on beside them; an agent stays so long for the last uploads.
FILL_SECONDS = 120.0
CLOSE_SECONDS = 60.0
# After a compilation more follow. Other nodes wait until the first has uploaded what they all made.
SETTLE_SECONDS = 5.0
SETTLE_OTHERS_SECONDS = 60.0
DOWNLOADS_AT_ONCE = 8
# Estimates. The compiler needs room on a node's disk, and fails without; a large model's key has a few GiB.
KEPT_FREE_BYTES = 2 * 2**30
MAX_BYTES = 32 * 2**30

_NAME = re.compile(r"(?P<path>.+)=(?P<crc>[0-9a-f]{16})")


@dataclass(frozen=True)
class Entry:
    """One object of the cache: its key in the store, its file's path in the folder, its bytes and their CRC64NVME."""

    key: str
    path: str
    size: int
    crc: int


class CacheSync:
    """Keeps a local folder and the store's alike. Works in a thread of its own, from `start` to `close`."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        suffix: str,
        is_first: bool,
        max_bytes: int = MAX_BYTES,
        options: Mapping[str, Any] | None = None,
    ):
        """url, options: of the store's folder, as Store's. suffix: of finished files. max_bytes: of all entries."""
        self.url = url
        self.folder = folder
        self._suffix = suffix
        self._settle_seconds = SETTLE_SECONDS if is_first else SETTLE_OTHERS_SECONDS
        self._max_bytes = max_bytes
        self._options = options
        self._filled = threading.Event()
        self._changed = threading.Event()
        self._closing = threading.Event()
        # Daemons: a store that does not answer must not keep the process.
        self._thread = threading.Thread(target=self._run, name="compile-cache", daemon=True)

    def start(self) -> None:
        """Begins to download, and returns at once."""
        self._thread.start()

    def wait_filled(self, *, timeout_seconds: float = FILL_SECONDS) -> bool:
        """Returns when all that the store has is here, or failed; False, and a line in the log, if it takes longer."""
        if self._filled.wait(timeout_seconds):
            return True
        logger.warning(
            "compile cache: %s is not all here after %.0f s; ranks compile what they miss", self.url, timeout_seconds
        )
        return False

    def changed(self) -> None:
        """Something was compiled: it is uploaded in a while. Safe from any thread."""
        self._changed.set()

    def close(self, *, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Uploads what is new, for so long at most."""
        self._closing.set()
        self._changed.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning("compile cache: not all new entries reached %s in %.0f s", self.url, timeout_seconds)

    def _run(self) -> None:
        try:
            store = Store(self.url, options=self._options)
            try:
                self._download_missing(store)
            finally:
                self._filled.set()
            ending = False
            while not ending:
                self._changed.wait()
                self._changed.clear()
                self._closing.wait(self._settle_seconds)
                # Asked before the look at the folder, which then finds everything.
                ending = self._closing.is_set()
                self._upload_new(store)
        except (StoreError, OSError) as error:
            logger.warning("compile cache: no longer shared through %s: %s", self.url, error)
        finally:
            self._filled.set()

    # ---- down --------------------------------------------------------------------------------------------------------

    def _download_missing(self, store: Store) -> None:
        began = time.monotonic()
        waiting: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        try:
            found = entries(store)
        except StoreError as error:
            logger.warning("compile cache: %s cannot be listed, so graphs are compiled here: %s", self.url, error)
            return
        missing = {each.path: each for each in found if not (self.folder / each.path).exists()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            space = shutil.disk_usage(self.folder).free - KEPT_FREE_BYTES
        except OSError as error:
            logger.warning(
                "compile cache: nothing can be kept in %s, so graphs are compiled here: %s", self.folder, error
            )
            return
        # The smallest first, since so the most of them fit.
        for each in sorted(missing.values(), key=lambda each: each.size):
            space -= each.size
            if space < 0:
                counts = (len(missing) - waiting.qsize(), len(missing))
                rule = f"{self.folder} must keep {KEPT_FREE_BYTES / 1e9:.1f} GB free for others: make room"
                logger.warning("compile cache: %d of %d entries stay in %s, since %s", *counts, self.url, rule)
                break
            waiting.put(each)
        done: list[int] = []

        def work() -> None:
            while not self._closing.is_set():
                try:
                    entry = waiting.get_nowait()
                except queue.Empty:
                    return
                if self._download(store, entry):
                    done.append(entry.size)

        workers = [
            threading.Thread(target=work, name="compile-cache-download", daemon=True)
            for _ in range(min(DOWNLOADS_AT_ONCE, len(missing)))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        came = f"{len(done)} ({sum(done) / 1e6:.1f} MB) were missing here and came in {time.monotonic() - began:.1f} s"
        logger.info("compile cache: %s has %d entries; %s", self.url, len(found), came)

    def _download(self, store: Store, entry: Entry) -> bool:
        """The local file appears whole and verified or, also after a crash, not at all. A damaged entry is removed."""
        path = self.folder / entry.path
        temporary = path.with_name(f".tmp-{uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                crc = 0
                with temporary.open("xb") as file:
                    for start in range(0, entry.size, PART_BYTES):
                        if self._closing.is_set():
                            return False
                        part = store.read_range(entry.key, start, min(PART_BYTES, entry.size - start))
                        crc = checksum(part, crc)
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                if crc != entry.crc:
                    store.delete(entry.key)
                    logger.warning(
                        "compile cache: %s is damaged, since its bytes do not have the checksum in its name: removed; "
                        "its graph is compiled again",
                        store.uri(entry.key),
                    )
                    return False
                temporary.replace(path)
                return True
            finally:
                temporary.unlink(missing_ok=True)
        except (StoreError, OSError) as error:
            logger.warning("compile cache: one graph is compiled again: %s", error)
            return False

    # ---- up ----------------------------------------------------------------------------------------------------------

    def _upload_new(self, store: Store) -> None:
        try:
            found = entries(store)
        except StoreError as error:
            # The next compilation, or the end, tries again.
            logger.warning("compile cache: nothing is uploaded now, since %s cannot be listed: %s", self.url, error)
            return
        there = {each.path for each in found}
        total = sum(each.size for each in found)
        sent = 0
        for path, size in self._finished_files():
            if path in there:
                continue
            if total + size > self._max_bytes:
                full = f"{total / 1e9:.1f} of at most {self._max_bytes / 1e9:.1f} GB"
                remedy = "delete what old compilers made there, or all of it"
                logger.warning("compile cache: %s has %s, so new entries stay on this node; %s", self.url, full, remedy)
                return
            try:
                if self._upload(store, path):
                    total += size
                    sent += 1
            except (StoreError, OSError) as error:
                logger.warning("compile cache: %s was not uploaded: %s", path, error)
                return
        if sent:
            logger.info("compile cache: %d new entries are in %s", sent, self.url)

    def _upload(self, store: Store, path: str) -> bool:
        """Whether it was us who added it, and not another node, which was as quick, with the same bytes."""
        file = self.folder / path
        crc = 0
        with file.open("rb") as source:
            while part := source.read(PART_BYTES):
                crc = checksum(part, crc)
        key = f"{path}={crc:016x}"
        try:
            sums = store.upload_file(key, file)
        except KeyExists:
            return False
        # Another rank's result took the file's name between our two looks at it.
        if sums.crc != crc:
            store.delete(key)
            return False
        return True

    def _finished_files(self) -> list[tuple[str, int]]:
        """(path relative to the folder, bytes) of what may be shared. The compiler may delete files meanwhile."""
        found = []
        for current, _, names in os.walk(self.folder):
            for name in names:
                path = Path(current, name)
                relative = path.relative_to(self.folder).as_posix()
                if name.endswith(self._suffix) and _is_key(relative) and not path.is_symlink():
                    try:
                        size = path.stat().st_size
                    except FileNotFoundError:
                        continue
                    if size:
                        found.append((relative, size))
        return sorted(found)


@dataclass(frozen=True)
class NodeCache:
    """What one node does about the compile cache.

    environment: for its ranks, beside the accelerator's. sync: None if there is nothing to copy. places: folders and
    URLs that hold the entries; none where the user chose the cache. removed: graphs that could not be loaded.
    """

    environment: Mapping[str, str]
    sync: CacheSync | None
    places: tuple[str, ...] = ()
    removed: set[str] = field(default_factory=set)

    def without_broken(self, exits: Iterable[RankExit]) -> list[RankExit]:
        """Removes each graph that these ranks could not load, once: the next ones compile it. Where that cannot help,
        the exits come back as those that would happen again.
        """
        exits = list(exits)
        broken = {
            each.rank: each.fault.details.get("graph")
            for each in exits
            if each.fault is not None and each.fault.name == BROKEN_GRAPH
        }
        new = {graph for graph in broken.values() if graph and self.places} - self.removed
        for place in self.places if new else ():
            try:
                store = Store(place)
                for key in [key for key in store.list().sizes if any(graph in key for graph in new)]:
                    store.delete(key)
            except StoreError as error:
                logger.warning("compile cache: a graph that cannot be loaded may stay in %s: %s", place, error)
        self.removed.update(new)
        end = f"empty {'the compile cache' if self.places else 'the cache that you set'}"
        for number, each in enumerate(exits):
            if broken.get(each.rank) in new:
                exits[number] = replace(each, cause=f"{each.cause}; removed from the compile cache: compiled anew")
            elif each.rank in broken:
                exits[number] = replace(each, cause=f"{each.cause}: {end}, and take both of one release", retry=False)
        return exits


def node_cache(accelerator: Accelerator, run_url: str, *, is_first: bool, inherited: Mapping[str, str]) -> NodeCache:
    """The cache of this node's ranks. Opens nothing. inherited: the agent's environment; a cache set there stays."""
    cache = accelerator.compile_cache(inherited)
    if cache is None:
        return NodeCache({}, None)
    if cache.variable in inherited:
        logger.info("compile cache: %s is set, so it is used as it is, and not shared by us", cache.variable)
        return NodeCache({}, None)
    url = cache_url(run_url, cache)
    if cache.kind == "url":
        # libneuronxla reads and writes s3:// itself, or a folder that all nodes see.
        return NodeCache({cache.variable: url.removeprefix("file://")}, None, (url,))
    folder = cache_home() / FOLDER / cache.key
    sync = CacheSync(url, folder, suffix=cache.suffix, is_first=is_first)
    return NodeCache({cache.variable: str(folder)}, sync, (str(folder), url))


def cache_url(run_url: str, cache: CompileCache) -> str:
    """Where the executables of this key are kept: beside the run, since other runs need them too."""
    root = Store(run_url).url.rpartition("/")[0]
    return f"{root}/{FOLDER}/{checked_key(cache.key)}"


def entries(store: Store) -> list[Entry]:
    """What is in one key's folder, oldest first. Objects of other names are not ours, and are left alone."""
    listing = store.list()
    found = []
    for key, size in sorted(listing.sizes.items(), key=lambda item: (listing.modified_unix[item[0]], item[0])):
        match = _NAME.fullmatch(key)
        if match is not None and _is_key(key):
            found.append(Entry(key, match["path"], size, int(match["crc"], 16)))
    return found


def _is_key(text: str) -> bool:
    """Also that it names something inside a folder: whoever may write the store must not write elsewhere here."""
    try:
        checked_key(text)
    except StoreError:
        return False
    return True
