"""A Hugging Face folder, on this machine or in S3: its small files, and where its weights are. No torch."""

import json
from pathlib import Path
from typing import Any

from raynium.config.local_folders import local_path
from raynium.config.plain_file import plain_size, read_plain
from raynium.errors import CheckpointDamaged, CheckpointError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.local_files import look
from raynium.storage.store import Store

_MAX_BYTES = 16 * 2**20


class Folder:
    """place: a path, or an s3:// or file:// URL. CheckpointError if there is no such folder."""

    def __init__(self, place: str | Path):
        text = str(place).removeprefix("file://")
        self._local = None if "://" in text else local_path(text)
        if self._local is not None and not look(self._local.is_dir):
            raise CheckpointError(f"{place} is no folder of this machine: give one with config.json and *.safetensors")
        self.place = text if self._local is None else str(self._local)

    def __str__(self) -> str:
        return self.place

    def path(self, name: str) -> str:
        """Of a file in it, for messages."""
        return f"{self.place.rstrip('/')}/{name}"

    @property
    def store(self) -> Store:
        """To read from."""
        return Store(self.place)

    def names(self) -> set[str]:
        """Of what is in the folder itself."""
        if self._local is None:
            return set(self.store.list(recursive=False).sizes)
        try:
            return {path.name for path in self._local.iterdir() if look(path.exists)}
        except OSError as error:
            raise CheckpointError(f"cannot read {self.place}: {error.strerror}") from error

    def size(self, name: str) -> int:
        """Bytes of a plain file. CheckpointError if it is none."""
        try:
            return self.store.size(name) if self._local is None else plain_size(self._local / name)
        except KeyMissing as error:
            raise CheckpointError(f"cannot read {self.path(name)}: it does not exist") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path(name)}: {error.strerror}") from error

    def read(self, name: str) -> bytes:
        """A small file. CheckpointError if it is no plain file, or larger than such a file is."""
        asked = "is its folder a Hugging Face model?"
        try:
            if self._local is not None:
                return read_plain(self._local / name, max_bytes=_MAX_BYTES)
            return self.store.read(name, max_bytes=_MAX_BYTES)
        except KeyMissing as error:
            raise CheckpointError(f"cannot read {self.path(name)}: it does not exist; {asked}") from error
        except StoreError as error:
            raise CheckpointError(f"cannot read {self.path(name)}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path(name)}: {error.strerror}; {asked}") from error

    def text(self, name: str) -> str:
        """As `read`; CheckpointDamaged if it is not UTF-8."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise CheckpointDamaged(f"{self.path(name)} is not UTF-8: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """As `text`; CheckpointDamaged also if it is no JSON object."""
        try:
            fields = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise CheckpointDamaged(f"{self.path(name)} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise CheckpointDamaged(f"{self.path(name)} is not a JSON object")
        return fields

    def is_file(self, name: str) -> bool:
        return self._local is None or look((self._local / name).is_file)
