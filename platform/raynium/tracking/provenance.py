"""What a run's page says about where the run came from, with no secret in it."""

import getpass
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from raynium.tracking.client import redact

PACKAGES = ("raynium", "torch", "ray", "mlflow")
MASK = "***"

_SECRET_WORDS = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|credentials?|api_?key|(access|private|secret)_?key(_id)?"
    r"|(access|auth|api|session|bearer|refresh|hf)_?token)(_|$)|^token$"
)


def provenance_tags(folder: str | Path, *, accelerator: str) -> dict[str, str]:
    """MLflow tags for a run started from `folder`: host, accelerator, versions, and `origin_tags`."""
    tags = {"host": socket.gethostname(), "accelerator": accelerator, "version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            tags[f"version.{package}"] = "not installed"
    return tags | origin_tags(folder)


def origin_tags(folder: str | Path) -> dict[str, str]:
    """Who started it by which command, and commit and cleanliness of the checkout that `folder` is in, if it is in one.

    Call it where the user is: a Ray job runs as its cluster's user, in a copy of the files without `.git`. MLflow's own
    page shows those that begin with `mlflow.`.
    """
    try:
        user = getpass.getuser()
    # In a container the uid may have no name.
    except (KeyError, OSError):
        user = str(os.getuid())
    command = shlex.join([Path(sys.argv[0]).name, *map(_masked, sys.argv[1:])])
    # Both may hold bytes that are no UTF-8, which no server takes.
    user, command = (each.encode(errors="backslashreplace").decode() for each in (user, command))
    tags = {"mlflow.user": user, "mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        # Untracked files count too: a new module that nobody added changes the run as much as an edit.
        tags["git.dirty"] = "true" if _git(folder, "status", "--porcelain") else "false"
    return tags


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git or a checkout with a commit is missing."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def flatten_config(config: Mapping[str, object]) -> dict[str, str]:
    """`{"train": {"steps": 5}}` → `{"train.steps": "5"}`; secrets are masked, credentials cut out of URLs."""
    return {
        name: MASK if is_secret_name(name) and value not in (None, "") else redact(str(value))
        for name, value in _leaves(config, prefix="")
    }


def is_secret_name(name: str) -> bool:
    """True if the last part of a dotted name looks like a credential (`storage.secret_key`, not `eos_token`)."""
    return _SECRET_WORDS.search(name.rpartition(".")[2].lower().replace("-", "_")) is not None


def _masked(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    return f"{name}={MASK}" if equals and is_secret_name(name.lstrip("-")) else redact(argument)


def _leaves(config: Mapping[str, object], *, prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
