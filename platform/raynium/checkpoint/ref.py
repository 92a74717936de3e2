"""A committed checkpoint, found and read. No torch."""

from dataclasses import dataclass

from raynium.checkpoint.format.manifest import (
    Manifest,
    step_folder,
)
from raynium.storage.store import Store


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: its place, and its manifest, already read and checked."""

    store: Store
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def uri(self) -> str:
        """The checkpoint's folder, for people and MLflow."""
        return self.store.uri(step_folder(self.step))

    def shard_key(self, index: int) -> str:
        """The key in the store of data file `index` of the manifest."""
        return f"{step_folder(self.step)}/{self.manifest.shards[index].key}"

    def file(self, index: int) -> tuple[Store, str]:
        """Where data file `index` of the manifest lies: a store, and the key in it."""
        return self.store, self.shard_key(index)
