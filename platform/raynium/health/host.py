"""One machine as checks see it: files, folders, commands, packages. The real one, and one made of recorded answers."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from raynium.accelerators.detect import PACKAGES, Machine, look
from raynium.health.metadata_service import MetadataService, ask

VENDOR = "/sys/devices/virtual/dmi/id/sys_vendor"
EC2_VENDOR = "Amazon EC2"

NO_ANSWER = 124
Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """What one check found. `failed` needs evidence: what could not be looked at is skipped, or a warning.

    rule: what was expected. remedy: what to do, where there is something to do.
    """

    name: str
    status: Status
    found: str
    rule: str = ""
    remedy: str = ""

    @property
    def is_bad(self) -> bool:
        return self.status == "failed"

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.found}", self.rule and f"the rule is {self.rule}", self.remedy]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Ran:
    """How a command ended (NO_ANSWER: it was given up, as `timeout` says it), and its stdout, then its stderr."""

    code: int
    output: str


class Host(Protocol):
    """A machine to look at. No method raises for what is not there."""

    @property
    def environment(self) -> Mapping[str, str]: ...

    @property
    def machine(self) -> Machine:
        """Its devices, type and Neuron packages."""
        ...

    def read(self, path: str) -> str | None:
        """A small text file; None: there is none, or this user may not read it."""
        ...

    def names(self, folder: str) -> tuple[str, ...]:
        """What lies in a folder, sorted; () if there is none."""
        ...

    def run(self, *command: str, timeout_seconds: float) -> Ran | None:
        """None: there is no such command."""
        ...

    def free_bytes(self, folder: str) -> int | None:
        """Of the file system that a folder is on, or will be on once it is made; None: not known."""
        ...

    def version(self, package: str) -> str | None:
        """Of an installed Python package."""
        ...

    def metadata_service(self) -> MetadataService | None:
        """EC2's; None: this is no EC2 instance, so nobody was asked."""
        ...


class ThisHost:
    """The machine this process runs on."""

    @property
    def environment(self) -> Mapping[str, str]:
        return os.environ

    @property
    def machine(self) -> Machine:
        return look()

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(folder)))
        except OSError:
            return ()

    def run(self, *command: str, timeout_seconds: float) -> Ran | None:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError:
            return None
        with process:
            try:
                output, errors = process.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                # With all that it started: nccom-test's work is done by a child, which would keep the cores.
                os.killpg(process.pid, signal.SIGKILL)
                return Ran(NO_ANSWER, f"no answer within {timeout_seconds:g} s")
        return Ran(process.returncode, (output + errors).decode(errors="replace"))

    def free_bytes(self, folder: str) -> int | None:
        path = Path(folder)
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free

    def version(self, package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def metadata_service(self) -> MetadataService | None:
        return ask() if (self.read(VENDOR) or "").strip() == EC2_VENDOR else None


@dataclass(frozen=True)
class RecordedHost:
    """The fake: a machine's answers, written down. What was not written down is not there.

    devices: names in /dev. files: path → text. commands: the words, joined by spaces → exit code and output. free:
    folder → bytes.
    """

    devices: tuple[str, ...] = ()
    product_name: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    commands: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    free: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    imds: MetadataService | None = None

    @classmethod
    def from_json(cls, text: str) -> "RecordedHost":
        """Fields as above; a command's output, or a file's text, may be JSON itself instead of a string of JSON."""
        fields: dict[str, Any] = json.loads(text)
        commands = {words: (code, _as_text(output)) for words, (code, output) in fields.pop("commands", {}).items()}
        files = {path: _as_text(content) for path, content in fields.pop("files", {}).items()}
        imds = MetadataService(**fields.pop("imds")) if "imds" in fields else None
        return cls(**fields, commands=commands, files=files, imds=imds)

    @property
    def machine(self) -> Machine:
        return Machine(
            gpus=sum(name.startswith("nvidia") and name[6:].isdecimal() for name in self.devices),
            neuron_devices=sum(name.startswith("neuron") for name in self.devices),
            product_name=self.product_name,
            packages={name: self.packages[name] for name in PACKAGES if name in self.packages},
        )

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def names(self, folder: str) -> tuple[str, ...]:
        return tuple(self.folders.get(folder, ()))

    def run(self, *command: str, timeout_seconds: float) -> Ran | None:
        recorded = self.commands.get(" ".join(command))
        return Ran(*recorded) if recorded is not None else None

    def free_bytes(self, folder: str) -> int | None:
        return self.free.get(folder)

    def version(self, package: str) -> str | None:
        return self.packages.get(package)

    def metadata_service(self) -> MetadataService | None:
        return self.imds


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
