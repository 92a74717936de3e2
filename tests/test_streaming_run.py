"""A run that streams its data is the run that copies it, to the last bit, also after a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from standalone_ranks import standalone, trained
from tiny import build_documents, job_text, publish

from raynium.checkpoint.catalog import list_checkpoints, open_checkpoint
from raynium.config.load import parse_config
from raynium.config.local_folders import scratch_folder
from raynium.data import streamed
from raynium.data.access import fetch_store, fetch_stores, is_streamed, open_fetched
from raynium.data.build.prepare import check_stores
from raynium.data.loader import open_loader
from raynium.data.store import DocumentStore, open_store
from raynium.data.streamed import StreamedStore
from raynium.errors import DataError
from raynium.storage.range_cache import CachedRange
from raynium.storage.store import Store

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]

STEPS = 120
CHANGES = {
    "engine.dtype": "float32",
    "data.shuffle": "blocks",
    "data.shuffle_lanes": 4,
    "data.shuffle_block_bytes": 2048,
    "train.steps": STEPS,
    "checkpoint.every_steps": STEPS // 3,
    "checkpoint.keep_last": 3,
    "evaluate.every_steps": STEPS,
    "evaluate.max_documents": 4,
}


@pytest.fixture(scope="module")
def url(s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = build_documents(tmp_path_factory.mktemp("documents"))
    url = f"{s3_server.create_bucket('streaming-run')}/data"
    publish(folder, url, options=s3_server.options)
    return url


def checksums(run: Path) -> list[str]:
    """Of the files of the last checkpoint: weights and moments of each rank."""
    return [file.crc64nvme for file in open_checkpoint(Store(run), STEPS).manifest.shards]


@pytest.mark.slow
def test_copied_streamed_and_killed_runs_end_with_the_same_bits(url: str, s3_server: Any, tmp_path: Path):
    jobs = {}
    for name, access in (("copied", "copy"), ("streamed", "stream"), ("killed", "stream")):
        changes = CHANGES | {"run.name": name, "data.path": url, "data.access": access}
        jobs[name] = tmp_path / f"{name}.yaml"
        jobs[name].write_text(job_text(changes, root=tmp_path))
    environments = {}
    for name in jobs:
        scratch = tmp_path / f"scratch-{name}"
        scratch.mkdir()
        environments[name] = s3_server.env | {"TMPDIR": str(scratch)}
    for name in ("copied", "streamed"):
        trained(jobs[name], more_environment=environments[name])

    first = tmp_path / "killed/checkpoints" / f"step-{STEPS // 3:09}" / "manifest.json"
    assert standalone(jobs["killed"], more_environment=environments["killed"], kill_once=first).returncode
    assert [each.step for each in list_checkpoints(Store(tmp_path / "killed"))] != [40, 80, 120]
    assert "resumed from the checkpoint" in trained(jobs["killed"], more_environment=environments["killed"])

    same = checksums(tmp_path / "copied")
    assert same and checksums(tmp_path / "streamed") == checksums(tmp_path / "killed") == same
    [scratch] = (tmp_path / "scratch-streamed").glob("raynium-*")
    assert not (scratch / "data").exists(), "the store was copied all the same"
    [cache] = (scratch / "stream").iterdir()
    assert any(cache.iterdir())


def section(url: str, **changes: Any) -> Any:
    own = {f"data.{name}": value for name, value in changes.items()} | {"data.path": url}
    return parse_config(job_text({key: value for key, value in (CHANGES | own).items()})).data


@pytest.fixture
def here(url: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return url


def test_auto_copies_what_fits_the_cache_and_streams_what_does_not(here: str, tmp_path: Path):
    for data, kind in (
        (section(here), DocumentStore),
        (section(here, cache_bytes=1000), StreamedStore),
        (section(here, cache_bytes=1000, shuffle="rows"), DocumentStore),
        (section(here, access="stream"), StreamedStore),
        (section(here, access="copy", cache_bytes=1000), DocumentStore),
    ):
        place = fetch_store(data, here, tmp_path / "copies")
        store = open_fetched(data, place, identity=None, run="a run")
        assert type(store) is kind and is_streamed(data, here, store.manifest) == (kind is StreamedStore)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_the_loader_of_a_config_streams_what_the_copy_holds(here: str, tmp_path: Path, packing: str):
    batches = []
    for access in ("copy", "stream"):
        config = parse_config(job_text(CHANGES | {"data.path": here, "data.access": access, "data.packing": packing}))
        store = open_fetched(
            config.data, fetch_store(config.data, here, tmp_path / "copies"), identity=None, run="a run"
        )
        loader = open_loader(config, [store], data_rank=1, data_size=2)
        batches.append([loader.batch(step).columns() for step in range(1, 400)])
        assert set(loader.metrics(399)) == (
            {"data/requests", "data/fetched_bytes", "data/used_bytes", "data/wait_seconds"}
            if access == "stream"
            else set()
        )
        loader.close()
    for ours, theirs in zip(*batches, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("data_size", [1, 4])
def test_mixtures_are_streamed_as_they_are_copied_through_stages(here: str, tmp_path: Path, data_size: int):
    folder = build_documents(tmp_path, num_files=25).rename(tmp_path / "other")
    mixture = [{"store": here, "weight": 0.7}, {"store": str(folder), "weight": 0.3}]
    stages = [{"from_step": 60, "weights": {"data": 0.1, "other": 0.9}}]
    batches = []
    for access in ("copy", "stream"):
        changes = {"data.path": None, "data.mixture": mixture, "data.stages": stages, "data.access": access}
        config = parse_config(job_text(CHANGES | changes | {"train.global_batch_size": 8}))
        stores = [
            open_fetched(config.data, place, identity=None, run="a run")
            for place in fetch_stores(config.data, tmp_path / "copies")
        ]
        assert {type(store) for store in stores} == {StreamedStore if access == "stream" else DocumentStore}
        loaders = [open_loader(config, stores, data_rank=rank, data_size=data_size) for rank in range(data_size)]
        batches.append([torch.cat([each.batch(step).tokens_BT for each in loaders]) for step in range(1, STEPS + 1)])
        for loader in loaders:
            loader.close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*batches, strict=True))


def test_a_folder_is_used_in_place_and_may_be_streamed_as_one_that_is_far_away(here: str, tmp_path: Path):
    folder = build_documents(tmp_path)
    data = section(str(folder), cache_bytes=1000)
    assert fetch_store(data, str(folder), tmp_path / "copies") == str(folder)
    assert isinstance(open_fetched(data, str(folder), identity=None, run="a run"), DocumentStore)
    as_remote = open_fetched(section(str(folder), access="stream"), str(folder), identity=None, run="a run")
    local = open_store(folder)
    assert isinstance(as_remote, StreamedStore)
    length = local.manifest.train.tokens
    assert (as_remote.train_stream().read(0, length) == local.train_stream().read(0, length)).all()


def test_each_run_of_a_node_has_a_cache_of_its_own(here: str, monkeypatch: pytest.MonkeyPatch):
    """What one with a large bound does not let go of is not in the way of one with a small bound."""
    monkeypatch.setattr(streamed, "NO_ROOM_SECONDS", 0.0)
    greedy, modest = (
        open_fetched(section(here, access="stream", cache_bytes=cache_bytes), here, identity=None, run=run)
        for run, cache_bytes in (("greedy", 2**30), ("modest", 2**20))
    )
    assert isinstance(greedy, StreamedStore)
    held = greedy._files.cache.hold(CachedRange("large", 2**20, lambda view: None, lambda view: True))
    assert len(modest.train_stream().read(0, 1000)) == 1000
    assert len(held) == 2**20


def test_a_cache_that_cannot_be_made_is_an_error_with_a_remedy(here: str, tmp_path: Path):
    (scratch_folder() / "stream").write_text("in the way")
    with pytest.raises(DataError, match=r"the data cache .*/stream cannot be made: .*; remove what is there, or set"):
        open_fetched(section(here, access="stream"), here, identity=None, run="a run")


def test_a_cache_that_is_too_small_is_refused_before_anything_starts(here: str):
    def check(cache_bytes: int) -> None:
        changes = {"data.path": here, "data.access": "stream", "data.cache_bytes": cache_bytes}
        check_stores(parse_config(job_text(CHANGES | changes)), tell=lambda _: None)

    with pytest.raises(DataError, match=r"data.cache_bytes = 100,000: a node that streams needs [\d,]+ bytes") as error:
        check(100_000)
    need = int(str(error.value).partition("data.cache_bytes to ")[2].partition(" ")[0])
    check(need)


def test_a_store_that_is_nowhere_is_refused(here: str, tmp_path: Path):
    with pytest.raises(DataError, match="is no document store"):
        fetch_store(section(here, access="stream"), f"{here}-none", tmp_path)
