"""The store's promises, the same on a file system and on a real S3 server."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3fs import S3FileSystem

from raynium.errors import StoreError
from raynium.storage.backend import Head, KeyExists, KeyMissing
from raynium.storage.checksum import checksum, to_text
from raynium.storage.store import Store

PART = 5 * 2**20  # the smallest part S3 takes
UNIT = 2**20


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads of more than 5 MiB have several parts."""
    monkeypatch.setattr("raynium.storage.s3_store.PART_BYTES", PART)


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "file":
        return Store(tmp_path / "run")
    server = request.getfixturevalue("s3_server")
    return Store(server.create_bucket(f"b-{uuid4().hex[:12]}") + "/runs/first", options=server.options)


def in_parallel(count: int, work: Callable[[int], object]) -> list[BaseException]:
    """Run `work(i)` on `count` threads that start together; the exceptions, by whichever came first."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def attempt(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


# ---- the verbs ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_listed_and_deleted(store: Store) -> None:
    store.write_new("a/b/one.json", b"first")
    store.replace("a/two", b"")
    store.replace("a/two", b"22")
    store.write_new("top", bytes(range(256)))
    assert store.read("a/b/one.json") == b"first" and store.read("a/two") == b"22"
    assert store.read_range("top", 10, 5) == bytes(range(10, 15)) and store.read_range("top", 3, 0) == b""
    assert store.size("top") == 256 and store.exists("a/two") and not store.exists("a/b")

    assert dict(store.list().sizes) == {"a/b/one.json": 5, "a/two": 2, "top": 256}
    one_level = store.list("a", recursive=False)
    assert dict(one_level.sizes) == {"a/two": 2} and one_level.folders == ("a/b",)
    assert store.list(recursive=False).folders == ("a",) and not store.list("nothing").sizes
    assert dict(store.child("a").list("b").sizes) == {"b/one.json": 5}

    store.delete("a/two")
    store.delete("a/two")
    assert store.delete_prefix("a") == 1 and store.delete_prefix("a") == 0
    assert dict(store.list().sizes) == {"top": 256}


def test_a_listing_tells_when_keys_were_written(store: Store) -> None:
    before = time.time()
    store.write_new("a/b", b"1")
    [(key, written)] = store.list().modified_unix.items()
    assert key == "a/b" and before - 1.1 <= written <= time.time() + 1.1  # S3 gives whole seconds


def test_a_key_has_another_version_once_it_is_replaced_by_as_many_bytes(store: Store) -> None:
    store.replace("a/b", b"1")
    before = store.list().versions["a/b"]
    # A file system's clock may stand for some milliseconds.
    time.sleep(0.05)
    store.replace("a/b", b"2")
    after = store.list().versions["a/b"]
    assert after != before and store._backend.head("a/b") == (1, store.stored_checksum("a/b")[1], after)


def test_deleting_twice_at_once_does_not_fail(store: Store) -> None:
    for index in range(40):
        store.write_new(f"steps/step-{index % 4}/deep/{index}", b"1")
    assert not in_parallel(4, lambda _: store.delete_prefix("steps"))
    assert not store.list().sizes


def test_a_folder_is_not_a_prefix_of_names(store: Store) -> None:
    store.write_new("step-1/x", b"1")
    store.write_new("step-10/x", b"2")
    assert list(store.list("step-1").sizes) == ["step-1/x"]
    store.delete_prefix("step-1")
    assert list(store.list().sizes) == ["step-10/x"]


def test_missing_keys_and_short_objects_are_told_apart(store: Store) -> None:
    reads: list[Callable[[], object]] = [
        lambda: store.read("no"),
        lambda: store.size("no"),
        lambda: store.read_range("no", 0, 1),
        lambda: store.stored_checksum("no"),
    ]
    for read in reads:
        with pytest.raises(KeyMissing, match="/no does not exist"):
            read()
    store.write_new("short", b"12345")
    with pytest.raises(StoreError, match="short ends"):
        store.read_range("short", 3, 5)
    with pytest.raises(StoreError, match="short ends"):
        store.read_range("short", 9, 5)
    with pytest.raises(StoreError, match="5 bytes, more than the 4"):
        store.read("short", max_bytes=4)


def test_of_many_writers_of_one_key_exactly_one_wins(store: Store) -> None:
    errors = in_parallel(8, lambda index: store.write_new("manifest", b"%d" % index * 100))
    assert [type(error) for error in errors] == [KeyExists] * 7
    assert store.read("manifest") in [b"%d" % index * 100 for index in range(8)]


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART + 4097])
def test_a_file_arrives_whole_with_its_checksums(store: Store, tmp_path: Path, small_parts: None, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "image").write_bytes(data)
    sent = store.upload_file("shard", tmp_path / "image", unit_bytes=UNIT)
    assert store.read("shard") == data
    assert sent.size == size and sent.crc == checksum(data)
    assert list(sent.unit_crcs) == [checksum(data[start : start + UNIT]) for start in range(0, size, UNIT)]
    kept = to_text(checksum(data)) if store.url.startswith("s3://") else None
    assert store.stored_checksum("shard") == (size, kept)


def test_an_upload_never_replaces(store: Store, tmp_path: Path, small_parts: None) -> None:
    for name, size in (("small", 10), ("large", 2 * PART)):
        (tmp_path / "image").write_bytes(b"1" * size)
        store.upload_file(name, tmp_path / "image", unit_bytes=UNIT)
        (tmp_path / "image").write_bytes(b"2" * size)
        with pytest.raises(KeyExists, match="another writer was first"):
            store.upload_file(name, tmp_path / "image", unit_bytes=UNIT)
        assert store.read_range(name, 0, 1) == b"1"


def test_a_missing_file_to_upload_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot upload .*gone"):
        store.upload_file("shard", tmp_path / "gone")


def test_the_probe_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert not store.list().sizes


# ---- addresses and keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "a/../b", ".hidden", "a b", "a\\b", "a\n", "é", "x" * 701]
)
def test_keys_outside_the_store_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match="not a valid key"):
        Store(tmp_path).write_new(key, b"")
    assert not list(tmp_path.iterdir())


def test_paths_and_file_urls_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Store("runs/first").write_new("a", b"1")
    for address in (f"file://{tmp_path}/runs/first", f"{tmp_path}/runs/first/", tmp_path / "runs/first"):
        assert Store(address).read("a") == b"1"
        assert Store(address).uri("a") == f"file://{tmp_path}/runs/first/a"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("gs://bucket/x", "use a path, file:// or s3://"),
        ("s3:///x", "names no bucket"),
        ("file://host/x", "three slashes"),
        ("file:///", "three slashes"),
        ("s3://b/a/../c", "holds '..'"),
        ("s3://b/runs//first", "holds '//'"),
        (r"s3://b/runs\first", "separate folders by single slashes"),
        ("s3://AKIAKEY:hunter2@bucket/x", "may not hold credentials"),
        ("s3://bucket/x?token=hunter2", "may not hold credentials"),
        ("s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/x", "access point's alias in its place"),
        ("s3://bucket/a\nb", "holds '\\\\n', which is no character of a text"),
        ("/tmp/a\udcc3b", "locale is not UTF-8"),
    ],
)
def test_unusable_addresses_are_refused_without_secrets(url: str, problem: str) -> None:
    with pytest.raises(StoreError, match=problem) as caught:
        Store(url)
    assert "hunter2" not in str(caught.value) and "remedy" not in str(caught.value)


def test_credentials_in_the_endpoint_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:1")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL may not hold credentials") as caught:
        Store("s3://bucket/x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "minio:9000", "http://", "s3.local", "//host"])
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_without_a_scheme_is_named(name: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, endpoint)
    with pytest.raises(StoreError, match=f"^{name} is '{endpoint}': it begins with http:// or https://"):
        Store("s3://bucket/x")


def test_an_unknown_profile_and_an_endpoint_in_a_profile_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[profile minio]\nendpoint_url = 127.0.0.1:9000\nregion = us-east-1\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_CONFIG_FILE": f"{tmp_path}/config", "AWS_ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    # fsspec keeps what another test has connected.
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(StoreError, match=r"\(nosuch\).*set AWS_PROFILE to a profile of ~/.aws/config, or unset it"):
        Store("s3://bucket/x").exists("a")
    monkeypatch.setenv("AWS_PROFILE", "minio")
    with pytest.raises(StoreError, match=r"Invalid endpoint: 127.0.0.1:9000; .*AWS_ENDPOINT_URL"):
        Store("s3://bucket/x").exists("a")


# What a person may call a folder, in every place of its name. A dot alone and a slash are no names.
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=("Cc", "Cs")) | st.sampled_from(" []#?%&+*~'\"ü木"),
    min_size=1,
    max_size=20,
).filter(lambda name: name not in (".", "..") and not re.search(r"[?&][^/?&=]+=", name))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=NAMES)
def test_a_folder_may_be_called_anything(store: Store, name: str) -> None:
    if store.url.startswith("s3://"):
        name = name.replace("\\", "-")
    there = Store(f"{store.url}/parent/{name}", options=store._options)
    assert there.url == f"{store.url}/parent/{name}".rstrip("/")
    there.replace("a", name.encode())
    again = Store(there.url, options=store._options)
    assert again.read("a") == name.encode()
    assert (ascii(name), list(again.list().sizes)) == (ascii(name), ["a"])
    assert again.child("deeper").list().sizes == {}
    again.delete("a")


# ---- a file system that fails ------------------------------------------------------------------------------------


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in ("file", "file/deeper"):
        with pytest.raises(StoreError, match=r"a file is where a folder is needed"):
            Store(tmp_path / folder).check_writable()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="a folder is where a file is needed"):
        Store(tmp_path).replace("folder", b"")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_no_trace(tiny_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4 * 2**20))
    store = Store(tiny_disk)
    with pytest.raises(StoreError, match=r"No space left.*free space"):
        store.upload_file("shard", tmp_path / "image", unit_bytes=2**20)
    with pytest.raises(StoreError, match=r"No space left.*free space"):
        store.replace("record", bytes(4 * 2**20))
    assert not list(tiny_disk.iterdir())

    with pytest.raises(StoreError, match=r"bytes free and the run needs 4,000,000"):
        store.check_writable(need_bytes=4_000_000)
    store.write_new("filler", bytes(2**20 - 8192))
    with pytest.raises(StoreError, match="No space left"):
        store.check_writable()


def test_a_read_only_disk_is_explained(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(StoreError, match="read-only"):
        Store(tiny_disk / "run").check_writable()


@pytest.mark.parametrize("times", [1, 4])
def test_a_folder_that_is_removed_before_its_first_file_is_there_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """As retention does with the folder of the last key that it deletes."""
    store, made = Store(tmp_path), []
    make_folder = Path.mkdir

    def made_and_removed(path: Path, *arguments: Any, **options: Any) -> None:
        make_folder(path, *arguments, **options)
        made.append(path)
        if len(made) <= times:
            store.delete_prefix("step")

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    store.write_new("step/manifest", b"1")
    assert store.read("step/manifest") == b"1" and len(made) == times + 1
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["manifest"]


def test_a_folder_that_never_stays_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    with pytest.raises(KeyMissing, match="step/manifest does not exist"):
        Store(tmp_path).write_new("step/manifest", b"1")


@pytest.mark.parametrize("write", [Store.write_new, Store.replace])
def test_a_write_whose_unfinished_file_is_deleted_says_so_and_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Store, str, bytes], None]
) -> None:
    store = Store(tmp_path)
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), store.delete_prefix("step")))
    with pytest.raises(StoreError, match="step/manifest: its unfinished file was deleted while it was written; see"):
        write(store, "step/manifest", b"1")
    assert not store.exists("step/manifest")


def test_leftovers_of_a_killed_writer_are_invisible(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-1234").write_bytes(b"half")
    store = Store(tmp_path)
    assert not store.list().sizes
    store.delete_prefix("a")
    assert not (tmp_path / "a").exists()


def test_unfinished_files_are_collected_once_they_are_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_new("a/b/shard", b"whole")
    for name in ("a/.tmp-1", "a/b/.tmp-2", ".tmp-3"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / ".tmp-3", (1, 1))
    os.utime(tmp_path / "a/b/.tmp-2", (1, 1))
    for name in ("a/b/.tmp-shard-4", "a/b/.tmp-shard2-5"):
        (tmp_path / name).write_bytes(b"half")
    assert store.discard_unfinished("nothing", older_than_unix=time.time() - 60) == 0
    assert store.discard_unfinished("a/b/shard", older_than_unix=time.time() + 60) == 1, "of this key only"
    assert (tmp_path / "a/b/.tmp-shard2-5").exists()
    assert store.discard_unfinished("a", older_than_unix=time.time() - 60) == 1
    assert store.discard_unfinished(older_than_unix=time.time() - 60) == 1
    assert (tmp_path / "a/.tmp-1").exists() and store.read("a/b/shard") == b"whole"


def test_a_killed_upload_to_a_file_system_is_invisible_and_collected(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(2 * UNIT))
    code = (
        "import os, signal; import raynium.storage.file_store as file_store\n"
        "from raynium.storage.store import Store\n"
        "file_store.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Store({str(tmp_path / 'run')!r}).upload_file('steps/shard', {str(tmp_path / 'image')!r})\n"
    )
    env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == -signal.SIGKILL
    store = Store(tmp_path / "run")
    assert not store.exists("steps/shard") and not store.list().sizes
    assert store.discard_unfinished("steps", older_than_unix=time.time() + 60) == 1
    assert not list((tmp_path / "run/steps").iterdir())
    store.upload_file("steps/shard", tmp_path / "image")


# ---- an S3 server that refuses -----------------------------------------------------------------------------------


@pytest.mark.s3
def test_listing_and_deleting_more_than_one_page(s3_server) -> None:
    store = Store(s3_server.create_bucket("many"), options=s3_server.options)
    keys = [f"steps/step-{index:04d}/x" for index in range(1005)]

    def write_a_fifth(index: int) -> None:
        for key in keys[index::5]:
            store.write_new(key, b"1")

    assert not in_parallel(5, write_a_fifth)
    assert list(store.list("steps").sizes) == keys
    assert list(store.list("steps", recursive=False).folders) == [key[:-2] for key in keys]
    assert store.delete_prefix("steps") == 1005 and not store.list().sizes


@pytest.fixture
def web_server() -> Iterator[str]:
    """Something at an address that is not S3."""

    answers = {"none": (404, b""), "page": (200, b"<html><p>Welcome!</p></html>"), "text": (200, b"Welcome!")}

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path[1:5]]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.s3
def test_s3_refusals_name_the_remedy(s3_server, web_server: str) -> None:
    bucket = s3_server.create_bucket("refusals")
    cases = [
        ("s3://no-such-bucket/x", s3_server.options, "create the bucket"),
        (bucket, s3_server.options | {"secret": "wrong"}, "the secret key is wrong"),
        (bucket, s3_server.options | {"key": "nobody"}, "the access key is unknown"),
        (bucket, s3_server.options | {"key": s3_server.options["key"] + "-reader"}, "allow s3:PutObject on it"),
        (bucket, s3_server.options | {"endpoint_url": "http://127.0.0.1:9"}, "check the network, and AWS_ENDPOINT_URL"),
        ("s3://none", s3_server.options | {"endpoint_url": web_server}, "no such bucket.* check AWS_ENDPOINT_URL"),
        ("s3://page", s3_server.options | {"endpoint_url": web_server}, "and AWS_ENDPOINT_URL if it is set"),
        (
            "s3://text",
            s3_server.options | {"endpoint_url": web_server},
            "failed each time, or is not S3",
        ),
        (bucket, s3_server.options | {"endpoint_url": s3_server.endpoint.replace("http:", "https:")}, "speaks TLS"),
    ]
    for url, options, remedy in cases:
        with pytest.raises(StoreError, match=remedy) as caught:
            Store(url, options=options).check_writable()
        assert url in str(caught.value) and s3_server.options["secret"] not in str(caught.value)


@pytest.mark.s3
def test_a_failed_part_leaves_no_open_upload(
    s3_server, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3_server.create_bucket("parts"), options=s3_server.options)
    (tmp_path / "image").write_bytes(os.urandom(3 * PART))
    # The server is told a wrong checksum for the second part, as if its bytes had changed on the way
    wrong_for = checksum((tmp_path / "image").read_bytes()[PART : 2 * PART])
    monkeypatch.setattr(
        "raynium.storage.s3_store.to_text", lambda crc: to_text(crc ^ 1) if crc == wrong_for else to_text(crc)
    )
    with pytest.raises(StoreError, match=r"parts/shard.*the bytes changed on the way"):
        store.upload_file("shard", tmp_path / "image", unit_bytes=UNIT)
    assert not store.exists("shard")
    fs = store._backend._fs  # pyright: ignore[reportAttributeAccessIssue]
    assert not fs.call_s3("list_multipart_uploads", Bucket="parts").get("Uploads")


@pytest.mark.s3
def test_a_server_that_holds_something_else_is_noticed(
    s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3_server.create_bucket("lies"), options=s3_server.options)
    (tmp_path / "image").write_bytes(b"123")
    backend = store._backend
    for number, stored in enumerate([(2, to_text(checksum(b"123"))), (3, "AAAAAAAAAAA=")]):
        monkeypatch.setattr(backend, "head", lambda key, stored=stored: Head(*stored, version=""))
        with pytest.raises(StoreError, match=r"sent 3 bytes with CRC64NVME .*, the server holds .*is not used"):
            store.upload_file(f"shard-{number}", tmp_path / "image")
    # A server that keeps none.
    monkeypatch.setattr(backend, "head", lambda key: Head(3, None, ""))
    store.upload_file("shard-2", tmp_path / "image")
    monkeypatch.undo()

    refusal = {"Errors": [{"Key": "gone", "Code": "NoSuchKey"}, {"Key": "folder/x", "Code": "AccessDenied"}]}
    run = backend._run  # pyright: ignore[reportAttributeAccessIssue]
    store.write_new("folder/x", b"")
    monkeypatch.setattr(backend, "_run", lambda work: answer if "Contents" in (answer := run(work)) else refusal)
    with pytest.raises(StoreError, match="cannot delete folder/x: AccessDenied; allow s3:DeleteObject"):
        store.delete_prefix("folder")


def test_a_store_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(store, "read", lambda key: b"something else")
    with pytest.raises(StoreError, match="does not give back what was written"):
        store.check_writable()


@pytest.mark.s3
def test_ctrl_c_during_an_upload_cleans_up(s3_server, tmp_path: Path) -> None:
    bucket = s3_server.create_bucket("ctrl-c")
    (tmp_path / "image").write_bytes(os.urandom(3 * PART))
    code = (
        "import asyncio, os, signal, sys; from raynium.storage.store import Store\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a script starts with `&`
        f"store = Store({bucket!r}); fs = store._backend._fs; call = fs._call_s3\n"
        "async def slow(method, **request):\n"
        "    if request.get('PartNumber') == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "    if method == 'upload_part': await asyncio.sleep(30)\n"
        "    return await call(method, **request)\n"
        "fs._call_s3 = slow\n"
        f"import raynium.storage.s3_store as s3_store; s3_store.PART_BYTES = {PART}\n"
        f"try: store.upload_file('shard', {str(tmp_path / 'image')!r})\n"
        "except KeyboardInterrupt: sys.exit(7)\n"
    )
    env = {**s3_server.env, "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == 7
    fs = Store(bucket, options=s3_server.options)._backend._fs  # pyright: ignore[reportAttributeAccessIssue]
    assert not fs.call_s3("list_multipart_uploads", Bucket="ctrl-c").get("Uploads")
    assert not Store(bucket, options=s3_server.options).exists("shard")


def test_a_record_read_while_it_is_replaced_is_one_version_of_it(store: Store) -> None:
    """`run.json` changes its length at each heartbeat, and everybody reads it."""
    versions = {b"short", b"a much longer version of the record" * 20}
    store.replace("record.json", b"short")
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for version in versions:
                store.replace("record.json", version)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {store.read("record.json") for _ in range(100)} <= versions
    finally:
        done.set()
        writer.join()
