"""The compile cache of several nodes: real files, a real store, and what races, damage and outages do to it."""

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server

from raynium.accelerators.cpu import CpuAccelerator
from raynium.accelerators.neuron import NeuronAccelerator
from raynium.accelerators.neuron_xla import NeuronXlaAccelerator
from raynium.hardware.catalog import INSTANCES
from raynium.health.faults import classify
from raynium.node import compile_cache
from raynium.node.compile_cache import CacheSync, NodeCache, entries, node_cache
from raynium.run.protocol import RankExit
from raynium.storage.backend import Listing
from raynium.storage.store import Store


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "raynium")
    monkeypatch.setattr(compile_cache, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(compile_cache, "SETTLE_OTHERS_SECONDS", 0.01)
    return lambda: caplog.text


class Node:
    """One node's folder and its sync, with the store that all share."""

    def __init__(self, url: str | Path, folder: Path, node_rank: int = 0, **options: Any):
        self.folder = folder
        self.sync = CacheSync(str(url), folder, suffix=".neff", is_first=node_rank == 0, **options)

    def __enter__(self) -> "Node":
        self.sync.start()
        assert self.sync.wait_filled(timeout_seconds=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.sync.close()

    def compile(self, name: str, data: bytes = b"neff") -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def files(self) -> dict[str, bytes]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


Make = Callable[..., Node]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Make]:
    """Nodes over one store in `tmp_path`; a node of a name it has had keeps its folder."""
    yield lambda name, **options: Node(tmp_path / "store", tmp_path / name, **options)


def test_what_one_node_compiled_the_next_one_has_before_it_starts(node: Make, tmp_path: Path) -> None:
    with node("a") as first:
        first.compile("ab/cd/one.neff", b"1" * 100_000)
        first.compile("ef/two.neff")
    with node("b", node_rank=1) as second:
        assert second.files() == first.files()
        second.compile("gh/three.neff")
    before = {key: size for key, size in Store(tmp_path / "store").list().sizes.items()}
    assert len(before) == 3
    with node("a") as first:
        assert set(first.files()) == {"ab/cd/one.neff", "ef/two.neff", "gh/three.neff"}
    assert Store(tmp_path / "store").list().sizes == before


def test_entries_go_up_while_the_run_goes_on(node: Make, tmp_path: Path) -> None:
    with node("a") as first:
        first.compile("one.neff")
        first.sync.changed()
        deadline = time.monotonic() + 30
        while not Store(tmp_path / "store").list().sizes:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_is_compiled_while_others_go_up_is_shared_before_the_end(
    node: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, uploading, ending = Store.upload_file, threading.Event(), threading.Event()

    def slow(store: Store, key: str, path: Path) -> Any:
        uploading.set()
        assert ending.wait(30)
        return upload(store, key, path)

    monkeypatch.setattr(Store, "upload_file", slow)
    first = node("a")
    with first:
        first.compile("one.neff")
        first.sync.changed()
        assert uploading.wait(30)
        first.compile("two.neff")
        end = threading.Thread(target=first.sync.close)
        end.start()
        while not first.sync._closing.is_set():
            time.sleep(0.001)
        ending.set()
        end.join()
    assert [each.path for each in entries(Store(tmp_path / "store"))] == ["one.neff", "two.neff"]


def test_only_finished_files_are_shared(node: Make, tmp_path: Path) -> None:
    with node("a") as first:
        for name in ("one.neff.lock", "tmpx1.tmp", ".hidden.neff", ".tmp-1/two.neff", "a b.neff", "notes.json"):
            first.compile(name)
        first.compile("empty.neff", b"")
        first.compile("real.neff")
        (tmp_path / "elsewhere").write_text("secret")
        (first.folder / "link.neff").symlink_to(tmp_path / "elsewhere")
    assert [each.path for each in entries(Store(tmp_path / "store"))] == ["real.neff"]


def test_two_nodes_that_compile_the_same_graph_do_not_meet(node: Make, tmp_path: Path) -> None:
    """Compilers need not give equal bytes; whoever comes later takes one of both, whole."""
    nodes = [node(f"node-{number}", node_rank=number) for number in range(4)]
    for number, each in enumerate(nodes):
        each.__enter__()
        each.compile("same.neff", b"same")
        each.compile("other.neff", f"made by {number}".encode() * 10_000)
    ends = [threading.Thread(target=each.sync.close) for each in nodes]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    found = [each.path for each in entries(Store(tmp_path / "store"))]
    assert found.count("same.neff") == 1 and 1 <= found.count("other.neff") <= 4
    with node("late") as late:
        assert late.files()["other.neff"] in [each.files()["other.neff"] for each in nodes]
    node("latest").compile("same.neff", b"not quite the same")
    with node("latest"):
        pass
    assert [each.path for each in entries(Store(tmp_path / "store"))] == found, "one of a graph is enough"


def test_who_comes_second_with_the_same_bytes_adds_nothing(node: Make, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first, second = node("a"), node("b")
    for each in (first, second):
        each.compile("one.neff")
    assert first.sync._upload(store, "one.neff")
    assert not second.sync._upload(store, "one.neff")
    assert len(entries(store)) == 1


def test_a_file_that_another_rank_replaces_under_an_upload_is_not_shared_under_a_wrong_checksum(
    node: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = compile_cache.checksum
    with node("a") as first:
        first.compile("one.neff", b"first")

        def replaced_meanwhile(part: bytes, before: int = 0) -> int:
            if part == b"first":
                first.compile("one.neff", b"second")
            return checksum(part, before)

        monkeypatch.setattr(compile_cache, "checksum", replaced_meanwhile)
    assert entries(Store(tmp_path / "store")) == []
    with node("a"):
        pass
    with node("b") as second:
        assert second.files() == {"one.neff": b"second"}


@pytest.mark.parametrize("damage", [b"", b"nef", b"neFf"], ids=["emptied", "truncated", "changed"])
def test_a_damaged_entry_is_not_used_and_is_made_anew(
    node: Make, tmp_path: Path, log: Callable[[], str], damage: bytes
) -> None:
    with node("a") as first:
        first.compile("one.neff")
        first.compile("two.neff")
    store = Store(tmp_path / "store")
    (key,) = (each.key for each in entries(store) if each.path == "one.neff")
    store.replace(key, damage)
    with node("b") as second:
        assert set(second.files()) == {"two.neff"}, "nothing half written is left either"
        assert f"{key} is damaged" in log()
        second.compile("one.neff")
    with node("c") as third:
        assert third.files() == first.files()


def test_what_others_put_there_is_left_alone_and_stays_inside(
    node: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/README").write_text("not ours")
    (tmp_path / "store/half.neff=12345").write_text("not ours")
    with node("a") as first:
        assert first.files() == {}
    # S3 accepts any text as a key, and a listing gives it back.
    keys = [
        f"{path}=0123456789abcdef" for path in ("../up.neff", "/root.neff", "a/../../up.neff", ".bashrc", "in.neff")
    ]
    listing = Listing(sizes=dict.fromkeys(keys, 4), modified_unix=dict.fromkeys(keys, 0.0))
    monkeypatch.setattr(Store, "list", lambda store: listing)
    assert [each.path for each in entries(Store(tmp_path / "store"))] == ["in.neff"]


def test_a_full_cache_takes_no_more(node: Make, tmp_path: Path, log: Callable[[], str]) -> None:
    with node("a", max_bytes=250) as first:
        for number in range(4):
            first.compile(f"{number}.neff", bytes(100))
    assert len(entries(Store(tmp_path / "store"))) == 2
    assert "so new entries stay on this node; delete what old compilers made there" in log()


def test_a_cache_larger_than_the_disk_leaves_the_compiler_room(
    node: Make, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str]
) -> None:
    with node("a") as first:
        for number in range(4):
            first.compile(f"{number}.neff", bytes(1000))
    usage = shutil.disk_usage(first.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=compile_cache.KEPT_FREE_BYTES + 2500))
    with node("b") as second:
        assert len(second.files()) == 2
        assert "2 of 4 entries stay in" in log() and "must keep 2.1 GB free for others" in log()


def test_a_store_that_cannot_be_used_costs_only_a_line(tmp_path: Path, log: Callable[[], str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with Node(tmp_path / "file/store", tmp_path / "a") as alone:
        assert "cannot be listed, so graphs are compiled here" in log()
        alone.compile("one.neff")
    assert alone.files() == {"one.neff": b"neff"}
    assert "nothing is uploaded now" in log()
    with Node("ftp://somewhere", tmp_path / "b"):
        assert "no longer shared through ftp://somewhere: 'ftp://somewhere' has the scheme 'ftp'" in log()


def test_a_local_folder_that_cannot_be_written_costs_only_a_line(
    node: Make, tmp_path: Path, log: Callable[[], str]
) -> None:
    with node("a") as first:
        first.compile("one.neff")
    (tmp_path / "b").write_text("in the way")
    with node("b"):
        assert f"nothing can be kept in {tmp_path / 'b'}, so graphs are compiled here" in log()


def test_a_store_that_does_not_answer_holds_nobody_up(tmp_path: Path, log: Callable[[], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}", "key": "x", "secret": "x"}
        silence = Node("s3://bucket/cache", tmp_path / "a", options=options)
        silence.sync.start()
        assert not silence.sync.wait_filled(timeout_seconds=0.2)
        silence.sync.close(timeout_seconds=0.2)
    assert "is not all here after 0 s; ranks compile what they miss" in log()
    assert "not all new entries reached s3://bucket/cache" in log()


@pytest.mark.s3
def test_the_same_through_s3(s3_server: S3Server, tmp_path: Path) -> None:
    options = s3_server.options
    url = s3_server.create_bucket("compile-cache") + "/runs/compile-cache/key"
    with Node(url, tmp_path / "a", options=options) as first:
        first.compile("ab/cd/one.neff", os.urandom(300_000))
        first.compile("ab/ef/two.neff")
    store = Store(url, options=options)
    (key,) = (each.key for each in entries(store) if each.path.endswith("two.neff"))
    store.replace(key, b"nef")
    with Node(url, tmp_path / "b", options=options) as second:
        assert second.files() == {"ab/cd/one.neff": first.files()["ab/cd/one.neff"]}
        second.compile("ab/ef/two.neff", first.files()["ab/ef/two.neff"])
    with Node(url, tmp_path / "c", options=options) as third:
        assert third.files() == first.files()


# ---- Which cache a node has ------------------------------------------------------------------------------------------

VERSIONS = {"neuronx-cc": "2.28.7631.0", "torch": "2.13.0+cpu"}
TRN2 = INSTANCES["trn2.48xlarge"]
KEY = "neuronx-cc-2.28.7631.0+torch-2.13.0+cpu+lnc-2+trainium2"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_real_packages = metadata.version

    def version(name: str) -> str:
        return VERSIONS.get(name) or of_real_packages(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("HOME", str(tmp_path))


def environment(accelerator: NeuronAccelerator | NeuronXlaAccelerator, url: str, **inherited: str) -> Mapping[str, str]:
    return node_cache(accelerator, url, is_first=True, inherited=inherited).environment


@pytest.mark.usefixtures("versions")
def test_the_native_cache_is_a_folder_per_key_that_is_copied_beside_the_runs(tmp_path: Path) -> None:
    cache = node_cache(NeuronAccelerator(TRN2), "s3://bucket/runs/first", is_first=True, inherited={})
    assert cache.environment == {"TORCH_NEURONX_NEFF_CACHE_DIR": str(tmp_path / ".cache/raynium/compile-cache" / KEY)}
    assert cache.sync is not None and cache.sync.url == f"s3://bucket/runs/compile-cache/{KEY}"


@pytest.mark.usefixtures("versions")
def test_executables_are_shared_only_by_those_they_fit() -> None:
    def key(accelerator: NeuronAccelerator, **inherited: str) -> str:
        cache = accelerator.compile_cache(inherited)
        assert cache is not None
        return cache.key

    assert key(NeuronAccelerator(TRN2)) == key(NeuronAccelerator(INSTANCES["trn2.3xlarge"])) == KEY
    assert key(NeuronAccelerator(TRN2), NEURON_LOGICAL_NC_CONFIG="1") == KEY.replace("lnc-2", "lnc-1")
    trn1 = NeuronXlaAccelerator(INSTANCES["trn1.32xlarge"]).compile_cache({})
    assert trn1 is not None and trn1.key.endswith("+lnc-1+trainium1")
    assert NeuronAccelerator().compile_cache({}) is None, "of a machine that nobody knows"
    assert NeuronXlaAccelerator().compile_cache({}) is None


@pytest.mark.usefixtures("versions")
def test_torch_xla_reaches_the_store_itself(tmp_path: Path) -> None:
    xla = NeuronXlaAccelerator(TRN2)
    assert environment(xla, "s3://bucket/runs/first") == {
        "NEURON_COMPILE_CACHE_URL": f"s3://bucket/runs/compile-cache/{KEY}"
    }
    assert environment(xla, str(tmp_path / "runs/first")) == {
        "NEURON_COMPILE_CACHE_URL": f"{tmp_path}/runs/compile-cache/{KEY}"
    }
    assert node_cache(xla, str(tmp_path / "first"), is_first=True, inherited={}).sync is None


@pytest.mark.usefixtures("versions")
def test_a_cache_that_the_user_chose_is_left_alone(log: Callable[[], str]) -> None:
    chosen = {"TORCH_NEURONX_NEFF_CACHE_DIR": "/fsx/neff"}
    cache = node_cache(NeuronAccelerator(TRN2), "s3://bucket/runs/first", is_first=True, inherited=chosen)
    assert (cache.environment, cache.sync) == ({}, None)
    assert "TORCH_NEURONX_NEFF_CACHE_DIR is set, so it is used as it is" in log()


def test_pickles_of_inductor_are_never_shared() -> None:
    cache = node_cache(CpuAccelerator(), "s3://bucket/runs/first", is_first=True, inherited={})
    assert (cache.environment, cache.sync) == ({}, None)


# ---- graphs that cannot be loaded ----------------------------------------------------------------------------------


def cannot_load(rank: int, name: str) -> RankExit:
    fault = classify([f"NMGR:kmgr_load_nn_post_metrics  Failed to load NN: /tmp/workdir/model.{name}.neff, err: 10"])
    assert fault is not None
    return RankExit(rank, 1, f"{fault} (RuntimeError: x)", retry=fault.retry, error="RuntimeError", fault=fault)


def test_a_graph_that_cannot_be_loaded_leaves_the_cache_once_and_then_ends_the_run(tmp_path: Path) -> None:
    graph, other = "MODULE_f412a6bebf32d04bf191+2c2d707e", "MODULE_0000000000000000ffff+2c2d707e"
    local, shared = tmp_path / "local", tmp_path / "shared"
    for folder in (local, shared):
        for name in (graph, other):
            (folder / name).mkdir(parents=True)
            (folder / name / "model.neff").write_bytes(b"neff")
    cache = NodeCache({}, None, (str(local), str(shared)))
    well = RankExit(2, 0, None, retry=False)
    exits = cache.without_broken([cannot_load(0, graph), cannot_load(1, graph), well])
    assert [each.retry for each in exits] == [True, True, False] and exits[2] == well
    assert "removed from the compile cache: compiled anew" in (exits[0].cause or "")
    assert sorted(path.parent.name for path in tmp_path.rglob("*.neff")) == [other, other]
    (again,) = cache.without_broken([cannot_load(0, graph)])
    assert not again.retry and "empty the compile cache, and take both of one release" in (again.cause or "")
    (another,) = cache.without_broken([cannot_load(0, other)])
    assert another.retry


def test_a_graph_in_a_cache_of_the_users_stays_there_and_ends_the_run(tmp_path: Path) -> None:
    (end,) = NodeCache({}, None).without_broken([cannot_load(0, "MODULE_f412a6bebf32d04bf191+2c2d707e")])
    assert not end.retry and "the cache that you set" in (end.cause or "")


def test_a_graph_without_a_name_is_looked_for_nowhere(tmp_path: Path) -> None:
    fault = classify(["RuntimeError: INVALID_ARGUMENT: NEFF is invalid; it could be broken or hacked"])
    (tmp_path / "a.neff").write_bytes(b"neff")
    (end,) = NodeCache({}, None, (str(tmp_path),)).without_broken([RankExit(0, 1, "x", retry=True, fault=fault)])
    assert not end.retry and (tmp_path / "a.neff").exists()


def test_a_store_that_is_away_keeps_no_rank_from_another_try(tmp_path: Path, log: Callable[[], str]) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    (exit,) = NodeCache({}, None, (str(place),)).without_broken(
        [cannot_load(0, "MODULE_f412a6bebf32d04bf191+2c2d707e")]
    )
    assert exit.retry
