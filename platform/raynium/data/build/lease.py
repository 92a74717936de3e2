"""One builder of a store at a time, wherever the store lies: S3 has no locks that die with their holder.

    building/claims/000007.json   one per builder that ever began; created exclusively, so that of two that begin at
                                  once exactly one wins
    building/beats/000007         rewritten by the builder while it lives

A builder of this host is dead when its process is; any other when its heart has not been seen to beat for
LOST_SECONDS of the watcher's own clock, so that no two clocks are compared.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from raynium.errors import DataError, StoreError
from raynium.storage.backend import KeyExists, KeyMissing
from raynium.storage.process import Owner, this_process
from raynium.storage.store import Store

# All that a build keeps in the store until it is finished.
BUILDING = "building"
CLAIMS, BEATS = f"{BUILDING}/claims", f"{BUILDING}/beats"
# There before the first file of a store is, so that what a build left behind is not taken for somebody's own.
BEGUN = f"{BUILDING}/begun"
BEAT_SECONDS = 10.0
LOST_SECONDS = 60.0
LOOK_SECONDS = 0.5


@contextmanager
def only_builder(store: Store, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Holds the store for the block; waits while another builder has it. Raises StoreError.

    Gives a check that raises DataError if another builder has taken this one for dead and gone on in its place.
    """
    number = _claim(store, tell)

    def check() -> None:
        if _newest(store) != number or _read(store, _claim_key(number)) != _content():
            raise DataError(
                f"document store {store.url} was taken over by another builder while this one could not be heard; "
                "wait for that one, and use its store"
            )

    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(BEAT_SECONDS):
            count += 1
            try:
                store.replace(f"{BEATS}/{number:06d}", str(count).encode())
            except StoreError:
                # The next beat tries again; several may be missed before it matters.
                continue

    thread = threading.Thread(target=beat, name="build-heartbeat", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        done.set()
        thread.join()
        # Whoever took over has the next number; but once all are gone, ours may be that of another who came later.
        if _read(store, _claim_key(number)) == _content():
            for old in range(1, number + 1):
                store.delete(_claim_key(old))
            store.delete(f"{BEATS}/{number:06d}")


def _claim(store: Store, tell: Callable[[str], None]) -> int:
    told, seen, seen_at = False, None, time.monotonic()
    while True:
        newest = _newest(store)
        beating = (newest, _read(store, f"{BEATS}/{newest:06d}"))
        if beating != seen:
            seen, seen_at = beating, time.monotonic()
        if not _is_held(store, newest, silent_seconds=time.monotonic() - seen_at):
            try:
                store.write_new(_claim_key(newest + 1), _content())
            except KeyExists:
                continue
            return newest + 1
        if not told:
            tell(f"data: another process builds {store.url}, and is waited for")
            told = True
        time.sleep(LOOK_SECONDS)


def _is_held(store: Store, number: int, *, silent_seconds: float) -> bool:
    content = _read(store, _claim_key(number)) if number else None
    if content is None:
        return False
    lives = Owner(**json.loads(content)).lives_here()
    return silent_seconds < LOST_SECONDS if lives is None else lives


def _newest(store: Store) -> int:
    return max((int(key.rpartition("/")[2].removesuffix(".json")) for key in store.list(CLAIMS).sizes), default=0)


def _content() -> bytes:
    return json.dumps(asdict(this_process())).encode()


def _claim_key(number: int) -> str:
    return f"{CLAIMS}/{number:06d}.json"


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except KeyMissing:
        return None
