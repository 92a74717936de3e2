"""Wanted bytes of a checkpoint's data files, fetched with few requests and little else, verified. No torch.

A file has one checksum per unit (256 KiB), so ranges are widened to whole units. What lies close together is one
request, long ranges are several, and STREAMS of them run at a time. A request fills several buffers: bytes that have a
place in memory go straight there, the rest of the units to scratch memory.
"""

import mmap
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue

from raynium.checkpoint.base import Readable
from raynium.errors import CheckpointDamaged, StoreError, some
from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import checksum, to_text

# Requests in flight: they hide S3's latency, and one stream of S3 is slower than any network card.
STREAMS = 8
# Of one request at most, and so of one stream's scratch memory; 16 MiB keep 8 streams busy.
REQUEST_BYTES = 16 * 2**20
# So many that nobody wants are fetched rather than asked around: a request costs as much as a few units.
MAX_GAP_UNITS = 1


@dataclass(frozen=True, eq=False)
class Wanted:
    """Bytes [begin, end) of a data file, and where they go.

    Straight into `memory` (exactly as many bytes), if it is given and no other range shares bytes with this one; else,
    piece by piece, to `take(begin, data)`, which runs on the thread that called; `data` is reused after it returned.
    """

    shard: int
    begin: int
    end: int
    memory: memoryview | None
    take: Callable[[int, memoryview], object]


@dataclass
class Request:
    """Whole units of one file, read at once. `straight` is in file order, without overlaps."""

    shard: int
    begin: int
    end: int
    straight: list[Wanted] = field(default_factory=list)
    taken: list[Wanted] = field(default_factory=list)

    def scratch_bytes(self) -> int:
        """How much of it has no place of its own."""
        straight = sum(min(each.end, self.end) - max(each.begin, self.begin) for each in self.straight)
        return self.end - self.begin - straight


def read_wanted(ref: Readable, wanted: Sequence[Wanted]) -> int:
    """Deliver every range; returns the bytes that were fetched. CheckpointDamaged names file, bytes and tensors.

    Memory: REQUEST_BYTES for each of STREAMS, and less where bytes go straight to their place.
    """
    requests = plan_requests(ref, wanted)
    for request, segments in _fetched(ref, requests):
        starts = [begin for begin, _ in segments]
        for each in request.taken:
            begin, end = max(each.begin, request.begin), min(each.end, request.end)
            # Nothing straight lies inside: it is in one piece.
            start, memory = segments[bisect_right(starts, begin) - 1]
            each.take(begin, memory[begin - start : end - start])
    return sum(request.end - request.begin for request in requests)


# ---- what is asked for --------------------------------------------------------------------------------------------


def plan_requests(ref: Readable, wanted: Sequence[Wanted]) -> list[Request]:
    """The requests that fetch all of it, in file order: each needed unit once."""
    by_shard: dict[int, list[Wanted]] = defaultdict(list)
    for each in wanted:
        if each.end > each.begin:
            by_shard[each.shard].append(each)
    return [
        request
        for shard in sorted(by_shard)
        for request in _requests_of_shard(ref, shard, sorted_by_place(by_shard[shard]))
    ]


def sorted_by_place(wanted: Sequence[Wanted]) -> list[Wanted]:
    return sorted(wanted, key=lambda each: (each.begin, each.end))


def _requests_of_shard(ref: Readable, shard: int, wanted: Sequence[Wanted]) -> Iterator[Request]:
    file = ref.manifest.shards[shard]
    window_bytes = max(1, REQUEST_BYTES // file.unit_bytes) * file.unit_bytes
    shared = _shares_bytes(wanted)
    for run in _runs(wanted, file.unit_bytes):
        begin = wanted[run[0]].begin // file.unit_bytes * file.unit_bytes
        last = max(wanted[index].end for index in run)
        end = min(-(-last // file.unit_bytes) * file.unit_bytes, file.size)
        windows = [Request(shard, start, min(start + window_bytes, end)) for start in range(begin, end, window_bytes)]
        for index in run:
            each = wanted[index]
            for window in windows[(each.begin - begin) // window_bytes : (each.end - 1 - begin) // window_bytes + 1]:
                (window.taken if each.memory is None or shared[index] else window.straight).append(each)
        yield from windows


def _runs(wanted: Sequence[Wanted], unit_bytes: int) -> Iterator[range]:
    """Indices of ranges, in file order, whose units touch or have at most MAX_GAP_UNITS between them."""
    first, end_unit = 0, 0
    for index, each in enumerate(wanted):
        if index > first and each.begin // unit_bytes - end_unit > MAX_GAP_UNITS:
            yield range(first, index)
            first, end_unit = index, 0
        end_unit = max(end_unit, -(-each.end // unit_bytes))
    yield range(first, len(wanted))


def _shares_bytes(wanted: Sequence[Wanted]) -> list[bool]:
    """For each of some ranges in file order whether another one overlaps it."""
    shared = [False] * len(wanted)
    # Of those before, the one that reaches farthest.
    widest = 0
    for index in range(1, len(wanted)):
        if wanted[index].begin < wanted[widest].end:
            shared[index] = shared[widest] = True
        if wanted[index].end > wanted[widest].end:
            widest = index
    return shared


# ---- fetching -----------------------------------------------------------------------------------------------------

# The file's bytes from there on; together, in order, all of a request's.
_Segments = list[tuple[int, memoryview]]


def _fetched(ref: Readable, requests: Sequence[Request]) -> Iterator[tuple[Request, _Segments]]:
    """Each request with its bytes, verified, as they arrive. Scratch memory is valid until the next is asked for."""
    if not requests:
        return
    scratch_bytes = max(request.scratch_bytes() for request in requests)
    waiting = deque(requests)
    free: SimpleQueue[memoryview] = SimpleQueue()
    running: dict[Future[_Segments], tuple[Request, memoryview]] = {}
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="checkpoint-read") as pool:
        try:
            for _ in range(min(STREAMS, len(requests))):
                # Pages that are never touched cost nothing.
                free.put(memoryview(mmap.mmap(-1, max(1, scratch_bytes))))
            while waiting or running:
                while waiting and not free.empty():
                    request, scratch = waiting.popleft(), free.get()
                    running[pool.submit(_fetch, ref, request, scratch)] = request, scratch
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    request, scratch = running.pop(done)
                    yield request, done.result()
                    free.put(scratch)
        finally:
            for future in running:
                future.cancel()


def _fetch(ref: Readable, request: Request, scratch: memoryview) -> _Segments:
    """Read one request and check its units. Runs on a stream's thread."""
    segments = _segments(request, scratch)
    try:
        store, key = ref.file(request.shard)
        store.read_into(key, request.begin, *(memory for _, memory in segments))
    except StoreError as error:
        if problem := _size_problem(ref, request.shard):
            raise CheckpointDamaged(problem) from error
        raise
    _check_units(ref, request, segments)
    return segments


def _segments(request: Request, scratch: memoryview) -> _Segments:
    """Where each byte of the request goes."""
    segments: _Segments = []
    position, used = request.begin, 0

    def to_scratch(end: int) -> None:
        nonlocal used
        segments.append((position, scratch[used : used + end - position]))
        used += end - position

    for each in request.straight:
        assert each.memory is not None and len(each.memory) == each.end - each.begin
        begin, end = max(each.begin, request.begin), min(each.end, request.end)
        if position < begin:
            to_scratch(begin)
        segments.append((begin, each.memory[begin - each.begin : end - each.begin]))
        position = end
    if position < request.end:
        to_scratch(request.end)
    return segments


def _check_units(ref: Readable, request: Request, segments: _Segments) -> None:
    """CheckpointDamaged for the first unit whose bytes, wherever they went, are not those that were saved."""
    file = ref.manifest.shards[request.shard]
    pieces = iter(segments)
    rest = memoryview(b"")
    for unit in range(request.begin // file.unit_bytes, -(-request.end // file.unit_bytes)):
        found, missing = 0, file.checksums.unit_length(unit)
        while missing:
            rest = rest or next(pieces)[1]
            piece, rest = rest[:missing], rest[missing:]
            found = checksum(piece, found)
            missing -= len(piece)
        if found != (expected := file.checksums.unit_crcs[unit]):
            begin = unit * file.unit_bytes
            names = ref.manifest.tensors_in(request.shard, begin, begin + file.unit_bytes)
            raise CheckpointDamaged(
                f"{_uri(ref, request.shard)} is damaged in bytes {begin:,} to "
                f"{begin + file.checksums.unit_length(unit):,}, which hold "
                f"{some(names) or 'no tensor'}: CRC64NVME {to_text(found)} instead of {to_text(expected)}"
            )


def _size_problem(ref: Readable, shard: int) -> str | None:
    """Why a file could not be read, if that is because it is not the one that was saved."""
    (store, key), expected = ref.file(shard), ref.manifest.shards[shard].size
    where = store.uri(key)
    try:
        size = store.size(key)
    except KeyMissing:
        return f"{where} is missing"
    return None if size == expected else f"{where} has {size:,} bytes instead of {expected:,}"


def _uri(ref: Readable, shard: int) -> str:
    store, key = ref.file(shard)
    return store.uri(key)
