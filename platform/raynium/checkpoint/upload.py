"""What the node agent does with a rank's image: upload it, verify it, describe it. No torch."""

from raynium.checkpoint.format.manifest import FileEntry, ImageInfo, ShardEntry, shard_key, step_folder
from raynium.errors import CheckpointError
from raynium.storage.checksum import UNIT_BYTES, list_to_text, to_text
from raynium.storage.store import Store


def upload_shard(
    store: Store, image: ImageInfo, *, generation: str, rank: int, unit_bytes: int = UNIT_BYTES
) -> ShardEntry:
    """Upload one rank's image; what the coordinator needs to commit it. The image must not change until this returns.

    generation: letters, digits and hyphens, unique to one life of the ranks. StoreError (KeyExists if this very shard
    is there already); CheckpointError if the image is not the one described. Returns only once the data is durable
    and the store has confirmed its checksum. If this process dies first, nothing of it is ever read.
    """
    key = shard_key(generation, rank)
    sent = store.upload_file(f"{step_folder(image.step)}/{key}", image.path, unit_bytes=unit_bytes)
    if sent.size != image.size:
        raise CheckpointError(
            f"the image {image.path} has {sent.size:,} bytes and its rank described {image.size:,}: another writer "
            "uses the same path; give each rank its own"
        )
    return ShardEntry(
        step=image.step,
        stall_seconds=image.stall_seconds,
        file=FileEntry(
            key=key,
            size=sent.size,
            crc64nvme=to_text(sent.crc),
            unit_bytes=unit_bytes,
            unit_crc64nvme=list_to_text(sent.unit_crcs),
        ),
        tensors=image.tensors,
    )
