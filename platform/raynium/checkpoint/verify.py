"""Whether a checkpoint's data files are what its manifest says, and if not, what is damaged. No torch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from raynium.errors import some
from raynium.storage.backend import KeyMissing
from raynium.storage.checksum import checksum, num_units

if TYPE_CHECKING:
    from raynium.checkpoint.ref import CheckpointRef

ASKERS = 16  # requests in flight that read nothing: hides S3's latency
READERS = 4  # requests in flight that read; each holds READ_BYTES in memory
READ_BYTES = 64 * 2**20

Depth = Literal["stored", "contents"]


@dataclass(frozen=True)
class Damage:
    """A range of a data file that cannot be used."""

    uri: str  # of the data file
    begin: int  # bytes; the end is excluded
    end: int
    tensors: tuple[str, ...]  # that have bytes in the range
    reason: str

    def __str__(self) -> str:
        names = some(self.tensors) or "no tensor"
        return f"{self.uri} {self.reason}: bytes {self.begin:,} to {self.end:,} cannot be used, which hold {names}"


def damage_text(step: int, damages: Sequence[Damage]) -> str:
    """All of it, one line each under a title."""
    return f"the checkpoint of step {step} is damaged:" + "".join(f"\n  - {damage}" for damage in damages)


def verify_checkpoint(ref: "CheckpointRef", *, depth: Depth) -> list[Damage]:
    """Everything that is wrong with the data files; [] for a whole checkpoint. (Its manifest was checked to get `ref`.)

    depth: "stored" asks the store for each file's size and the CRC64NVME that the server keeps of it (S3 does, a file
    system does not), one request a file, which finds missing, cut and replaced files. "contents" also reads every byte,
    which finds all damage, to the unit. StoreError if the store cannot be asked.
    """
    files = range(len(ref.manifest.shards))
    with ThreadPoolExecutor(ASKERS, thread_name_prefix="checkpoint-ask") as pool:
        stored = list(pool.map(lambda shard: _stored(ref, shard), files))
    found = [damage for shard in files if (damage := _wrong_size(ref, shard, stored[shard])) is not None]
    if depth == "contents":
        with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-verify") as pool:
            found += [damage for shard in files for damage in _wrong_bytes(ref, shard, stored[shard], pool)]
    located = {damage.uri for damage in found}  # there, what the server says of the whole file adds nothing
    for shard in files:
        damage = _wrong_crc(ref, shard, stored[shard])
        if damage is not None and damage.uri not in located:
            found.append(damage)
    return sorted(found, key=lambda damage: (damage.uri, damage.begin))


# ---- what the store says ------------------------------------------------------------------------------------------

Stored = tuple[int, str | None] | None  # bytes and CRC64NVME, if the store keeps one; None: there is no such file


def _stored(ref: "CheckpointRef", shard: int) -> Stored:
    try:
        return ref.store.stored_checksum(ref.shard_key(shard))
    except KeyMissing:
        return None


def _wrong_size(ref: "CheckpointRef", shard: int, stored: Stored) -> Damage | None:
    file = ref.manifest.shards[shard]
    if stored is None:
        return _damage(ref, shard, 0, file.size, "is missing")
    size = stored[0]
    if size == file.size:
        return None
    # A unit that is not whole has no checksum: the rest of it counts as lost, and all of a file that grew
    begin = size // file.unit_bytes * file.unit_bytes if size < file.size else 0
    return _damage(ref, shard, begin, file.size, f"has {size:,} bytes instead of {file.size:,}")


def _wrong_crc(ref: "CheckpointRef", shard: int, stored: Stored) -> Damage | None:
    file = ref.manifest.shards[shard]
    crc = stored[1] if stored is not None else None
    if crc is None or crc == file.crc64nvme:
        return None
    reason = f"is stored with CRC64NVME {crc} instead of {file.crc64nvme} (verify --deep finds where)"
    return _damage(ref, shard, 0, file.size, reason)


# ---- what the bytes say -------------------------------------------------------------------------------------------


def _wrong_bytes(ref: "CheckpointRef", shard: int, stored: Stored, pool: ThreadPoolExecutor) -> list[Damage]:
    """One Damage for each run of neighbouring units that differ from their checksums, of those that are there."""
    file = ref.manifest.shards[shard]
    size = stored[0] if stored is not None else 0
    whole = num_units(file.size, file.unit_bytes) if size >= file.size else size // file.unit_bytes
    lot = max(READ_BYTES // file.unit_bytes, 1)
    lots = [range(first, min(first + lot, whole)) for first in range(0, whole, lot)]
    expected = file.checksums.unit_crcs

    def wrong(units: range) -> list[int]:
        begin = units.start * file.unit_bytes
        buffer = memoryview(bytearray(min(units.stop * file.unit_bytes, file.size) - begin))
        ref.store.read_into(ref.shard_key(shard), begin, buffer)
        starts = ((unit, unit * file.unit_bytes - begin) for unit in units)
        return [unit for unit, start in starts if checksum(buffer[start : start + file.unit_bytes]) != expected[unit]]

    damaged = [unit for found in pool.map(wrong, lots) for unit in found]
    found = []
    for _, neighbours in groupby(enumerate(damaged), key=lambda each: each[1] - each[0]):
        units = [unit for _, unit in neighbours]
        begin, end = units[0] * file.unit_bytes, min((units[-1] + 1) * file.unit_bytes, file.size)
        reason = f"is damaged in {len(units)} unit(s) of {file.unit_bytes:,} bytes (wrong CRC64NVME)"
        found.append(_damage(ref, shard, begin, end, reason))
    return found


def _damage(ref: "CheckpointRef", shard: int, begin: int, end: int, reason: str) -> Damage:
    names = tuple(ref.manifest.tensors_in(shard, begin, end))
    return Damage(ref.store.uri(ref.shard_key(shard)), begin, end, names, reason)
