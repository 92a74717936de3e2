"""A store behind a URL arrives whole or not at all, once per machine, and heals."""

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raynium.config.schema import DataSection
from raynium.data.remote import localize, prepare_store, publish
from raynium.data.store import DocumentStore, open_store
from raynium.data.store_build import build_store
from raynium.errors import DataError

URL = "memory://bucket/stores/first"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i}, {i * 37}\n" * 5)
    return folder


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return build_store(
        tmp_path_factory.mktemp("local"), source=str(source), vocab_size=300, heldout_fraction=0.2, shard_tokens=500
    )


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's file system in memory, empty before and after."""
    file_system = MemoryFileSystem()
    file_system.store.clear()
    yield file_system
    file_system.store.clear()


def data_section(path: str | Path, **fields: Any) -> DataSection:
    return DataSection(path=str(path), seq_len=16, heldout_fraction=0.2, **fields)


def test_published_store_arrives_whole(local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path):
    publish(local, URL)
    folder = localize(URL, tmp_path)
    arrived = open_store(folder)
    arrived.verify()
    assert arrived.manifest == local.manifest
    assert folder.is_relative_to(tmp_path)
    assert localize(URL + "/", tmp_path / "other") != folder


def test_local_folders_are_used_in_place(tmp_path: Path):
    assert localize(tmp_path, "unused") == tmp_path
    assert localize(f"file://{tmp_path}", "unused") == tmp_path


def test_second_call_copies_nothing(
    local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(local, URL)
    folder = localize(URL, tmp_path)
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)
    assert localize(URL, tmp_path) == folder


def test_replaced_store_gets_a_folder_of_its_own(
    local: DocumentStore, source: Path, memory: MemoryFileSystem, tmp_path: Path
):
    publish(local, URL)
    before = localize(URL, tmp_path)
    publish(build_store(tmp_path / "new", source=str(source), vocab_size=260, heldout_fraction=0.2), URL)
    after = localize(URL, tmp_path)
    assert open_store(before).manifest == local.manifest
    assert open_store(after).manifest.vocab_size == 260
    open_store(before).verify()


def test_manifest_is_uploaded_last(local: DocumentStore, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    uploaded: list[str] = []
    put_file = MemoryFileSystem.put_file

    def recording(self: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
        uploaded.append(target.rsplit("/", 1)[1])
        put_file(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", recording)
    publish(local, URL)
    assert uploaded[-1] == "manifest.json" and len(uploaded) == len(local.manifest.files) + 1


def test_interrupted_copy_is_no_store_and_goes_on_where_it_was(
    local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(local, URL)
    copied: list[str] = []
    get_file = MemoryFileSystem.get_file

    def dies_at_third(self: MemoryFileSystem, remote: str, target: str, **options: Any) -> None:
        if len(copied) == 2:
            Path(target).write_bytes(b"half")
            raise ConnectionError("cut")
        copied.append(remote)
        get_file(self, remote, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", dies_at_third)
    with pytest.raises(DataError, match=r"cannot be copied to .*: cut; check access"):
        localize(URL, tmp_path)
    [folder] = tmp_path.iterdir()
    with pytest.raises(DataError, match="is no document store"):
        open_store(folder)
    # the first file arrived whole but was damaged on disk since; nothing says its content was ever verified
    first = folder / local.manifest.files[0].name
    first.write_bytes(bytes(first.stat().st_size))

    again: list[str] = []
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, r, t: again.append(r) or get_file(self, r, t))
    open_store(localize(URL, tmp_path)).verify()
    assert copied[0] in again and copied[1] not in again


def test_file_of_wrong_size_in_the_cache_is_fetched_again(
    local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path
):
    publish(local, URL)
    folder = localize(URL, tmp_path)
    os.truncate(folder / "train-00000.bin", 10)
    (folder / "tokenizer.json").unlink()
    open_store(localize(URL, tmp_path)).verify()


def test_damage_at_the_url_is_refused(local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path):
    publish(local, URL)
    content = bytearray(memory.cat_file("/bucket/stores/first/heldout-00000.bin"))
    content[5] ^= 1
    memory.pipe_file("/bucket/stores/first/heldout-00000.bin", bytes(content))
    with pytest.raises(DataError, match=r"first/heldout-00000\.bin is damaged: its checksum is not the one"):
        localize(URL, tmp_path)


def test_callers_at_once_share_one_copy(
    local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(local, URL)
    copied: list[str] = []
    get_file = MemoryFileSystem.get_file
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, r, t: copied.append(r) or get_file(self, r, t))
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(localize(URL, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 6 and len(set(folders)) == 1
    assert len(copied) == len(local.manifest.files)


def test_url_that_cannot_be_used_is_refused(local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path):
    with pytest.raises(DataError, match=r"'memory://nothing/here' is no document store.*set data\.source"):
        localize("memory://nothing/here", tmp_path)
    with pytest.raises(DataError, match=r"'nosuch://x' cannot be opened: .*give a folder or an s3:// URL"):
        localize("nosuch://x", tmp_path)
    (tmp_path / "file").write_text("in the way")
    publish(local, URL)
    with pytest.raises(DataError, match=r"cannot be copied to .*check permissions and free space there"):
        localize(URL, tmp_path / "file")


def test_storage_that_refuses_is_reported_with_its_reason(
    local: DocumentStore, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: MemoryFileSystem, *arguments: Any, **options: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.raises(
        DataError, match=r"cannot be uploaded to memory://.*: Access Denied; check the URL, credentials"
    ):
        publish(local, URL)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(DataError, match="cannot be read: Access Denied; check the URL, credentials"):
        localize(URL, tmp_path)


# ---- prepare_store: what the driver calls ----------------------------------------------------------------------------


def test_prepare_builds_a_missing_store_in_place(source: Path, tmp_path: Path):
    path = tmp_path / "store"
    store = prepare_store(data_section(path, source=str(source)), model_vocab_size=300, cache_dir=tmp_path / "cache")
    assert store.path == path and open_store(path).manifest == store.manifest
    assert not (tmp_path / "cache").exists()
    again = prepare_store(data_section(path), model_vocab_size=300, cache_dir=tmp_path / "cache")
    assert again.manifest == store.manifest


def test_prepare_builds_uploads_and_then_reuses_a_remote_store(source: Path, memory: MemoryFileSystem, tmp_path: Path):
    data = data_section(URL, source=str(source))
    store = prepare_store(data, model_vocab_size=300, cache_dir=tmp_path / "here")
    elsewhere = prepare_store(data, model_vocab_size=300, cache_dir=tmp_path / "another-machine")
    assert elsewhere.manifest == store.manifest and elsewhere.path != store.path
    with pytest.raises(DataError, match=r"built with data\.source"):
        prepare_store(data_section(URL, source="python-stdlib"), model_vocab_size=300, cache_dir=tmp_path / "here")


def test_prepare_refuses_what_does_not_fit(local: DocumentStore, tmp_path: Path):
    with pytest.raises(DataError, match=r"is no document store: .*set data\.source to build one there"):
        prepare_store(data_section(tmp_path / "absent"), model_vocab_size=300, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"set model\.vocab_size to"):
        prepare_store(data_section(local.path), model_vocab_size=10, cache_dir=tmp_path)
    fields = json.loads(local.tokenizer().file_text)
    (tmp_path / "other.json").write_text(json.dumps({**fields, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(DataError, match="tokenised with another tokenizer"):
        prepare_store(
            data_section(local.path, tokenizer=str(tmp_path / "other.json")), model_vocab_size=300, cache_dir=tmp_path
        )


# ---- a real S3 server ------------------------------------------------------------------------------------------------


def localize_and_report(url: str, cache_dir: Path, env: dict[str, str], results: Any) -> None:
    os.environ.update(env)
    store = open_store(localize(url, cache_dir))
    store.verify()
    results.put(store.manifest.model_dump_json())


@pytest.mark.s3
def test_s3_round_trip_with_two_processes_at_once(local: DocumentStore, s3_server: Any, tmp_path: Path, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.create_bucket("documents")
    publish(local, f"{bucket}/a/store")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (f"{bucket}/a/store", tmp_path, s3_server.env, results)
    processes = [context.Process(target=localize_and_report, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert {results.get(timeout=60) for _ in processes} == {local.manifest.model_dump_json()}
    for process in processes:
        process.join()
    with pytest.raises(DataError, match="is no document store"):
        localize(f"{bucket}/nothing", tmp_path)
    with pytest.raises(DataError, match="s3://no-such-bucket-here"):
        localize("s3://no-such-bucket-here/x", tmp_path)
