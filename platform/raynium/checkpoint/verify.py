"""Whether a checkpoint's data files are what its manifest says, and if not, what is damaged. No torch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from raynium.checkpoint.catalog import CheckpointRef, choose_checkpoint, list_checkpoints, open_checkpoint
from raynium.checkpoint.checksum import checksum, num_parts, part_length, to_text
from raynium.checkpoint.store import KeyMissing, Store

READERS = 4  # requests in flight: hides S3's latency; when reading, each holds one part (64 MiB) in memory
NAMED = 5  # tensors named in a message, of however many

Depth = Literal["sizes", "contents"]


@dataclass(frozen=True)
class Damage:
    """A range of a data file that cannot be used."""

    uri: str  # of the data file
    begin: int  # bytes; the end is excluded
    end: int
    tensors: tuple[str, ...]  # that have bytes in the range
    reason: str

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - NAMED} more" if len(self.tensors) > NAMED else ""
        names = ", ".join(self.tensors[:NAMED]) or "no tensor"
        return (
            f"{self.uri} {self.reason}: bytes {self.begin:,} to {self.end:,} cannot be used, which hold {names}{more}"
        )


def checkpoint_to_verify(store: Store, step: int | None = None) -> CheckpointRef:
    """The checkpoint of `step`, or the newest; CheckpointDamaged if its manifest is, where others pass it over."""
    summaries = list_checkpoints(store) if step is None else []
    return open_checkpoint(store, summaries[-1].step) if summaries else choose_checkpoint(store, step)


def verify_checkpoint(ref: CheckpointRef, *, depth: Depth) -> list[Damage]:
    """Everything that is wrong with the data files; [] for a whole checkpoint. (Its manifest was checked to get `ref`.)

    depth: "sizes" asks the store for each file's size, one request a file, and finds missing and cut files. "contents"
    also reads every byte and compares checksums. StoreError if the store cannot be asked.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-verify") as pool:
        sizes = list(pool.map(lambda shard: _stored_size(ref, shard), range(len(ref.manifest.shards))))
        found = [damage for shard, size in enumerate(sizes) if (damage := _wrong_size(ref, shard, size)) is not None]
        if depth == "contents":
            parts = [(shard, part) for shard, size in enumerate(sizes) for part in _whole_parts(ref, shard, size)]
            found += [damage for damage in pool.map(lambda each: _wrong_part(ref, *each), parts) if damage is not None]
    return sorted(found, key=lambda damage: (damage.uri, damage.begin))


def _stored_size(ref: CheckpointRef, shard: int) -> int | None:
    """Bytes of the data file; None if it is missing."""
    try:
        return ref.store.size(ref.shard_key(shard))
    except KeyMissing:
        return None


def _wrong_size(ref: CheckpointRef, shard: int, size: int | None) -> Damage | None:
    file = ref.manifest.shards[shard]
    if size == file.size:
        return None
    if size is None:
        return _damage(ref, shard, 0, file.size, "is missing")
    # A part that is not whole has no checksum: the rest of it counts as lost, and all of a file that grew.
    begin = size // file.part_bytes * file.part_bytes if size < file.size else 0
    return _damage(ref, shard, begin, file.size, f"has {size:,} bytes instead of {file.size:,}")


def _whole_parts(ref: CheckpointRef, shard: int, size: int | None) -> Iterator[int]:
    """The parts that are there to be read, of a file that has `size` bytes."""
    file = ref.manifest.shards[shard]
    for part in range(num_parts(file.size, file.part_bytes)):
        if part * file.part_bytes + part_length(file.size, file.part_bytes, part) <= (size or 0):
            yield part


def _wrong_part(ref: CheckpointRef, shard: int, part: int) -> Damage | None:
    file = ref.manifest.shards[shard]
    begin = part * file.part_bytes
    buffer = bytearray(part_length(file.size, file.part_bytes, part))
    ref.store.read_into(ref.shard_key(shard), begin, memoryview(buffer))
    crc, expected = to_text(checksum(buffer)), file.part_crc64nvme[part]
    if crc == expected:
        return None
    reason = f"is damaged in part {part} (CRC64NVME {crc} instead of {expected})"
    return _damage(ref, shard, begin, begin + len(buffer), reason)


def _damage(ref: CheckpointRef, shard: int, begin: int, end: int, reason: str) -> Damage:
    names = {
        tensor.name
        for tensor in ref.manifest.tensors
        for block in tensor.blocks
        if block.shard == shard and block.begin < end and begin < block.end
    }
    return Damage(ref.store.uri(ref.shard_key(shard)), begin, end, tuple(sorted(names)), reason)
