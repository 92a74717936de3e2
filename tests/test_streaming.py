"""Rows of a store that stays in S3: the same as of a copy, fetched ahead of time, within the cache's bound."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import s3fs
import torch
from cache_folders import bytes_in_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import publish

from raynium.chaos.flaky_s3 import FlakyS3, refuse
from raynium.config.schema import DataSection
from raynium.data import access, ahead
from raynium.data import streamed as streamed_tokens
from raynium.data.access import refuse_small_cache
from raynium.data.ahead import Ahead, StreamedRows
from raynium.data.build.store_build import build_store
from raynium.data.loader import Loader
from raynium.data.order import Order
from raynium.data.order.block_shuffle import BlockShuffle
from raynium.data.packing import index as packed_index
from raynium.data.packing import packer
from raynium.data.rows import StreamRows, open_rows
from raynium.data.store import DocumentStore
from raynium.data.streamed import StreamedStore, open_streamed
from raynium.errors import DataError, StoreError
from raynium.storage.range_cache import RangeCache
from raynium.storage.store import Store

pytestmark = pytest.mark.s3
numbers = itertools.count(1)
SEQ_LEN, BLOCK_ROWS, LANES, UNIT_BYTES = 16, 8, 4, 64


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    """Some 6,000 tokens in a dozen shards, so that blocks cross shards, and units that no block ends with."""
    folder = tmp_path_factory.mktemp("streaming")
    (folder / "source").mkdir()
    for i in range(60):
        (folder / "source" / f"{i}.txt").write_text(f"document {i} says {i * i} and then {i**3}\n" * (i % 7 + 4))
    return build_store(
        folder / "store",
        source=str(folder / "source"),
        vocab_size=300,
        heldout_fraction=0.2,
        split_bytes=4000,
        unit_bytes=UNIT_BYTES,
    )


@pytest.fixture(scope="module")
def bucket(s3_server: Any) -> str:
    return s3_server.create_bucket("streaming")


@pytest.fixture
def url(bucket: str, local: DocumentStore, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = f"{bucket}/{next(numbers)}"
    publish(local.path, url)
    return url


@pytest.fixture
def stream(url: str, tmp_path: Path) -> Callable[..., "Streaming"]:
    def make(**fields: Any) -> Streaming:
        cache = RangeCache(tmp_path / "cache", max_bytes=fields.pop("max_bytes", 2**20))
        return Streaming(open_streamed(url, cache), **fields)

    return make


class Streaming:
    """A loader whose rows are streamed."""

    def __init__(
        self,
        store: StreamedStore,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        ahead_bytes: int = 2**20,
        packing: Literal["stream", "documents"] = "stream",
    ):
        inner = open_rows(store, DataSection(path=store.place, seq_len=SEQ_LEN, packing=packing))
        self.store = store
        row_bytes = SEQ_LEN * store.manifest.numpy_dtype.itemsize
        self.rows = StreamedRows(inner, store, block_rows=BLOCK_ROWS, row_bytes=row_bytes)
        ahead = Ahead(total_steps=10_000, max_bytes=ahead_bytes)
        self.loader = block_loader(self.rows, data_rank=data_rank, data_size=data_size, ahead=ahead)
        self.batch, self.close = self.loader.batch, self.loader.close


def block_loader(rows: Any, *, data_rank: int = 0, data_size: int = 1, ahead: Ahead | None = None) -> Loader:
    order = Order([BlockShuffle(len(rows), seed=3, block_rows=BLOCK_ROWS, lanes=LANES)])
    return Loader([rows], order, global_batch_size=12, data_rank=data_rank, data_size=data_size, ahead=ahead)


def threads_of_fetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data-fetch")]


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_streamed_batches_are_those_of_a_copy_to_the_bit(
    local: DocumentStore, stream: Callable[..., Streaming], data_size: int
):
    rows = StreamRows(local, SEQ_LEN)
    steps = range(1, 3 * len(rows) // 12)
    for rank in range(data_size):
        copied = block_loader(rows, data_rank=rank, data_size=data_size)
        streamed = stream(data_rank=rank, data_size=data_size)
        for step in steps:
            ours, theirs = streamed.batch(step), copied.batch(step)
            assert torch.equal(ours.tokens_BT, theirs.tokens_BT) and torch.equal(ours.labels_BT, theirs.labels_BT)
        streamed.close()


def test_rows_of_whole_documents_are_streamed_to_the_bit(
    local: DocumentStore, stream: Callable[..., Streaming], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their index is made beside the store, and a node copies the parts that it reads."""
    monkeypatch.setattr(packed_index, "scratch_folder", lambda: tmp_path)
    rows = open_rows(local, DataSection(path=str(local.path), seq_len=SEQ_LEN, packing="documents"))
    copied, streamed = block_loader(rows), stream(packing="documents")
    for step in range(1, 2 * len(rows) // 12):
        ours, theirs = streamed.batch(step).columns(), copied.batch(step).columns()
        assert "documents" in ours and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list(tmp_path.glob("data/packed/*/part-*.bin"))) == 1
    streamed.close()


def test_a_cache_must_hold_what_packed_blocks_are_read_from(local: DocumentStore):
    sizes: dict[str, Any] = {"access": "stream", "shuffle": "blocks", "seq_len": SEQ_LEN, "shuffle_block_bytes": 2**10}
    # Blocks of so many bytes of rows, which lie in so many more: eight windows of 2**19 tokens, and two.
    for packing, of_rows, more in (("stream", 2**10, 0), ("documents", 8 * 2**20, 2 * 2**20)):
        data = DataSection(path="s3://bucket/store", packing=packing, cache_bytes=1000, **sizes)
        with pytest.raises(DataError, match=r"set data\.cache_bytes to \d+") as error:
            refuse_small_cache(data, {data.path: local.manifest})
        found = int(str(error.value).partition("data.cache_bytes to ")[2].partition(" ")[0])
        blocks = -(-local.manifest.train.tokens // (of_rows // 2))
        assert found == min(2 * data.shuffle_lanes, blocks) * (of_rows + 4 * UNIT_BYTES + more)
        assert ("data.shuffle_block_bytes lower" in str(error.value)) == (packing == "stream")


@pytest.mark.parametrize("chosen", [1, 2**10, 2**14])
def test_packed_blocks_are_read_from_little_more_than_they_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: int
):
    """However small somebody would have them."""
    for module in (access, packer):
        monkeypatch.setattr(module, "window_tokens", lambda seq_len: 8 * seq_len)
    monkeypatch.setattr(packed_index, "scratch_folder", lambda: tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{i * i} and {i**3}"}}\n' for i in range(2000)))
    folder = tmp_path / "store"
    build_store(folder, source=str(tmp_path / "text.jsonl"), vocab_size=300, unit_bytes=UNIT_BYTES)
    store = open_streamed(folder, RangeCache(tmp_path / "cache", max_bytes=2**20))
    data = DataSection(path=str(folder), seq_len=32, packing="documents", shuffle="blocks", shuffle_block_bytes=chosen)
    row_bytes = 32 * store.manifest.numpy_dtype.itemsize
    rows = StreamedRows(
        open_rows(store, data), store, block_rows=access.block_rows(data, store.manifest), row_bytes=row_bytes
    )
    whole = len(rows) // rows.block_rows
    assert whole >= 3
    fetched = sum(rows.num_bytes(block) for block in range(whole))
    assert fetched <= 1.2 * whole * rows.block_rows * row_bytes


def test_each_block_is_fetched_once_an_epoch_and_little_more_than_is_used(
    local: DocumentStore, stream: Callable[..., Streaming]
):
    streamed = stream()
    steps = range(1, len(streamed.rows) // 12 + 1)
    for step in steps:
        streamed.batch(step)
    streamed.close()
    blocks = -(-len(streamed.rows) // BLOCK_ROWS)
    traffic, files = streamed.store.traffic, local.manifest.train_shards
    # A block of 257 bytes takes two units more at most, and as many requests as it has shards.
    assert traffic.fetched_bytes <= sum(file.size_bytes for file in files) + blocks * 3 * UNIT_BYTES * 2
    assert traffic.requests <= blocks + 3 * len(files)


def test_ranks_of_a_node_fetch_each_block_once(stream: Callable[..., Streaming], monkeypatch: pytest.MonkeyPatch):
    requests: list[tuple[str, int, int]] = []
    read_into = Store.read_into

    def recording(self: Store, key: str, start: int, *buffers: memoryview) -> None:
        requests.append((key, start, len(buffers[0])))
        read_into(self, key, start, *buffers)

    monkeypatch.setattr(Store, "read_into", recording)
    ranks = [stream(data_rank=rank, data_size=2) for rank in range(2)]
    steps = range(1, len(ranks[0].rows) // 12 + 1)
    for step in steps:
        for rank in ranks:
            rank.batch(step)
    for rank in ranks:
        rank.close()
    of_tokens = [request for request in requests if request[0].endswith(".bin")]
    assert len(of_tokens) == len(set(of_tokens)) >= len(ranks[0].rows) // BLOCK_ROWS
    assert ranks[0].rows.used_bytes == ranks[1].rows.used_bytes == len(steps) * 6 * SEQ_LEN * 2


def test_a_jump_lets_go_of_what_was_held(stream: Callable[..., Streaming], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ahead, "STEPS_AT_ONCE", 1)
    streamed = stream()
    for step in (20, 3, 7):
        streamed.batch(step)
    in_use = {row // BLOCK_ROWS for row in streamed.loader.samples(7).rows.tolist()}
    assert len(streamed.store.train_stream()._windows) == len(in_use)
    streamed.close()


def test_what_is_held_is_found_however_many_windows_overlap_it(local: DocumentStore, stream: Callable[..., Streaming]):
    streamed = stream()
    tokens, traffic = streamed.store.train_stream(), streamed.store.traffic
    spans = [(0, 400), *((begin, begin + 20) for begin in range(1, 12)), (0, 400)]
    for begin, end in spans:
        tokens.hold(begin, end)
    expected, requests = local.train_stream().read(0, 400), traffic.requests
    assert (tokens.read(50, 300) == expected[50:350]).all()
    assert (tokens.gather(np.array([3, 90]), 200) == np.stack((expected[3:203], expected[90:290]))).all()
    # One of two that are the same.
    tokens.let_go(0, 400)
    assert (tokens.read(50, 300) == expected[50:350]).all()
    assert traffic.requests == requests, "it was fetched again"
    tokens.let_go(0, 400)
    assert (tokens.read(50, 300) == expected[50:350]).all() and traffic.requests > requests
    streamed.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(1, 200), min_size=1, max_size=8), ahead_bytes=st.sampled_from([1, 2000, 2**20]))
def test_any_step_can_come_next_and_any_budget_will_do(
    local: DocumentStore, stream: Callable[..., Streaming], steps: list[int], ahead_bytes: int
):
    streamed, copied = stream(ahead_bytes=ahead_bytes), block_loader(StreamRows(local, SEQ_LEN))
    for step in steps:
        assert torch.equal(streamed.batch(step).tokens_BT, copied.batch(step).tokens_BT)
    streamed.close()


def test_the_cache_keeps_its_bound_while_blocks_come_and_go(stream: Callable[..., Streaming], tmp_path: Path):
    # Blocks of at most 6 units and shard ends of another 2; four in use, and four that come.
    bound = 2 * LANES * 8 * UNIT_BYTES
    streamed = stream(max_bytes=bound, ahead_bytes=bound)
    done, most = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], bytes_in_cache(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(1, 2 * len(streamed.rows) // 12):
        streamed.batch(step)
    done.set()
    watcher.join()
    streamed.close()
    assert bound // 2 < most[0] <= bound


def test_threads_fetch_all_blocks_in_the_order_in_which_they_are_needed(
    stream: Callable[..., Streaming], monkeypatch: pytest.MonkeyPatch
):
    threads: set[str] = set()
    read_into = Store.read_into

    def recording(self: Store, key: str, start: int, *buffers: memoryview) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        read_into(self, key, start, *buffers)

    monkeypatch.setattr(Store, "read_into", recording)
    order: list[int] = []
    fetch = StreamedRows.fetch
    monkeypatch.setattr(StreamedRows, "fetch", lambda self, block: (order.append(block), fetch(self, block)))
    monkeypatch.setattr(ahead, "FETCHERS", 1)
    streamed = stream()
    read_all(streamed)
    assert threads == {"data-fetch"}
    needed = [row // BLOCK_ROWS for step in range(1, 20) for row in streamed.loader.samples(step).rows.tolist()]
    assert order[:20] == list(dict.fromkeys(needed))[:20]


def test_held_out_documents_are_read_without_a_copy_too(local: DocumentStore, stream: Callable[..., Streaming]):
    from raynium.data.evaluation import evaluation_set

    fields = {"seq_len": SEQ_LEN, "batch_size": 4, "data_rank": 0, "data_size": 1}
    ours, theirs = (evaluation_set(store, **fields) for store in (stream().store, local))
    assert ours.num_tokens == theirs.num_tokens and len(ours.batches) == len(theirs.batches)
    for mine, other in zip(ours.batches, theirs.batches, strict=True):
        assert torch.equal(mine.tokens_BT, other.tokens_BT) and torch.equal(mine.labels_BT, other.labels_BT)
    assert np.array_equal(stream().store.train_token_counts(), local.train_token_counts())
    assert stream().store.tokenizer().sha256s == local.tokenizer().sha256s


def test_a_long_read_is_several_requests_at_once(
    local: DocumentStore, stream: Callable[..., Streaming], monkeypatch: pytest.MonkeyPatch
):
    """An index of packed rows is made by one such after another."""
    tokens = stream().store.train_stream()
    # The checksums of all shards, so that what comes are tokens only.
    tokens.fetch(0, len(tokens))
    monkeypatch.setattr(streamed_tokens, "PIECE_BYTES", 256)
    read_into = Store.read_into
    # Breaks unless four come before one is answered.
    together, left = threading.Barrier(4), itertools.count()

    def waiting(self: Store, key: str, start: int, *buffers: memoryview) -> None:
        if next(left) < 4:
            together.wait(30)
        read_into(self, key, start, *buffers)

    monkeypatch.setattr(Store, "read_into", waiting)
    assert (tokens.read(5, 4000) == local.train_stream().read(5, 4000)).all()
    assert next(left) > 4


def damage(url: str, name: str, at: int) -> None:
    content = bytearray(Store(url).read(name))
    content[at] ^= 1
    Store(url).replace(name, bytes(content))


def read_all(streamed: Streaming) -> None:
    try:
        for step in range(1, len(streamed.rows) // 12 + 1):
            streamed.batch(step)
    finally:
        streamed.close()
        assert not threads_of_fetching()


def test_damage_reaches_the_caller_with_store_shard_and_range(url: str, stream: Callable[..., Streaming]):
    damage(url, "train-00003.bin", 200)
    with pytest.raises(DataError, match=rf"{url}/train-00003\.bin is damaged in unit 3, bytes 192 to 256 .*`raynium"):
        read_all(stream())


def test_damaged_checksums_are_told_from_damaged_tokens(url: str, stream: Callable[..., Streaming]):
    damage(url, "train-00002.crc", 5)
    with pytest.raises(DataError, match=rf"{url}/train-00002\.crc is damaged"):
        read_all(stream())


def test_a_file_that_is_gone_is_damage(url: str, stream: Callable[..., Streaming]):
    Store(url).delete("train-00001.bin")
    with pytest.raises(DataError, match=r"bytes [\d,]+ to [\d,]+ of .*/train-00001\.bin: there is no such file"):
        read_all(stream())


def test_storage_that_fails_is_no_damage_and_may_be_tried_again(
    url: str, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    # fsspec keeps one for all of a process, with the endpoint of before.
    s3fs.S3FileSystem.clear_instance_cache()
    request.addfinalizer(s3fs.S3FileSystem.clear_instance_cache)
    with FlakyS3(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        streamed = Streaming(open_streamed(url, RangeCache(tmp_path / "cache", max_bytes=2**20)))
        proxy.set(refuse(403, "AccessDenied", of=["GetObject"]))
        with pytest.raises(StoreError, match=rf"{url}/train-\d+\.\w+ cannot be read: .*"):
            read_all(streamed)


def test_a_store_that_is_not_there_or_another_one_is_refused(url: str, tmp_path: Path):
    cache = RangeCache(tmp_path, max_bytes=2**20)
    with pytest.raises(DataError, match="is no document store"):
        open_streamed(f"{url}-none", cache)
    with pytest.raises(DataError, match=r"holds other data .* than data.identity = '0{64}'"):
        open_streamed(url, cache, identity="0" * 64)
