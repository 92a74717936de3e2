"""Makes the index of a store's rows: each part is a task, a pure function of the store, which may run on any node.

Parts go where the index will lie, each as soon as it is packed; one that is there is not made again, so what dies goes
on. `index.json` comes last.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from raynium.config.local_folders import scratch_folder, temporary_parent
from raynium.config.schema import DataSection
from raynium.data.packing.index import (
    INDEX_NAME,
    OpenIndex,
    PackedIndex,
    PartFacts,
    find_index,
    index_key,
    on_this_disk,
    part_content,
    part_facts,
    part_name,
)
from raynium.data.packing.packer import Stream, TooLong, num_parts, pack_alone, pack_part
from raynium.data.remote import local_path
from raynium.data.runner import Runner, in_this_process
from raynium.data.store import local_manifest, open_store
from raynium.data.streamed import open_streamed
from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.local_files import exclusive
from raynium.storage.own_folder import temporary_folder
from raynium.storage.range_cache import RangeCache
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

# Of a task that reads a store in S3: room for what it reads at once, several times over.
CACHE_BYTES = 2**28
_MAX_PART_BYTES = 2**32


class Packable(NamedTuple):
    """What packing needs of a store.

    stream: of its tokens, open in this process. end_of_document: what fills rows up, and ends a document where the
    tokens are not flagged. place: a folder or URL where any node finds the store. copy: a folder
    in which this node has one of its own, as others may. homes: folders or URLs beside which the index may lie, the one
    to be preferred first. together: neighbouring documents that are learned together, each in a row of its own.
    """

    stream: Stream
    end_of_document: int
    identity: str
    place: str
    copy: Path | None
    homes: Sequence[str]
    flagged: bool = False
    together: int = 1


@dataclass(frozen=True)
class PackWork:
    """The same for all parts. opened: the store's training tokens. target: where the parts go. end_of_document: None
    for flagged tokens. together: as of a `Packable`.
    """

    opened: Callable[[], AbstractContextManager[Stream]]
    target: str
    seq_len: int
    too_long: TooLong
    end_of_document: int | None
    together: int = 1


class NotKept(StoreError):
    """A part cannot be written to where it should lie."""


def ensure_index(
    store: Packable, data: DataSection, *, runner: Runner | None = None, tell: Callable[[str], None] = logger.info
) -> OpenIndex:
    """The index of a store for rows of data.seq_len; made first if it is missing, at some 100 to 1,000 million tokens a
    second and core. runner: of the tasks; None: this process, from the stream that it has open.

    One process of a node makes it, while others wait. Raises DataError if no document fits a row, if the store or the
    index is damaged, or if the index cannot be written; what a runner raises.
    """
    key = index_key(store.identity, data)
    if (found := find_index(key, store.homes)) is not None:
        return found
    with on_this_disk(folder := scratch_folder() / "data/packed"), exclusive(folder / f"{key}.lock", store.place):
        if (found := find_index(key, store.homes)) is not None:
            return found
        failed: list[str] = []
        for home in store.homes:
            folder = Store(home).child(f"packed/{key}")
            try:
                return OpenIndex(folder, _made(store, folder, data, runner, tell))
            except NotKept as error:
                failed.append(str(error))
                tell(f"data: the index of rows cannot be kept beside {home}: {error}")
                # What does not fit takes no room.
                with contextlib.suppress(StoreError):
                    Store(home).delete_prefix(f"packed/{key}")
    raise DataError(
        f"the index of rows cannot be written to any of its places: {'; '.join(failed)}. Make room there, or have one "
        "of them writable"
    )


def pack_to(work: PackWork, number: int) -> tuple[int, PartFacts]:
    """A task: a part that is whole at the target once this returns. DataError, StoreError where the store fails."""
    target, name = Store(work.target), part_name(number)
    try:
        with contextlib.suppress(KeyMissing):
            if (facts := part_facts(target.read(name, max_bytes=_MAX_PART_BYTES))) is not None:
                return number, facts
    except StoreError as error:
        raise NotKept(str(error)) from error
    with work.opened() as stream:
        known = {"seq_len": work.seq_len, "too_long": work.too_long}
        if work.together > 1:
            part = pack_alone(stream, together=work.together, **known)
        else:
            part = pack_part(stream, number, end_of_document=work.end_of_document, **known)
    content, facts = part_content(part)
    _keep(target, name, content)
    return number, facts


def _made(
    store: Packable, folder: Store, data: DataSection, runner: Runner | None, tell: Callable[[str], None]
) -> PackedIndex:
    opened = partial(_opened, store.place, copy=store.copy, identity=store.identity)
    work = PackWork(
        opened=opened if runner else lambda: nullcontext(store.stream),
        target=folder.url,
        seq_len=data.seq_len,
        too_long=data.too_long,
        end_of_document=None if store.flagged else store.end_of_document,
        together=store.together,
    )
    if store.together > 1 and data.too_long == "split":
        raise DataError(
            f"data.too_long is split, and {store.place} holds records of {store.together} documents each, that are "
            "learned together and whole: set data.too_long to leave_out, cut or refuse"
        )
    numbers = range(1 if store.together > 1 else num_parts(len(store.stream), data.seq_len))
    tell(f"data: packing {len(store.stream):,} tokens into rows of {data.seq_len}")
    with contextlib.closing((runner or in_this_process)(pack_to, work, numbers)) as results:
        facts = [facts for _, facts in sorted(results)]
    longest = max(each.longest for each in facts)
    if data.too_long == "refuse" and longest > data.seq_len:
        others = "cut, leave_out or split" if store.together == 1 else "cut or leave_out"
        raise DataError(
            f"data.seq_len = {data.seq_len}: the longest document of {store.place} has {longest} tokens, and "
            f"data.too_long is refuse; set data.seq_len to {longest} or more, or data.too_long to {others}"
        )
    index = PackedIndex.of(facts, identity=store.identity, seq_len=data.seq_len, too_long=data.too_long)
    if not index.num_rows:
        shortest = min(each.shortest for each in facts if each.shortest)
        what = "document" if store.together == 1 else f"record of {store.together} documents"
        without = "" if data.too_long == "leave_out" else ", and no piece of one has a label"
        other = "" if without or store.together > 1 else ", or data.too_long to split"
        raise DataError(
            f"data.seq_len = {data.seq_len}: no {what} of {store.place} fits a row, the shortest has {shortest} "
            f"tokens with its end{without}; set data.seq_len to {shortest} or more{other}"
        )
    _keep(folder, INDEX_NAME, (index.model_dump_json() + "\n").encode())
    return index


def _keep(target: Store, name: str, content: bytes) -> None:
    try:
        target.replace(name, content)
    except StoreError as error:
        raise NotKept(str(error)) from error


@contextmanager
def _opened(place: str, *, copy: Path | None, identity: str) -> Iterator[Stream]:
    """The store's tokens on whichever node this is: a copy that is here, or else what is needed of it, streamed."""
    if copy is not None and (manifest := local_manifest(copy)) is not None and manifest.identity == identity:
        yield open_store(copy).train_stream()
    elif (folder := local_path(place)) is not None:
        yield open_store(folder, identity=identity).train_stream()
    else:
        with temporary_folder("pack", temporary_parent()) as scratch:
            yield open_streamed(place, RangeCache(scratch, max_bytes=CACHE_BYTES), identity=identity).train_stream()
