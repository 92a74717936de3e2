"""A store whose connection fails: what is written is whole or absent, what is read is right or an error."""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import trustme
from checkpoints import halves, random_tensor, same_bits, save, stage
from tiny import job_text

from raynium.chaos.flaky_s3 import FlakyS3, cut, delay, hold, refuse, slow, swallow
from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.checkpoint.verify import verify_checkpoint
from raynium.config.load import parse_config
from raynium.errors import StoreError
from raynium.run.coordinator import RunCoordinator
from raynium.run.protocol import AgentInfo, Order, ShardSaved
from raynium.storage.backend import KeyExists, KeyMissing
from raynium.storage.checksum import checksum, to_text
from raynium.storage.file_store import FileBackend
from raynium.storage.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.s3]

PART = 5 * 2**20  # the smallest part S3 takes
LARGE = 3 * PART + 4097


@pytest.fixture
def proxy(s3_server) -> Iterator[FlakyS3]:
    with FlakyS3(s3_server.endpoint, seed=1) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3_server) -> str:
    return s3_server.create_bucket(f"b-{uuid4().hex[:12]}")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.storage.s3_errors._PAUSE_SECONDS", 0.001)


@pytest.fixture
def store(s3_server, bucket: str, proxy: FlakyS3, short_pauses: None, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Behind the proxy, with small parts."""
    monkeypatch.setattr("raynium.storage.s3_store.PART_BYTES", PART)
    return Store(f"{bucket}/run", options=s3_server.options | {"endpoint_url": proxy.endpoint})


@pytest.fixture
def direct(s3_server, bucket: str) -> Store:
    """The same store, past the proxy."""
    return Store(f"{bucket}/run", options=s3_server.options)


@pytest.fixture
def image(tmp_path: Path) -> Callable[[int], Path]:
    def make(size: int) -> Path:
        path = tmp_path / "image"
        path.write_bytes(os.urandom(size))
        return path

    return make


def open_uploads(store: Store) -> list[str]:
    backend = store._backend
    found = backend._open_uploads("")  # pyright: ignore[reportAttributeAccessIssue]
    return [upload.target["Key"] for upload in found]


def assert_whole(store: Store, key: str, path: Path) -> None:
    data = path.read_bytes()
    assert store.stored_checksum(key) == (len(data), to_text(checksum(data)))
    assert store.read(key) == data
    assert not open_uploads(store)


# ---- what passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([cut(0, 4 * 2**20, times=8)], id="cut"),
        pytest.param([refuse(503, "SlowDown", times=6)], id="slow-down"),
        pytest.param([refuse(500, "InternalError", times=6)], id="internal-error"),
        pytest.param([swallow(times=2)], id="first-answers-lost"),
        pytest.param([swallow(of=["PutObject", "CompleteMultipartUpload"])], id="last-answer-lost"),
        pytest.param([swallow(of=["UploadPart"], times=3)], id="part-answers-lost"),
        pytest.param([delay(0.3)], id="delay"),
    ],
)
def test_an_upload_outlasts(store: Store, direct: Store, proxy: FlakyS3, image, faults, size: int) -> None:
    path = image(size)
    proxy.set(*faults)
    sent = store.upload_file("shard", path)
    proxy.set()
    assert sent.crc == checksum(path.read_bytes())
    assert_whole(direct, "shard", path)


def test_many_parts_at_once_outlast_what_one_does(store: Store, proxy: FlakyS3, image) -> None:
    """botocore's own attempts would be used up by all requests of a process together."""
    path = image(8 * PART)
    proxy.set(refuse(503, "SlowDown", of=["UploadPart"], times=130))
    with ThreadPoolExecutor(4) as pool:
        for sent in pool.map(lambda number: store.upload_file(f"shard-{number}", path), range(4)):
            assert sent.size == 8 * PART
    assert proxy.over()


@pytest.mark.parametrize("size", [1000, LARGE])  # silent before the server's go-ahead; silent in the middle
def test_a_body_that_the_server_does_not_take_is_sent_again(
    s3_server, bucket: str, direct: Store, proxy: FlakyS3, short_pauses: None, monkeypatch, image, size: int
) -> None:
    monkeypatch.setattr("raynium.storage.s3_store._SILENCE_SECONDS", 1)
    store = Store(f"{bucket}/run", options=s3_server.options | {"endpoint_url": proxy.endpoint})
    path = image(size)
    proxy.set(hold(of=["PutObject"], after_bytes=size // 2))
    store.upload_file("shard", path)
    assert proxy.over()
    assert_whole(direct, "shard", path)


def test_a_server_that_never_takes_a_body_is_left(
    s3_server, bucket: str, proxy: FlakyS3, short_pauses: None, monkeypatch
) -> None:
    monkeypatch.setattr("raynium.storage.s3_store._SILENCE_SECONDS", 0.2)
    store = Store(f"{bucket}/run", options=s3_server.options | {"endpoint_url": proxy.endpoint})
    proxy.set(delay(30))
    with pytest.raises(StoreError, match=r"nothing moved for 0\.2 s; the server has gone silent"):
        store.write_new("object", b"123")


def test_a_slow_upload_is_not_a_silent_one(
    s3_server, bucket: str, direct: Store, proxy: FlakyS3, short_pauses: None, monkeypatch, image
) -> None:
    monkeypatch.setattr("raynium.storage.s3_store._SILENCE_SECONDS", 3)  # the kernel's buffers hold one of data
    store = Store(f"{bucket}/run", options=s3_server.options | {"endpoint_url": proxy.endpoint})
    path = image(40 * 2**20)
    proxy.set(slow(8 * 2**20))
    store.upload_file("shard", path)
    assert proxy.seen.count("PutObject") == 1
    assert_whole(direct, "shard", path)


def test_records_whose_answers_are_lost_are_written_once(store: Store, direct: Store, proxy: FlakyS3) -> None:
    proxy.set(swallow(of=["PutObject"]))
    store.write_new("manifest", b"ours")
    assert proxy.seen == ["PutObject", "PutObject", "HeadObject"] and direct.read("manifest") == b"ours"
    proxy.set(swallow(of=["PutObject"]))
    with pytest.raises(KeyExists, match="another writer was first"):
        store.write_new("manifest", b"ours")  # the same bytes, but another call
    with pytest.raises(KeyExists, match="another writer was first"):
        Store(direct.url, options=direct._options).write_new("manifest", b"theirs")


def test_a_write_of_which_nobody_can_tell_whose_it_is_is_not_taken_for_anothers(
    store: Store, direct: Store, proxy: FlakyS3
) -> None:
    proxy.set(swallow(of=["PutObject"]), refuse(403, "AccessDenied", of=["HeadObject"]))
    with pytest.raises(StoreError, match="who wrote it could not be asked: try again") as raised:
        store.write_new("manifest", b"ours")
    assert not isinstance(raised.value, KeyExists) and direct.read("manifest") == b"ours"


@pytest.mark.parametrize("chunk", [0, 1])
def test_reads_outlast_and_are_right(store: Store, direct: Store, proxy: FlakyS3, chunk: int) -> None:
    data = os.urandom(LARGE)
    direct.write_new("object", data)
    for faults in ([cut(100_000, 4 * 2**20, times=5)], [refuse(503, "SlowDown", times=3), cut(0, 2**20, times=3)]):
        proxy.set(*faults)
        first, second = bytearray(1_000_001), bytearray(LARGE - 1_000_001 - chunk)
        store.read_into("object", chunk, memoryview(first), memoryview(second))
        assert bytes(first + second) == data[chunk:]
        proxy.set(*faults)
        assert store.read("object") == data


def test_a_broken_read_goes_on_from_the_byte_received(store: Store, direct: Store, proxy: FlakyS3) -> None:
    data = os.urandom(8 * 2**20)
    direct.write_new("object", data)
    ranges = watch_ranges(store)
    proxy.set(cut(3 * 2**20, 3 * 2**20))  # every connection
    assert store.read_range("object", 0, len(data)) == data
    assert len(ranges) == 3 and ranges[1] > 2 * 2**20 and ranges[2] > 5 * 2**20


def test_a_resumed_read_never_mixes_two_versions(store: Store, direct: Store, proxy: FlakyS3) -> None:
    direct.write_new("record", b"1" * 2**20)

    def replace_meanwhile(_: int) -> None:
        direct.replace("record", b"2" * 2**20)

    watch_ranges(store, then=replace_meanwhile)
    proxy.set(cut(500_000, 500_000, of=["GetObject"], times=1))
    with pytest.raises(StoreError, match="run/record was replaced while it was read; read it again"):
        store.read_range("record", 0, 2**20)


def watch_ranges(store: Store, then: Callable[[int], None] = lambda start: None) -> list[int]:
    """First bytes of the ranges asked for, filled as they are; `then` runs after each answer has begun."""
    backend = store._backend
    request, starts = backend._request, []  # pyright: ignore[reportAttributeAccessIssue]

    async def watched(method: str, key: str | None = None, **fields):
        answer = await request(method, key, **fields)
        if "Range" in fields:
            starts.append(int(fields["Range"].removeprefix("bytes=").partition("-")[0]))
            await asyncio.to_thread(then, starts[-1])
        return answer

    backend._request = watched  # pyright: ignore[reportAttributeAccessIssue]
    return starts


# ---- over TLS, as AWS speaks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_proxy(s3_server, authority: trustme.CA) -> Iterator[FlakyS3]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FlakyS3(s3_server.endpoint, seed=1, tls=context) as proxy:
        yield proxy


@pytest.fixture
def tls_store(store: Store, tls_proxy: FlakyS3, authority: trustme.CA, tmp_path: Path, monkeypatch) -> Store:
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    assert tls_proxy.endpoint.startswith("https://") and store._options is not None
    return Store(store.url, options={**store._options, "endpoint_url": tls_proxy.endpoint})


def test_a_checkpoint_goes_there_and_back_over_tls(tls_store: Store, tls_proxy: FlakyS3, direct: Store) -> None:
    tensor = random_tensor("float32", (3 * PART // 2048, 512))  # each half takes two parts
    save(tls_store, halves("model/w", tensor), unit_bytes=256 * 1024)
    assert tls_proxy.seen.count("UploadPart") == 4
    ref = open_checkpoint(tls_store, 7)
    assert verify_checkpoint(ref, depth="contents") == [] and not open_uploads(direct)
    assert same_bits(read_tensors(ref)["model/w"], tensor)
    assert same_bits(read_tensors(open_checkpoint(direct, 7))["model/w"], tensor)


def test_transfers_over_tls_outlast_broken_connections(
    tls_store: Store, tls_proxy: FlakyS3, direct: Store, image
) -> None:
    path = image(LARGE)
    tls_proxy.set(cut(0, 4 * 2**20, times=8))
    tls_store.upload_file("shard", path)
    assert_whole(direct, "shard", path)
    ranges = watch_ranges(tls_store)
    tls_proxy.set(cut(6 * 2**20, 6 * 2**20))  # every connection
    assert tls_store.read_range("shard", 1, LARGE - 1) == path.read_bytes()[1:]
    assert len(ranges) == 3 and ranges[1] > 5 * 2**20 and ranges[2] > 10 * 2**20


def test_a_certificate_that_nobody_vouches_for_is_refused(
    tls_store: Store, tls_proxy: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE")
    stranger = Store(f"{tls_store.url}/stranger", options=tls_store._options)
    with pytest.raises(StoreError, match=r"certificate verify failed.*AWS_CA_BUNDLE"):
        stranger.write_new("record", b"1")
    assert not tls_proxy.seen


# ---- what does not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (cut(0, 100), "check the network"),
        (refuse(503, "SlowDown"), "S3 asks for fewer requests: try again later"),
        (refuse(500, "InternalError"), "the server failed each time: try again later"),
        (refuse(403, "ExpiredToken"), "the credentials have expired: renew them"),
        (refuse(403, "AccessDenied"), "allow s3:PutObject"),
    ],
)
def test_an_upload_that_cannot_end_says_why(
    store: Store, direct: Store, proxy: FlakyS3, image, fault, says: str, size: int
) -> None:
    path = image(size)
    proxy.set(fault)
    with pytest.raises(StoreError, match=f"run/shard: .*{says}"):
        store.upload_file("shard", path)
    assert not direct.exists("shard") and not open_uploads(direct)
    proxy.set()
    store.upload_file("shard", path)
    assert_whole(direct, "shard", path)


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda of: cut(0, 100, of=of), "check the network"),
        (lambda of: refuse(403, "ExpiredToken", of=of), "renew them"),
    ],
)
def test_an_upload_that_breaks_off_is_aborted(
    store: Store, direct: Store, proxy: FlakyS3, image, fault, says: str, operation: str
) -> None:
    path = image(LARGE)
    proxy.set(fault([operation]))
    with pytest.raises(StoreError, match=says):
        store.upload_file("shard", path)
    assert proxy.seen[-1] == "AbortMultipartUpload"
    assert not direct.exists("shard") and not open_uploads(direct)
    store.write_new("other", b"")  # this store works on
    proxy.set()
    store.upload_file("shard", path)
    assert_whole(direct, "shard", path)


def test_an_upload_that_cannot_be_aborted_is_told_and_collected(
    store: Store, direct: Store, proxy: FlakyS3, image, caplog: pytest.LogCaptureFixture
) -> None:
    """As when credentials expire halfway."""
    proxy.set(refuse(403, "ExpiredToken", of=["UploadPart", "AbortMultipartUpload"]))
    with pytest.raises(StoreError, match="renew them"):
        store.upload_file("shard", image(LARGE))
    [message] = [record.message for record in caplog.records if "cannot be aborted" in record.message]
    assert "Store.discard_unfinished" in message and "run/shard" in message
    assert open_uploads(direct) == ["run/shard"]
    assert direct.discard_unfinished(older_than_unix=time.time() - 3600) == 0
    assert direct.discard_unfinished("other", older_than_unix=time.time() + 60) == 0
    assert direct.discard_unfinished(older_than_unix=time.time() + 60) == 1 and not open_uploads(direct)
    assert direct.discard_unfinished(older_than_unix=time.time() + 60) == 0


def test_an_upload_that_could_not_be_aborted_is_when_the_store_takes_the_next(
    store: Store, direct: Store, proxy: FlakyS3, image, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.set(refuse(403, "ExpiredToken", of=["UploadPart", "AbortMultipartUpload"]))
    path = image(LARGE)
    for name in ("first", "second"):
        with pytest.raises(StoreError, match="renew them"):
            store.upload_file(name, path)
    proxy.set(refuse(403, "AccessDenied", of=["AbortMultipartUpload"], times=1))
    store.upload_file("third", path)
    assert len(open_uploads(direct)) == 1, "one still cannot be aborted, which fails nothing"
    store.upload_file("fourth", path)
    assert not open_uploads(direct)
    assert len([record for record in caplog.records if "cannot be aborted" in record.message]) == 3
    proxy.seen.clear()
    store.upload_file("fifth", path)
    assert "AbortMultipartUpload" not in proxy.seen


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (cut(0, 500), "the connection broke|check the network"),
        (refuse(503, "SlowDown"), "S3 asks for fewer requests"),
        (refuse(403, "AccessDenied"), "allow s3:GetObject"),
    ],
)
def test_a_read_that_cannot_end_says_why(store: Store, direct: Store, proxy: FlakyS3, fault, says: str) -> None:
    direct.write_new("object", os.urandom(LARGE))
    proxy.set(fault)
    reads: list[Callable[[], object]] = [
        lambda: store.read("object"),
        lambda: store.read_range("object", 5, 2**20),
    ]
    for read in reads:
        with pytest.raises(StoreError, match=f"run/object: .*({says})"):
            read()


def test_a_server_that_goes_silent_is_left(
    s3_server, bucket: str, proxy: FlakyS3, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raynium.storage.s3_store._SILENCE_SECONDS", 0.3)
    store = Store(f"{bucket}/silent", options=s3_server.options | {"endpoint_url": proxy.endpoint})
    store.write_new("object", b"123")
    proxy.set(delay(30))
    with pytest.raises(StoreError, match="the server has gone silent"):
        store.read("object")
    proxy.set()
    assert store.read("object") == b"123"


@pytest.mark.parametrize("size", [2**20, 8 * 2**20])  # through aiohttp; past it
def test_a_read_that_goes_silent_goes_on(
    store: Store, direct: Store, proxy: FlakyS3, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("raynium.storage.s3_store._SILENCE_SECONDS", 0.3)
    store = Store(store.url, options=store._options)
    data = os.urandom(size)
    direct.write_new("object", data)
    ranges = watch_ranges(store)
    proxy.set(hold(of=["GetObject"], after_bytes=size // 2))
    assert store.read_range("object", 0, size) == data
    assert len(ranges) == 2 and ranges[1] > 0


# ---- before training starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "permission"),
    [
        ("ListObjectsV2", "s3:ListBucket"),
        ("CreateMultipartUpload", "s3:PutObject"),
        ("AbortMultipartUpload", "s3:AbortMultipartUpload"),
        ("ListMultipartUploads", "s3:ListBucketMultipartUploads"),
        ("PutObject", "s3:PutObject"),
        ("GetObject", "s3:GetObject"),
        ("DeleteObject", "s3:DeleteObject"),
    ],
)
def test_a_missing_permission_is_named_by_the_probe(
    store: Store, proxy: FlakyS3, operation: str, permission: str
) -> None:
    proxy.set(refuse(403, "AccessDenied", of=[operation]))
    with pytest.raises(StoreError, match=f"allow {permission} on it to this role"):
        store.check_writable()


def test_the_probe_leaves_no_open_upload(store: Store, direct: Store) -> None:
    store.check_writable()
    assert not open_uploads(direct) and not direct.list().sizes


# ---- kill -9 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "left_open"),
    [
        (hold(of=["UploadPart"], after_bytes=2**20), 1),
        (hold(of=["CompleteMultipartUpload"]), 1),
        (hold(of=["AbortMultipartUpload"]), 0),  # never reached: the upload ends
    ],
    ids=["mid-part", "before-complete", "done"],
)
def test_a_killed_upload_is_invisible_and_collected(
    s3_server, bucket: str, direct: Store, proxy: FlakyS3, image, phase, left_open: int
) -> None:
    path = image(LARGE)
    code = (
        f"import raynium.storage.s3_store as s3_store; s3_store.PART_BYTES = {PART}\n"
        "from raynium.storage.store import Store\n"
        f"Store({bucket + '/run'!r}).upload_file('shard', {str(path)!r})\n"
    )
    proxy.set(phase)
    env = os.environ | s3_server.env | {"AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    if left_open:
        assert proxy.held.wait(60)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not direct.exists("shard") and not direct.list().sizes
    else:
        assert process.wait(60) == 0
    assert direct.discard_unfinished(older_than_unix=time.time() + 60) == left_open
    assert not open_uploads(direct)
    proxy.set()
    if left_open:
        direct.upload_file("shard", path)
    assert_whole(direct, "shard", path)


def test_more_than_a_page_of_unfinished_uploads_is_collected(s3_server, direct: Store) -> None:
    backend = direct._backend
    for index in range(1005):
        backend._run(backend._request("create_multipart_upload", f"many/shard-{index:04d}"))  # pyright: ignore[reportAttributeAccessIssue]
    assert len(open_uploads(direct)) == 1005
    assert direct.discard_unfinished("many/shard-0007", older_than_unix=time.time() + 60) == 1, "of this key only"
    assert direct.discard_unfinished("many/shard-000", older_than_unix=time.time() + 60) == 0, "no key, no folder"
    assert direct.discard_unfinished("many", older_than_unix=time.time() + 60) == 1004 and not open_uploads(direct)


# ---- a limit for whoever cannot wait ---------------------------------------------------------------------------------


def test_a_store_with_a_limit_does_not_wait_for_one_that_is_silent_and_nothing_happens_later(
    s3_server, bucket: str, proxy: FlakyS3, direct: Store
) -> None:
    options = s3_server.options | {"endpoint_url": proxy.endpoint}
    store = Store(f"{bucket}/run", options=options, limit_seconds=2.0).child("part")
    store.write_new("before", b"1")
    calls: list[Callable[[], object]] = [
        lambda: store.read("before"),
        lambda: store.list(),
        lambda: store.replace("later", b"2"),
        lambda: store.delete("before"),
    ]
    for call in calls:
        proxy.set(delay(20.0))
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"no answer within 2 s; the server has gone silent"):
            call()
        assert time.monotonic() - began < 10
    proxy.set()
    assert store.read("before") == b"1" and direct.list("part").sizes == {"part/before": 1}


def test_a_file_system_that_never_answers_has_the_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, limit_seconds=0.2)
    store.write_new("key", b"1")
    assert store.read("key") == b"1"
    with pytest.raises(KeyMissing):
        store.read("other")
    answers = threading.Event()
    monkeypatch.setattr(FileBackend, "head", lambda self, key: answers.wait(30))
    with pytest.raises(StoreError, match=r"no answer within 0.2 s; look whether its file system answers"):
        store.size("key")
    answers.set()


def test_a_silent_store_holds_neither_a_generation_s_start_nor_a_commit_for_ever(
    s3_server, bucket: str, proxy: FlakyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The coordinator itself, behind the proxy: it tries a start again, and tells that a commit failed."""
    for name, value in (s3_server.env | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
        monkeypatch.setenv(name, value)
    config = parse_config(job_text({"cluster.ranks_per_node": 1, "fault.upload_silence_seconds": 1.0}))
    alone = AgentInfo("a", 0, 1, "127.0.0.2", 29500, pid=os.getpid())

    async def play() -> None:
        run = RunCoordinator(config.model_dump(mode="json"), f"{bucket}/run", 0, 1)
        proxy.set(delay(60.0))
        joining = asyncio.create_task(run.join(alone))
        while not any("trying again" in each.text for each in (await run.status(0)).events):
            await asyncio.sleep(0.05)
        proxy.set()
        order = await asyncio.wait_for(joining, 30)
        assert isinstance(order, Order) and order.resume_step is None

        info = stage(tmp_path, 0, [Chunk.whole("w", torch.ones(4), saved_here=True)], 5)
        entry = upload_shard(Store(f"{bucket}/run"), info, generation=order.generation_id, rank=0)
        proxy.set(delay(60.0))
        began = time.monotonic()
        await run.tell(ShardSaved(5, 0, entry.to_json(), 1.0, None, order.world))
        assert time.monotonic() - began < 20
        assert any(
            "checkpoint of step 5 is not saved; training goes on" in each.text and "no answer within 1 s" in each.text
            for each in (await run.status(0)).events
        )
        proxy.set()

    asyncio.run(play())
