"""Whether an image is whole: its header is written last and says of which step it is. No torch."""

import json

from raynium.checkpoint.format.manifest import ImageInfo
from raynium.errors import CheckpointDamaged


def check_header(info: ImageInfo, image: memoryview) -> None:
    """image: the file's bytes, which nobody writes now. CheckpointDamaged if it was being written when its writer died,
    or is of another step.
    """
    length = int.from_bytes(image[:8], "little")
    try:
        step = int(json.loads(bytes(image[8 : 8 + length]))["__metadata__"]["step"]) if length < len(image) else None
    except (ValueError, KeyError):
        step = None
    if step != info.step or len(image) != info.size:
        raise CheckpointDamaged(
            f"the snapshot {info.path} is not the whole one of step {info.step}: its writer died while writing it"
        )
