"""Folders of this machine that live as long as the process that made them, or until the next one comes."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# Folder → the descriptor that holds its lock.
_held: dict[Path, int] = {}


def shared_memory_folder() -> Path:
    """Memory that files can live in. Where there is none (not Linux) the temporary folder stands in."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else Path(tempfile.gettempdir())


def own_folder(parent: Path, label: str) -> Path:
    """A new folder in `parent` that nobody else may enter, until `drop_folder`, or until this process is dead.

    What dead processes of this user left in `parent` is removed first: nobody else would, and it may be gigabytes of
    memory. Raises OSError where no folder can be made.
    """
    remove_left(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{label}-", dir=parent))
        # Another process that comes now may remove it before it is locked.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            # Where a file system has no such locks nobody can tell whose a folder is, and nobody removes it.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.is_dir():
                _held[folder] = descriptor
                return folder
            os.close(descriptor)


def drop_folder(folder: Path) -> None:
    """Removes what `own_folder` gave."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(_held.pop(folder))


def shared_folder(parent: Path, name: str) -> Path:
    """`parent/name`, made if need be, which all processes that ask for it share for as long as they live.

    Folders in `parent` that no living process has asked for are removed first. Raises OSError where none can be made.
    """
    folder = parent / name
    if folder in _held and folder.is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for other in parent.iterdir():
        if other != folder:
            _remove_if_dead(other)
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Another process that came in between may have removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                _held[folder] = descriptor
                return folder
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(label: str, parent: Path | None = None) -> Iterator[Path]:
    """`own_folder` for the block; in the temporary folder, if no other is named."""
    folder = own_folder(parent or Path(tempfile.gettempdir()), label)
    try:
        yield folder
    finally:
        drop_folder(folder)


def remove_left(parent: Path) -> list[Path]:
    """Removes the folders in `parent` whose processes are dead; returns them.

    A lock tells, not a pid: the kernel lets go of it whatever ends its holder, and it is seen from every container that
    shares the folder.
    """
    return [folder for folder in parent.glob(f"{_prefix()}*") if _remove_if_dead(folder)]


def _remove_if_dead(folder: Path) -> bool:
    with contextlib.suppress(OSError), _opened(folder) as descriptor:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            logger.info("removed %s, which processes that are dead had left", folder)
            return True
    return False


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _prefix() -> str:
    return f"raynium-{os.getuid()}."
