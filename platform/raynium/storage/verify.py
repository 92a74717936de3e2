"""Whether a file in a store is the one whose checksums are known, and if not, which bytes of it differ. No torch."""

from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby

from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import FileChecksums, checksum, num_units
from raynium.storage.store import Store

# Requests in flight, for the caller's pool; each holds READ_BYTES in memory.
READERS = 4
READ_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DamagedRange:
    """Bytes of a file that cannot be used; the end is excluded."""

    begin: int
    end: int
    reason: str


def stored(store: Store, key: str) -> tuple[int, str | None] | None:
    """Bytes, and CRC64NVME if the store keeps one; None: there is no such file."""
    try:
        return store.stored_checksum(key)
    except KeyMissing:
        return None


def wrong_size(found: int | None, expected: int, *, unit_bytes: int) -> DamagedRange | None:
    """By the sizes alone. found: bytes that are stored; None: there is no such file."""
    if found is None:
        return DamagedRange(0, expected, "is missing")
    if found == expected:
        return None
    # A unit that is not whole has no checksum: the rest of it counts as lost, and all of a file that grew
    begin = found // unit_bytes * unit_bytes if found < expected else 0
    return DamagedRange(begin, expected, f"has {found:,} bytes instead of {expected:,}")


def wrong_bytes(
    store: Store, key: str, expected: FileChecksums, *, found: int | None, pool: Executor
) -> list[DamagedRange]:
    """Reads all units that are there; one range for each run of neighbours that differ. found: as in `wrong_size`."""
    found, unit_bytes = found or 0, expected.unit_bytes
    whole = num_units(expected.size, unit_bytes) if found >= expected.size else found // unit_bytes
    lot = max(READ_BYTES // unit_bytes, 1)
    lots = [range(first, min(first + lot, whole)) for first in range(0, whole, lot)]

    def wrong(units: range) -> list[int]:
        begin = units.start * unit_bytes
        buffer = memoryview(bytearray(min(units.stop * unit_bytes, expected.size) - begin))
        store.read_into(key, begin, buffer)
        return wrong_units(buffer, expected, units)

    damaged = [unit for units in pool.map(wrong, lots) for unit in units]
    ranges = []
    for _, neighbours in groupby(enumerate(damaged), key=lambda each: each[1] - each[0]):
        units = [unit for _, unit in neighbours]
        begin, end = units[0] * unit_bytes, min((units[-1] + 1) * unit_bytes, expected.size)
        reason = f"is damaged in {len(units)} unit(s) of {unit_bytes:,} bytes (wrong CRC64NVME)"
        ranges.append(DamagedRange(begin, end, reason))
    return ranges


def wrong_units(content: memoryview, expected: FileChecksums, units: range) -> list[int]:
    """Those whose bytes are not the expected ones. content: of `units`, which are neighbours, and no more."""
    starts = ((unit, (unit - units.start) * expected.unit_bytes) for unit in units)
    return [
        unit
        for unit, start in starts
        if checksum(content[start : start + expected.unit_bytes]) != expected.unit_crcs[unit]
    ]
