"""A store as pyarrow sees it: for libraries that write through Arrow's file systems, as Ray Train does."""

from typing import Any

from raynium.storage.store import Store


def arrow_place(store: Store) -> tuple[str, Any]:
    """(path, pyarrow file system) of the store's folder; None instead of a file system where the path alone says it."""
    if not store.url.startswith("s3://"):
        # A plain path: Arrow would read a URL's spaces, accents and percent signs in its own way.
        return store.url.removeprefix("file://"), None
    import fsspec
    import pyarrow.fs

    return store.url.removeprefix("s3://"), pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("s3")))
