"""Folders of this machine's disk that belong to this user, for what need not outlive it."""

import os
import stat
import sys
import tempfile
from pathlib import Path

from raynium.errors import ConfigError, StoreError


def nameless(path: str) -> str | None:
    """Why no file can have this path: in words that follow it; None if one can.

    A path is written into JSON and into databases too, in UTF-8; and it is a name only in the locale's encoding.
    """
    try:
        path.encode()
        os.fsencode(path)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        return (
            f"holds bytes that are no UTF-8, or characters that the locale's encoding, {encoding}, does not have; "
            "LC_ALL=C.UTF-8 is right everywhere"
        )
    return None


def local_path(given: str | Path) -> Path:
    """Absolute, with `~` as a home folder. Raises ConfigError where there is no such home."""
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ConfigError([f"{path} begins with a home folder that is not known here: give an absolute path"])
    return Path(path).absolute()


def temporary_parent() -> Path:
    """Python's temporary folder. Raises StoreError where there is none that can be written or named."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no temporary folder that can be written and has room ({error.strerror}): set TMPDIR to one"
        ) from error
    if problem := nameless(folder):
        raise StoreError(f"the temporary folder {folder!a} {problem}: set TMPDIR to another")
    return Path(folder)


def ignored_tmpdir() -> list[str]:
    """A line where TMPDIR names what Python cannot use, and another folder stands in; else []."""
    given, used = os.environ.get("TMPDIR"), temporary_parent()
    if not given or os.path.abspath(given) == os.path.abspath(used):
        return []
    return [
        f"TMPDIR is {given}, which is no folder that can be written: {used} is used. Make it, or set TMPDIR to another"
    ]


def scratch_folder() -> Path:
    """`<temporary folder>/raynium-<uid>`, the same on every node. Raises StoreError if others may write it."""
    folder = Path(temporary_parent(), f"raynium-{os.getuid()}")
    remedy = "Remove it, or set TMPDIR to a folder of yours"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}. {remedy}") from error
    # Anybody may make folders and links in /tmp; what a stranger can write or point elsewhere we do not use.
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise StoreError(
            f"{folder} must be a folder of user {os.getuid()} that nobody else may write; it has owner {found.st_uid} "
            f"and mode {stat.filemode(found.st_mode)}. {remedy}"
        )
    return folder


def cache_home() -> Path:
    """`~/.cache/raynium`, or `cache` in the scratch folder for a user without a home folder that can be written."""
    folder = Path(os.path.expanduser("~"), ".cache/raynium")
    nearest = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if folder.is_absolute() and os.access(nearest, os.W_OK | os.X_OK):
        return folder
    return scratch_folder() / "cache"
