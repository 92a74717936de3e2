"""A snapshot that lies in the memory of nodes, read as a checkpoint is: by ranks of another world. No torch.

Agents write down for their ranks which image is where; `load_checkpoint` takes from each the blocks that a rank needs,
verified, through the same memory as from the store: at most 16 MiB for each of 8 streams.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raynium.checkpoint.format.manifest import Manifest, manifest_from_bytes, manifest_to_bytes
from raynium.errors import CheckpointDamaged
from raynium.storage.peers import PeerFiles
from raynium.storage.store import Store

# A file of this node, or host and port of the agent that has the image.
Place = str | tuple[str, int]


@dataclass(frozen=True)
class HeldRef:
    """A whole snapshot. places: of the image of each rank that took it, and so of each data file of the manifest."""

    manifest: Manifest
    places: tuple[Place, ...]
    secret: bytes = field(repr=False)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def uri(self) -> str:
        """For people."""
        return f"the snapshot of step {self.step} that {self.manifest.world_size} ranks left in memory"

    def file(self, index: int) -> tuple[Store | PeerFiles, str]:
        """Where the image of rank `index` lies, and its key there."""
        place = self.places[index]
        if isinstance(place, str):
            return Store(Path(place).parent), Path(place).name
        return PeerFiles(place, self.secret), held_key(self.manifest.generation, self.step, index)


def held_key(generation_id: str, step: int, rank: int) -> str:
    """By which an agent knows a rank's image."""
    return f"{generation_id}/{step}/{rank}"


def keep_held(path: Path, manifest: Manifest, places: Mapping[int, Place], secret: bytes) -> None:
    """For the ranks of this node. places: by rank. path: in a folder that nobody else may enter."""
    first = {"places": [places[rank] for rank in range(manifest.world_size)], "secret": secret.hex()}
    path.write_bytes(json.dumps(first).encode() + b"\n" + manifest_to_bytes(manifest))


def find_held(path: Path) -> HeldRef:
    """Inverse of `keep_held`. CheckpointDamaged if it is not there."""
    try:
        first, _, rest = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointDamaged(f"{path}, which says where the snapshot is, cannot be read: {error}") from error
    known = json.loads(first)
    places = tuple(place if isinstance(place, str) else (place[0], place[1]) for place in known["places"])
    return HeldRef(manifest_from_bytes(rest, where=str(path)), places, bytes.fromhex(known["secret"]))
