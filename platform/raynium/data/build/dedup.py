"""Exact duplicates: of equal texts only the first in the order of the sources stays. Asked for, never by itself.

Two rounds of tasks before tokenising. The first hashes the documents of each split (16 bytes each), sorted by
partition: a range of hashes. The second decides one partition at a time, on its own, from the pieces that all splits
have of it; so memory is bounded by the largest partition, whatever the source's size.

    building/hashes/00012-<digest>.bin        for each partition where its records end, int64; then the records: hash
                                              (two uint64), number of the document in its split (uint64)
    building/duplicates/0003-<digest>.bin     for each split where its numbers end, int64; then uint32 numbers, rising
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from raynium.data.build.lease import BUILDING
from raynium.data.build.work import NumberedSplit, Work
from raynium.data.runner import Runner
from raynium.data.text.documents import Document, Split
from raynium.data.text.sources import read_split
from raynium.storage.store import Store

HASHES, DUPLICATES = f"{BUILDING}/hashes", f"{BUILDING}/duplicates"
# Source bytes whose hashes make one partition: of documents of 200 bytes 500 million records of 24 bytes would be
# 12 GB for 100 GB; 4 GB give at most half a gigabyte, and of web pages 50 MB.
PARTITION_BYTES = 4 * 10**9
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


def num_partitions(splits: Sequence[Split]) -> int:
    return -(-sum(split.num_bytes for split in splits) // PARTITION_BYTES) or 1


def hashes_key(work: Work, number: int) -> str:
    return f"{HASHES}/{number:05d}-{work.splits_digest}.bin"


def duplicates_key(work: Work, index: int) -> str:
    return f"{DUPLICATES}/{index:05d}-{work.splits_digest}.bin"


def hash_split(work: Work, numbered: NumberedSplit) -> None:
    """A task: writes the hashes of one split's documents, left-out ones not counted."""
    digests = bytearray()
    for document in read_split(numbered.split):
        if isinstance(document, Document):
            digests += hashlib.blake2b(document.text.encode(), digest_size=16).digest()
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    records = np.empty(len(halves), dtype=_RECORD)
    records["high"], records["low"], records["number"] = halves[:, 0], halves[:, 1], np.arange(len(halves))
    # Rising hashes are rising partitions too.
    records = records[np.argsort(records["high"], kind="stable")]
    firsts = [(index << 64) // work.partitions for index in range(1, work.partitions)]
    ends = [*np.searchsorted(records["high"], np.array(firsts, dtype=np.uint64)), len(records)]
    content = np.array(ends, dtype="<i8").tobytes() + records.tobytes()
    work.store().replace(hashes_key(work, numbered.number), content)


def find_duplicates(work: Work, partition: int) -> None:
    """A task: writes which documents of each split have an earlier one of the same hash."""
    store, size = work.store(), _RECORD.itemsize
    keys = [hashes_key(work, number) for number in range(work.num_splits)]
    rows = [_row(store, key, partition, work.partitions, itemsize=size) for key in keys]
    pieces = [np.frombuffer(row, dtype=_RECORD) for row in rows]
    records = np.concatenate(pieces)
    places = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    # By hash, and among equals in the order of the source.
    order = np.lexsort((records["number"], places, records["low"], records["high"]))
    records, places = records[order], places[order]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    numbers, places = records["number"][1:][same], places[1:][same]
    order = np.lexsort((numbers, places))
    ends = np.searchsorted(places[order], np.arange(len(pieces)), side="right")
    content = ends.astype("<i8").tobytes() + numbers[order].astype("<u4").tobytes()
    store.replace(duplicates_key(work, partition), content)


def mark_duplicates(work: Work, splits: Sequence[NumberedSplit], runner: Runner) -> None:
    """Both rounds, without what an earlier build of the same splits has done. Raises DataError as `read_split`."""
    there = {*work.store().list(HASHES).sizes, *work.store().list(DUPLICATES).sizes}
    partitions = [index for index in range(work.partitions) if duplicates_key(work, index) not in there]
    if partitions:
        unhashed = [each for each in splits if hashes_key(work, each.number) not in there]
        for _ in runner(hash_split, work, unhashed):
            pass
    for _ in runner(find_duplicates, work, partitions):
        pass


def duplicates_in(work: Work, numbered: NumberedSplit) -> np.ndarray:
    """Numbers of the documents of a split that are duplicates."""
    store = work.store()
    found = [
        np.frombuffer(
            _row(store, duplicates_key(work, partition), numbered.number, work.num_splits, itemsize=4), dtype="<u4"
        )
        for partition in range(work.partitions)
    ]
    return np.concatenate(found)


def _row(store: Store, key: str, index: int, count: int, *, itemsize: int) -> bytes:
    """The items of row `index` of a file with `count` rows, whose ends it begins with."""
    first = max(index - 1, 0)
    ends = np.frombuffer(store.read_range(key, 8 * first, 8 * (index + 1 - first)), dtype="<i8").tolist()
    begin, end = (0, ends[0]) if index == 0 else ends
    return store.read_range(key, 8 * count + begin * itemsize, (end - begin) * itemsize) if end > begin else b""
