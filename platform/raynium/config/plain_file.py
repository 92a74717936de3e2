"""Reading a file that a user has named.

A pipe that nobody writes to would be waited for for ever, and a device may have no end: neither is a file here.
"""

import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def plain_size(path: str | Path) -> int:
    """Bytes of a plain file. Raises OSError for what is missing or something else; opens nothing."""
    try:
        status = os.stat(path)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, and only plain files are read", str(path))
    return status.st_size


def read_plain(path: str | Path, *, max_bytes: int) -> bytes:
    """All of a plain file. Raises OSError, also where it is larger than `max_bytes`."""
    if plain_size(path) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes, so it is not what its name says", str(path))
    return Path(path).read_bytes()
