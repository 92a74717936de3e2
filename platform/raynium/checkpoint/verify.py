"""Whether a checkpoint's data files are what its manifest says, and if not, what is damaged. No torch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raynium.errors import some
from raynium.storage.verify import READERS, DamagedRange, stored, wrong_bytes, wrong_size

if TYPE_CHECKING:
    from raynium.checkpoint.ref import CheckpointRef

# Requests in flight that read nothing: they hide S3's latency.
ASKERS = 16

Depth = Literal["stored", "contents"]


@dataclass(frozen=True)
class Damage:
    """Bytes [begin, end) of a data file that cannot be used, and the tensors that have bytes in them."""

    uri: str
    begin: int
    end: int
    tensors: tuple[str, ...]
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
    files = ref.manifest.shards
    keys = [ref.shard_key(shard) for shard in range(len(files))]
    with ThreadPoolExecutor(ASKERS, thread_name_prefix="checkpoint-ask") as pool:
        there = list(pool.map(lambda key: stored(ref.store, key), keys))
    sizes = [each[0] if each is not None else None for each in there]
    found = [
        _damage(ref, shard, problem)
        for shard, file in enumerate(files)
        if (problem := wrong_size(sizes[shard], file.size, unit_bytes=file.unit_bytes)) is not None
    ]
    if depth == "contents":
        with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-verify") as pool:
            found += [
                _damage(ref, shard, problem)
                for shard, file in enumerate(files)
                for problem in wrong_bytes(ref.store, keys[shard], file.checksums, found=sizes[shard], pool=pool)
            ]
    # There, what the server says of the whole file adds nothing.
    located = {damage.uri for damage in found}
    for shard, each in enumerate(there):
        damage = _wrong_crc(ref, shard, each[1] if each is not None else None)
        if damage is not None and damage.uri not in located:
            found.append(damage)
    return sorted(found, key=lambda damage: (damage.uri, damage.begin))


def _wrong_crc(ref: "CheckpointRef", shard: int, crc: str | None) -> Damage | None:
    """crc: of the whole file, by the server; None if it keeps none."""
    file = ref.manifest.shards[shard]
    if crc is None or crc == file.crc64nvme:
        return None
    reason = f"is stored with CRC64NVME {crc} instead of {file.crc64nvme} (verify --deep finds where)"
    return _damage(ref, shard, DamagedRange(0, file.size, reason))


def _damage(ref: "CheckpointRef", shard: int, problem: DamagedRange) -> Damage:
    names = tuple(ref.manifest.tensors_in(shard, problem.begin, problem.end))
    return Damage(ref.store.uri(ref.shard_key(shard)), problem.begin, problem.end, names, problem.reason)
