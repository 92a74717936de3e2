"""A store behind a URL arrives whole or not at all, once per machine, and heals."""

import itertools
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import s3fs
from tiny import publish

from raynium.config.schema import DataSection
from raynium.data import remote
from raynium.data.build.prepare import prepare_store
from raynium.data.build.store_build import build_from_source, build_store
from raynium.data.remote import find_identity, localize
from raynium.data.store import DocumentStore, open_store
from raynium.data.verify import verify_store
from raynium.errors import DataError, StoreError
from raynium.storage.store import Store

pytestmark = pytest.mark.s3
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i}, {i * 37}\n" * 5)
    return folder


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return build_store(
        tmp_path_factory.mktemp("local"),
        source=str(source),
        vocab_size=300,
        heldout_fraction=0.2,
        split_bytes=1200,
        unit_bytes=64,
    )


@pytest.fixture(scope="module")
def bucket(s3_server: Any) -> str:
    return s3_server.create_bucket("documents")


@pytest.fixture
def url(bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a place without a store, which this process may write."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return f"{bucket}/stores/{next(numbers)}"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are fetched from now on, one for each request."""
    names: list[str] = []
    read_into = Store.read_into

    def recording(self: Store, key: str, start: int, *buffers: memoryview) -> None:
        names.append(key)
        read_into(self, key, start, *buffers)

    monkeypatch.setattr(Store, "read_into", recording)
    return names


def data_section(path: str | Path, **fields: Any) -> DataSection:
    return DataSection(path=str(path), seq_len=16, heldout_fraction=0.2, **fields)


def test_published_store_arrives_whole(local: DocumentStore, url: str, tmp_path: Path):
    publish(local.path, url)
    folder = localize(url, tmp_path)
    assert verify_store(folder) == verify_store(url) == open_store(folder).manifest == local.manifest
    assert folder.is_relative_to(tmp_path)
    assert localize(url + "/", tmp_path / "other") != folder


def test_files_come_in_parts_each_verified(
    local: DocumentStore, url: str, fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "REQUEST_BYTES", 200)
    publish(local.path, url)
    folder = localize(url, tmp_path)
    sizes = {file.name: file.size_bytes for file in local.manifest.files}
    assert fetched.count("train-00000.bin") == -(-sizes["train-00000.bin"] // 192)  # three units of 64 bytes at once
    verify_store(folder)


def test_local_folders_are_used_in_place(tmp_path: Path):
    assert localize(tmp_path, "unused") == tmp_path
    assert localize(f"file://{tmp_path}", "unused") == tmp_path


def test_second_call_copies_nothing(local: DocumentStore, url: str, fetched: list[str], tmp_path: Path):
    publish(local.path, url)
    folder = localize(url, tmp_path)
    fetched.clear()
    assert localize(url, tmp_path) == folder and fetched == []


def test_replaced_store_gets_a_folder_of_its_own(local: DocumentStore, source: Path, url: str, tmp_path: Path):
    publish(local.path, url)
    before = localize(url, tmp_path)
    Store(url.rpartition("/")[0]).delete_prefix(url.rpartition("/")[2])
    publish(build_store(tmp_path / "new", source=str(source), vocab_size=260, heldout_fraction=0.2).path, url)
    after = localize(url, tmp_path)
    assert open_store(before).manifest == local.manifest
    assert open_store(after).manifest.vocab_size == 260
    verify_store(before)


def test_interrupted_copy_is_no_store_and_goes_on_where_it_was(
    local: DocumentStore, url: str, fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(local.path, url)
    first, second, third, *_ = (file.name for file in local.manifest.files)
    pwrite = os.pwrite

    def full_at_third(descriptor: int, content: bytes, offset: int) -> int:
        if third in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, content[:50], offset)  # a system call may write less than it was given

    monkeypatch.setattr(os, "pwrite", full_at_third)
    with pytest.raises(DataError, match=r"cannot be copied to .*: .*No space left.*; check permissions and free space"):
        localize(url, tmp_path)
    monkeypatch.setattr(os, "pwrite", pwrite)
    [folder] = tmp_path.iterdir()
    with pytest.raises(DataError, match="is no document store"):
        open_store(folder)
    # the first file arrived whole but was damaged on disk since; nothing says its content was ever verified
    (folder / first).write_bytes(bytes((folder / first).stat().st_size))
    fetched.clear()
    verify_store(localize(url, tmp_path))
    assert first in fetched and third in fetched
    assert fetched.count(second) == 1, "by verify_store alone"


def test_file_of_wrong_size_in_the_cache_is_fetched_again(local: DocumentStore, url: str, tmp_path: Path):
    publish(local.path, url)
    folder = localize(url, tmp_path)
    os.truncate(folder / "train-00000.bin", 10)
    (folder / "tokenizer.json").unlink()
    verify_store(localize(url, tmp_path))


def test_damage_at_the_url_is_refused(local: DocumentStore, url: str, tmp_path: Path):
    publish(local.path, url)
    store = Store(url)
    content = bytearray(store.read("heldout-00000.bin"))
    content[100] ^= 1
    store.replace("heldout-00000.bin", bytes(content))
    with pytest.raises(DataError, match=r"heldout-00000\.bin is damaged: unit 1 of 64 bytes .*raynium data verify s3:"):
        localize(url, tmp_path)
    store.replace("train-00000.bin", content[:70])
    store.delete("tokenizer.json")
    with pytest.raises(DataError, match=r"is damaged:\n") as caught:
        verify_store(url)
    assert "heldout-00000.bin is damaged in 1 unit(s) of 64 bytes (wrong CRC64NVME): bytes 64 to 128" in str(
        caught.value
    )
    size = f"{local.manifest.train_shards[0].size_bytes:,}"
    assert f"train-00000.bin has 70 bytes instead of {size}: bytes 64 to {size}" in str(caught.value)
    assert "tokenizer.json is missing" in str(caught.value)


def test_callers_at_once_share_one_copy(local: DocumentStore, url: str, fetched: list[str], tmp_path: Path):
    publish(local.path, url)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(localize(url, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 6 and len(set(folders)) == 1
    assert sorted(fetched) == sorted(file.name for file in local.manifest.files)


def test_url_that_cannot_be_used_is_refused(local: DocumentStore, url: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"'s3://.*' is no document store.*set data\.source"):
        localize(url, tmp_path)
    with pytest.raises(DataError, match="s3://no-such-bucket-here"):
        localize("s3://no-such-bucket-here/x", tmp_path)
    with pytest.raises(DataError, match=r"'gs://bucket/x' cannot be .*scheme 'gs': use a path, file:// or s3://"):
        localize("gs://bucket/x", tmp_path)
    (tmp_path / "file").write_text("in the way")
    publish(local.path, url)
    with pytest.raises(DataError, match=r"cannot be copied to .*check permissions and free space there"):
        localize(url, tmp_path / "file")


def test_storage_that_refuses_is_reported_with_its_reason(
    source: Path, url: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.env["AWS_ACCESS_KEY_ID"] + "-reader")
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps one for all of a process, with the credentials of before
    try:
        with pytest.raises(DataError, match=r"document store s3://.* cannot be built: .*s3:PutObject"):
            build_from_source(url, source=str(source), vocab_size=300)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_verify_refuses_a_place_without_a_store(url: str, tmp_path: Path):
    for place in (url, tmp_path):
        with pytest.raises(DataError, match=r"is no document store: it has no manifest\.json; give the folder or URL"):
            verify_store(place)


def test_storage_that_fails_while_it_is_verified_is_no_damage(
    local: DocumentStore, url: str, monkeypatch: pytest.MonkeyPatch
):
    def cut(self: Store, key: str, start: int, *buffers: memoryview) -> None:
        raise StoreError("the connection broke each time")

    publish(local.path, url)
    monkeypatch.setattr(Store, "read_into", cut)
    with pytest.raises(DataError, match=r"cannot be read: the connection broke each time"):
        verify_store(url)


# ---- prepare_store: what the driver calls ----------------------------------------------------------------------------


def test_prepare_builds_a_missing_store_in_place(source: Path, tmp_path: Path):
    path = tmp_path / "store"
    store = prepare_store(
        data_section(path, source=str(source)), model_vocab_size=300, run="a run", cache_dir=tmp_path / "cache"
    )
    assert store.path == path and open_store(path).manifest == store.manifest
    assert not (tmp_path / "cache").exists()
    again = prepare_store(data_section(path), model_vocab_size=300, run="a run", cache_dir=tmp_path / "cache")
    assert again.manifest == store.manifest


def test_prepare_builds_uploads_and_then_reuses_a_remote_store(source: Path, url: str, tmp_path: Path):
    data = data_section(url, source=str(source))
    store = prepare_store(data, model_vocab_size=300, run="a run", cache_dir=tmp_path / "here")
    elsewhere = prepare_store(data, model_vocab_size=300, run="a run", cache_dir=tmp_path / "another-machine")
    assert elsewhere.manifest == store.manifest and elsewhere.path != store.path
    with pytest.raises(DataError, match=r"built with data\.source"):
        prepare_store(
            data_section(url, source="python-stdlib"), model_vocab_size=300, run="a run", cache_dir=tmp_path / "here"
        )


def test_prepare_refuses_what_does_not_fit(local: DocumentStore, tmp_path: Path):
    with pytest.raises(DataError, match=r"is no document store: .*set data\.source to build one there"):
        prepare_store(data_section(tmp_path / "absent"), model_vocab_size=300, run="a run", cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"set model\.vocab_size to"):
        prepare_store(data_section(local.path), model_vocab_size=10, run="a run", cache_dir=tmp_path)
    fields = json.loads(local.tokenizer().file_text)
    (tmp_path / "other.json").write_text(json.dumps({**fields, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(DataError, match="tokenised with another tokenizer"):
        prepare_store(
            data_section(local.path, tokenizer=str(tmp_path / "other.json")),
            model_vocab_size=300,
            run="a run",
            cache_dir=tmp_path,
        )


def test_the_content_is_known_by_its_identity_wherever_it_lies(local: DocumentStore, url: str, tmp_path: Path):
    publish(local.path, url)
    identity = local.manifest.identity
    for path in (local.path, url):
        assert find_identity(data_section(path)) == identity
        data = data_section(path, identity=identity)
        assert prepare_store(data, model_vocab_size=300, run="a run", cache_dir=tmp_path).manifest.identity == identity
        for use in (
            find_identity,
            lambda data: prepare_store(data, model_vocab_size=300, run="a run", cache_dir=tmp_path),
        ):
            with pytest.raises(
                DataError, match=rf"holds other data \(identity {identity}\) than data.identity = '0{{64}}"
            ):
                use(data_section(path, identity="0" * 64))
    assert find_identity(data_section(tmp_path / "none")) is None


# ---- two processes ---------------------------------------------------------------------------------------------------


def localize_and_report(url: str, cache_dir: Path, env: dict[str, str], results: Any) -> None:
    os.environ.update(env)
    results.put(verify_store(localize(url, cache_dir)).model_dump_json())


def test_two_processes_at_once_share_one_copy(local: DocumentStore, url: str, s3_server: Any, tmp_path: Path):
    publish(local.path, url)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (url, tmp_path, s3_server.env, results)
    processes = [context.Process(target=localize_and_report, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert {results.get(timeout=60) for _ in processes} == {local.manifest.model_dump_json()}
    for process in processes:
        process.join()
