"""Rows packed on a real Ray cluster, beside a store in a real S3: the same bytes whoever makes them, and made once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pack_on_ray import SEQ_LEN
from tiny import build_documents

from raynium.config.schema import DataSection
from raynium.data import packed_index
from raynium.data.packed_index import ensure_index, pack_to
from raynium.data.packing import index as packing_index
from raynium.data.packing import packer
from raynium.data.packing.index import INDEX_NAME, index_key, part_name
from raynium.data.remote import localize
from raynium.data.rows import open_rows, packable
from raynium.data.store import open_store
from raynium.data.streamed import open_streamed
from raynium.errors import DataError
from raynium.storage.range_cache import RangeCache
from raynium.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(300)]

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def url(s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = build_documents(tmp_path_factory.mktemp("documents"))
    store = Store(f"{s3_server.create_bucket('pack-ray')}/data", options=s3_server.options)
    for path in folder.iterdir():
        if path.is_file():
            store.upload_file(path.name, path)
    return store.url


@pytest.fixture
def here(url: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(packer, "window_tokens", lambda seq_len: 1024)
    monkeypatch.setattr(packer, "PART_TOKENS", 2048)
    return url


def section(url: str) -> DataSection:
    return DataSection(path=url, seq_len=SEQ_LEN, packing="documents")


def streamed(url: str, folder: Path) -> Any:
    return open_streamed(url, RangeCache(folder, max_bytes=2**26))


def index_of(home: str) -> dict[str, bytes]:
    store = Store(home)
    return {key: store.read(key) for key in store.list("packed").sizes}


def pack_on_ray(url: str, home: str, cpus: int, scratch: Path, then: str = "") -> list[str]:
    """The numbers of the parts of which a task began."""
    tasks = scratch / f"tasks-{cpus}-{then}"
    done = subprocess.run(
        [sys.executable, str(TESTS / "_pack_on_ray.py"), url, home, str(cpus), *([then] if then else [])],
        env=os.environ | {"PYTHONPATH": str(TESTS), "TEST_TASKS": str(tasks)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (done.returncode == 0) == (not then), done.stderr
    return [line.split()[0] for line in tasks.read_text().splitlines()]


def test_one_and_two_workers_and_this_process_make_the_same_bytes_and_a_broken_off_index_goes_on(
    here: str, tmp_path: Path
):
    own = f"{here}-here"
    ensure_index(packable(streamed(here, tmp_path / "own"), own), section(here))
    expected = index_of(own)
    numbers = sorted(range(len(expected) - 1), key=str)
    assert len(numbers) > 5 and {key.rpartition("/")[2] for key in expected} == {INDEX_NAME, *map(part_name, numbers)}
    assert sorted(pack_on_ray(here, f"{here}-two", 2, tmp_path)) == [str(number) for number in numbers]
    assert index_of(f"{here}-two") == expected

    pack_on_ray(here, f"{here}-stopped", 1, tmp_path, "stop")
    broken_off = Store(f"{here}-stopped").list("packed")
    assert 3 <= len(broken_off.sizes) < len(expected) and not any(key.endswith(INDEX_NAME) for key in broken_off.sizes)
    pack_on_ray(here, f"{here}-stopped", 1, tmp_path)
    assert index_of(f"{here}-stopped") == expected
    after = Store(f"{here}-stopped").list("packed").modified_unix
    assert {key: after[key] for key in broken_off.modified_unix} == broken_off.modified_unix, "no part was made again"


def test_nodes_that_copy_and_that_stream_read_what_was_made_once(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ensure_index(packable(streamed(here, tmp_path / "driver")), section(here))
    made = Store(here).list("packed").modified_unix

    def refused(*given: Any) -> Any:
        raise AssertionError("packed once more")

    monkeypatch.setattr(packed_index, "pack_to", refused)
    columns = []
    for node in ("copies", "streams"):
        monkeypatch.setattr(packing_index, "scratch_folder", lambda node=node: tmp_path / node)
        copies = node == "copies"
        store = open_store(localize(here, tmp_path / "copy")) if copies else streamed(here, tmp_path / "streams/cache")
        rows = open_rows(store, section(here), here, f"{tmp_path}/run")
        parts = tmp_path / node / "data/packed" / index_key(store.manifest.identity, section(here))
        there = len(list(parts.glob("*.bin")))
        assert there == (len(made) - 1 if copies else 0), "streaming copies a part when it is first used"
        columns.append(rows.read(np.arange(len(rows))))
        assert len(list(parts.glob("*.bin"))) == len(made) - 1
    for name, column in columns[0].items():
        assert np.array_equal(column, columns[1][name])
    assert Store(here).list("packed").modified_unix == made


def test_a_part_that_was_damaged_on_a_nodes_disk_is_copied_again_and_one_in_s3_is_an_error(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = f"{here}-damage"
    known = packable(streamed(here, tmp_path / "cache"), home)
    ensure_index(known, section(here)).copy_all()
    [copy] = tmp_path.glob(f"raynium-*/data/packed/*/{part_name(0)}")
    whole = copy.read_bytes()
    copy.write_bytes(b"\0" * len(whole))
    ensure_index(known, section(here)).part(0)
    assert copy.read_bytes() == whole

    copy.unlink()
    store = Store(home)
    [key] = [key for key in store.list("packed").sizes if key.endswith(part_name(0))]
    store.replace(key, b"\0" * len(whole))
    with pytest.raises(DataError, match=f"{key} is damaged, .*delete {home}/packed"):
        ensure_index(known, section(here)).part(0)
    store.delete(key)
    with pytest.raises(DataError, match=f"{key} is damaged"):
        ensure_index(known, section(here)).part(0)


def test_a_task_reads_the_copy_that_its_node_has_and_streams_where_it_has_none(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = localize(here, tmp_path / "copy")
    known = packable(open_store(copy), here)
    opened: list[str] = []

    def one_by_one(task: Any, shared: Any, items: Any) -> Any:
        assert task is pack_to
        for item in items:
            yield task(shared, item)

    for name in ("open_store", "open_streamed"):
        real = getattr(packed_index, name)
        monkeypatch.setattr(packed_index, name, lambda *a, n=name, r=real, **k: (opened.append(n), r(*a, **k))[1])
    made = {}
    for place, copied in ((here, copy), (here, tmp_path / "elsewhere"), (str(copy), None)):
        opened.clear()
        home = tmp_path / f"home-{len(made)}"
        work = known._replace(copy=copied, place=place, homes=[str(home)])
        ensure_index(work, section(here), runner=one_by_one)
        made[home] = index_of(str(home))
        assert set(opened) == ({"open_streamed"} if copied == tmp_path / "elsewhere" else {"open_store"})
    first, *others = made.values()
    assert all(other == first for other in others)
