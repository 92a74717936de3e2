"""The node's cache of ranges: fetched once, never above its bound, right whatever died or was damaged before."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cache_folders import bytes_in_cache
from waiting import wait_for

from raynium.errors import DataError, StoreError
from raynium.storage.range_cache import CachedRange, NoRoom, RangeCache
from raynium.storage.store import Store

SIZE = 100_000


def content(key: str, size: int = SIZE) -> bytes:
    return random.Random(key).randbytes(size)


def wanted(key: str, *, fetched: Counter[str] | None = None, size: int = SIZE, seconds: float = 0.0) -> CachedRange:
    """A range whose bytes follow from its key."""

    def fill(view: memoryview) -> None:
        if fetched is not None:
            fetched[key] += 1
        time.sleep(seconds)
        view[:] = content(key, size)

    return CachedRange(key, size, fill, lambda view: view == content(key, size))


def test_a_range_is_fetched_once_and_found_by_others(tmp_path: Path):
    fetched: Counter[str] = Counter()
    for _ in range(2):
        cache = RangeCache(tmp_path / "cache", max_bytes=10 * SIZE)
        assert cache.hold(wanted("a", fetched=fetched)) == content("a")
    assert fetched == {"a": 1}
    assert {each.name for each in (tmp_path / "cache").iterdir()} == {"a", ".room"}


def test_the_view_cannot_be_written(tmp_path: Path):
    cache = RangeCache(tmp_path, max_bytes=SIZE)
    for _ in range(2):
        with pytest.raises(TypeError):
            cache.hold(wanted("a"))[0] = 1


def test_threads_that_want_one_range_wait_for_its_fetch(tmp_path: Path):
    fetched: Counter[str] = Counter()
    cache = RangeCache(tmp_path, max_bytes=10 * SIZE)
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(cache.hold, [wanted("a", fetched=fetched, seconds=0.1)] * 8))
    assert all(view == content("a") for view in views) and fetched == {"a": 1}


def test_used_up_ranges_go_first_then_the_oldest(tmp_path: Path):
    cache = RangeCache(tmp_path, max_bytes=3 * SIZE)
    for age, key in enumerate(("old", "used", "new")):
        cache.hold(wanted(key))
        os.utime(tmp_path / key, (1000 + age, 1000 + age))
    cache.used_up("used")
    for key, left in (("x", {"old", "new", "x"}), ("y", {"new", "x", "y"})):
        cache.hold(wanted(key))
        assert {each.name for each in tmp_path.iterdir()} == left | {".room"}


def test_what_is_read_is_never_removed(tmp_path: Path):
    cache = RangeCache(tmp_path, max_bytes=2 * SIZE)
    held = cache.hold(wanted("a"))
    cache.used_up("a")
    for key in "bcd":
        cache.hold(wanted(key))
        assert (tmp_path / "a").exists() and bytes_in_cache(tmp_path) == 2 * SIZE
    assert held == content("a")
    others = cache.hold(wanted("d"))
    with pytest.raises(NoRoom, match=rf"data.cache_bytes = {2 * SIZE:,}: .* {SIZE:,} bytes more are needed; set it"):
        cache.hold(wanted("e"))
    assert others == content("d") and not list(tmp_path.glob("e*"))


def test_a_caller_may_wait_for_others_let_go(tmp_path: Path):
    cache = RangeCache(tmp_path, max_bytes=SIZE)
    held = [cache.hold(wanted("a"))]
    thread = threading.Timer(0.2, held.clear)
    thread.start()
    assert cache.hold(wanted("b"), wait_seconds=60) == content("b")
    thread.join()


def test_a_fetch_that_fails_leaves_nothing_and_may_be_tried_again(tmp_path: Path):
    cache = RangeCache(tmp_path, max_bytes=SIZE)

    def fill(view: memoryview) -> None:
        view[:10] = bytes(10)
        raise StoreError("the connection broke")

    with pytest.raises(StoreError, match="the connection broke"):
        cache.hold(CachedRange("a", SIZE, fill, lambda view: True))
    assert {each.name for each in tmp_path.iterdir()} == {".room"}
    assert cache.hold(wanted("a")) == content("a")


@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: bytes([old[0] ^ 1]) + old[1:]])
def test_what_was_damaged_on_the_disk_is_fetched_again(tmp_path: Path, damage: Callable[[bytes], bytes]):
    fetched: Counter[str] = Counter()
    cache = RangeCache(tmp_path, max_bytes=SIZE)
    cache.hold(wanted("a", fetched=fetched))
    (tmp_path / "a").write_bytes(damage(content("a")))
    assert cache.hold(wanted("a", fetched=fetched)) == content("a") and fetched == {"a": 2}


def test_a_disk_that_is_full_or_refuses_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"the data cache .*/file/x cannot be used: Not a directory; set TMPDIR"):
        RangeCache(tmp_path / "file" / "x", max_bytes=SIZE)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"No space left .*has room or set data.cache_bytes \(now 100,000\) lower"):
        RangeCache(tmp_path, max_bytes=SIZE).hold(wanted("a"))
    assert not list(tmp_path.glob("a*"))


# ---- several processes, and S3 ---------------------------------------------------------------------------------------


def ranges_of(url: str, options: dict[str, Any], number: int, log: Path | None = None) -> list[CachedRange]:
    """Of one object: `number` ranges of SIZE bytes."""
    store = Store(url, options=options)

    def one(index: int) -> CachedRange:
        def fill(view: memoryview) -> None:
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{index}\n")
            store.read_into("object", index * SIZE, view)

        return CachedRange(f"object.{index}", SIZE, fill, lambda view: view == content(str(index)))

    return [one(index) for index in range(number)]


def read_all(url: str, options: dict[str, Any], folder: Path, log: Path, number: int, seed: int, results: Any) -> None:
    cache = RangeCache(folder, max_bytes=6 * SIZE)
    ranges = ranges_of(url, options, number, log)
    wrong = 0
    for index in random.Random(seed).choices(range(number), k=60):
        view = cache.hold(ranges[index], wait_seconds=60)
        wrong += view != content(str(index))
    results.put(wrong)


@pytest.fixture(scope="module")
def url(s3_server: Any) -> str:
    bucket = s3_server.create_bucket("ranges")
    objects = b"".join(content(str(index)) for index in range(20))
    Store(f"{bucket}/r", options=s3_server.options).replace("object", objects)
    return f"{bucket}/r"


@pytest.mark.s3
def test_processes_at_once_get_the_right_bytes_and_keep_the_bound_together(url: str, s3_server: Any, tmp_path: Path):
    folder, most, done = tmp_path / "cache", [0], threading.Event()
    RangeCache(folder, max_bytes=1)

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], bytes_in_cache(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=read_all, args=(url, s3_server.options, folder, tmp_path / "log", 20, seed, results))
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    try:
        assert [results.get(timeout=120) for _ in processes] == [0, 0, 0]
    finally:
        done.set()
        watcher.join()
        for process in processes:
            process.join()
    assert 4 * SIZE <= most[0] <= 6 * SIZE
    assert len((tmp_path / "log").read_text().split()) > 20, "more was wanted than there is room for"


def fetch_and_hang(url: str, options: dict[str, Any], folder: Path) -> None:
    first = ranges_of(url, options, 1)[0]

    def fill(view: memoryview) -> None:
        view[: SIZE // 2] = bytes(SIZE // 2)
        (folder / "half").touch()
        time.sleep(600)

    RangeCache(folder, max_bytes=2 * SIZE).hold(CachedRange(first.key, SIZE, fill, first.is_right))


@pytest.mark.s3
def test_a_process_killed_in_a_fetch_is_in_nobodys_way(url: str, s3_server: Any, tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(
        target=fetch_and_hang, args=(url, s3_server.options, tmp_path)
    )
    process.start()
    wait_for(lambda: (tmp_path / "half").exists())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "object.0.partial").stat().st_size == SIZE
    ranges = ranges_of(url, s3_server.options, 3)
    cache = RangeCache(tmp_path, max_bytes=2 * SIZE)
    # Its half takes up room until somebody needs that room.
    others = [cache.hold(ranges[index]) for index in (1, 2)]
    assert others[0] == content("1") and others[1] == content("2")
    assert not (tmp_path / "object.0.partial").exists()
    del others
    assert cache.hold(ranges[0]) == content("0")
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.partial"))
