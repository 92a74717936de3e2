"""Building a store: by one of several, straight into its place, without duplicates if asked, and what is said of it."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import run_command

from raynium.config.load import load_config
from raynium.config.paths import resolve
from raynium.data.access import fetch_stores
from raynium.data.build import dedup, lease, store_build
from raynium.data.build.lease import only_builder
from raynium.data.build.prepare import check_stores
from raynium.data.build.show import describe
from raynium.data.build.store_build import build_from_recipe
from raynium.data.build.tokenise import Part
from raynium.data.build.work import ahead
from raynium.data.manifest import Recipe, StoreManifest
from raynium.data.runner import in_this_process
from raynium.data.store import open_store
from raynium.data.tokenizer import Tokenizer
from raynium.data.verify import verify_store
from raynium.errors import ConfigError, DataError, StoreError
from raynium.launch.data import build as launch_build
from raynium.launch.data.build import build_data, store_place
from raynium.launch.tasks import ray_tasks
from raynium.storage.process import Owner
from raynium.storage.store import Store

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(Tokenizer.train(["document number 17 says this and that\n" * 30], vocab_size=300).file_text)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Sixty different documents in two files, and copies of some in both."""
    lines = [f"document number {i} says {i * i} " * (i % 7 + 1) for i in range(60)]
    folder = tmp_path / "source"
    folder.mkdir()
    for name, texts in (("a", lines[:30] + lines[5:10]), ("b", lines[20:60] + lines[58:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def recipe(*sources: Path, **fields: Any) -> Recipe:
    given = {"text_field": "text", "heldout_fraction": 0.2, "dedup": "none", **fields}
    return Recipe(sources=[str(each) for each in sources], **given)


def build(place: str | Path, recipe: Recipe, tokenizer: Path, **how: Any) -> StoreManifest:
    how = {"runner": in_this_process, "tell": lambda line: None, "split_bytes": 900, **how}
    return build_from_recipe(place, recipe, Tokenizer.load(tokenizer), **how)


def texts_of(path: Path) -> Sequence[str]:
    """Of all documents, held-out ones last."""
    store = open_store(path)
    train = store.train_stream().read(0, store.manifest.train.tokens).tolist()
    end, tokenizer = store.manifest.end_of_document_id, store.tokenizer()
    documents = [
        tokenizer.decode(list(group))
        for is_end, group in itertools.groupby(train, lambda token: token == end)
        if not is_end
    ]
    held_out = store.heldout_stream()
    return documents + [
        tokenizer.decode(held_out.read(each.offset, each.num_tokens)) for each in store.heldout_documents()
    ]


# ---- duplicates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition_bytes", [10**9, 1000])
def test_of_equal_documents_the_first_in_the_order_of_the_source_stays(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_bytes: int
):
    monkeypatch.setattr(dedup, "PARTITION_BYTES", partition_bytes)
    all_of_them = build(tmp_path / "all", recipe(source), tokenizer)
    manifest = build(tmp_path / "once", recipe(source, dedup="exact"), tokenizer)
    lines = [json.loads(line)["text"] for name in "ab" for line in (source / f"{name}.jsonl").read_text().splitlines()]
    assert sorted(texts_of(tmp_path / "all")) == sorted(lines)
    assert sorted(texts_of(tmp_path / "once")) == sorted(set(lines))
    kept_in_order = texts_of(tmp_path / "once")[: manifest.train.documents]
    assert kept_in_order == [text for text in dict.fromkeys(lines) if text in set(kept_in_order)]
    [group] = manifest.left_out
    assert (group.reason, group.number) == ("duplicate", len(lines) - len(set(lines)))
    assert group.first.startswith("a.jsonl:") and all_of_them.left_out == []
    assert not Store(tmp_path / "once").list("building").sizes


def test_duplicates_are_looked_for_across_sources(source: Path, tokenizer: Path, tmp_path: Path):
    once = build(tmp_path / "once", recipe(source, dedup="exact"), tokenizer)
    copy = shutil.copytree(source, tmp_path / "copy")
    twice = build(tmp_path / "twice", recipe(source, copy, dedup="exact"), tokenizer)
    assert twice.train == once.train and twice.identity == once.identity
    assert twice.left_out[0].number == 2 * once.left_out[0].number + once.train.documents + once.heldout.documents


# ---- in S3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return f"{s3_server.create_bucket(f'build-{next(numbers)}')}/data/web"


@pytest.mark.s3
def test_a_store_is_built_straight_into_s3_and_goes_on_there(
    source: Path, tokenizer: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    local = build(tmp_path / "local", recipe(source, dedup="exact"), tokenizer)
    done: list[int] = []

    def dying(task: Any, work: Any, items: Sequence[Any]) -> Generator[Any]:
        for item in items:
            if task is store_build.tokenise_split:
                done.append(item.number)
                if done == [0, 1, 2]:
                    # As a task that died when its shard was there, and its part was not.
                    Store(url).write_new("train-00002.bin", b"half")
                    raise InterruptedError
            yield task(work, item)

    with pytest.raises(InterruptedError):
        build(url, recipe(source, dedup="exact"), tokenizer, runner=dying)
    with pytest.raises(DataError, match="no document store"):
        verify_store(url)
    assert build(url, recipe(source, dedup="exact"), tokenizer, runner=dying) == local
    assert done == [0, 1, 2, 2, *range(3, local.train.shards.numbers[-1] + 1)]
    assert verify_store(url) == local
    names = {name for file in local.files for name in (file.name, file.units_name)}
    assert set(Store(url).list().sizes) == names | {"manifest.json"}


@pytest.mark.s3
def test_of_two_builders_of_one_url_one_builds(
    source: Path, tokenizer: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    built: list[int] = []
    finish = store_build.finish
    monkeypatch.setattr(store_build, "finish", lambda *given, **more: built.append(1) or finish(*given, **more))
    manifests: list[StoreManifest] = []
    threads = [
        threading.Thread(target=lambda: manifests.append(build(url, recipe(source), tokenizer))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1] and len(manifests) == 3 and manifests[0] == manifests[1] == manifests[2]


# ---- one builder at a time -------------------------------------------------------------------------------------------


def test_a_builder_is_waited_for_and_told_of(tmp_path: Path):
    store, told, order = Store(tmp_path), [], []

    def second() -> None:
        with only_builder(store, told.append):
            order.append("second")

    with only_builder(store, told.append):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(3 * lease.LOOK_SECONDS)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and told == [f"data: another process builds {store.url}, and is waited for"]
    assert not store.list().sizes


def test_a_dead_builder_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of this host at once; of another host once its heart has been silent for long enough."""
    store = Store(tmp_path)
    script = (
        "import os, signal, sys\n"
        "from raynium.data.build.lease import only_builder\n"
        "from raynium.storage.store import Store\n"
        "with only_builder(Store(sys.argv[1]), print):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert list(store.list().sizes) == ["building/claims/000001.json"]
    monkeypatch.setattr(lease, "LOST_SECONDS", 60.0)
    with only_builder(store, print) as check:
        check()
        assert "building/claims/000002.json" in store.list().sizes
    far = Owner("another-host", "its-boot", 7, "99")
    store.write_new("building/claims/000001.json", json.dumps(far.__dict__).encode())
    monkeypatch.setattr(lease, "LOST_SECONDS", 2.0)
    beats, done = itertools.count(), threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            store.replace("building/beats/000001", str(next(beats)).encode())

    heart = threading.Thread(target=beat)
    heart.start()
    threading.Timer(4.0, done.set).start()
    began = time.monotonic()
    with only_builder(store, print) as check:
        assert done.is_set() and time.monotonic() - began > 4.0
    heart.join()


def test_a_builder_that_was_taken_for_dead_does_not_commit(tmp_path: Path):
    store = Store(tmp_path)
    with only_builder(store, print) as check:
        store.write_new("building/claims/000002.json", b"{}")
        with pytest.raises(DataError, match="was taken over by another builder while this one could not be heard"):
            check()
    assert list(store.list("building/claims").sizes) == ["building/claims/000002.json"]


def test_a_builder_that_was_taken_for_dead_leaves_the_claim_of_a_later_one_of_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first is halted, the second goes on in its place and ends, the third begins, and the first wakes up."""
    store, hosts = Store(tmp_path), dict[str, Any]()
    monkeypatch.setattr(lease, "LOST_SECONDS", 0.0)
    monkeypatch.setattr(lease, "this_process", lambda: Owner(host, "its-boot", 7, "99"))
    for host in ("first", "second"):
        hosts[host] = only_builder(store, print)
        hosts[host].__enter__()
    assert len(store.list("building/claims").sizes) == 2
    hosts["second"].__exit__(None, None, None)
    host = "third"
    with only_builder(store, print) as check:
        host = "first"
        hosts["first"].__exit__(None, None, None)
        host = "third"
        check()
    assert not store.list("building").sizes


def test_what_was_put_there_meanwhile_is_refused(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = build(tmp_path / "other", recipe(source, heldout_fraction=0.5), tokenizer)
    finish = store_build.finish

    def meanwhile(*given: Any, **more: Any) -> StoreManifest:
        Store(tmp_path / "store").write_new("manifest.json", other.to_json())
        return finish(*given, **more)

    monkeypatch.setattr(store_build, "finish", meanwhile)
    with pytest.raises(DataError, match="another one was put there meanwhile"):
        build(tmp_path / "store", recipe(source), tokenizer)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_another_recipe_or_tokenizer_than_the_stores_is_refused(source: Path, tokenizer: Path, tmp_path: Path):
    build(tmp_path / "store", recipe(source), tokenizer)
    with pytest.raises(DataError, match=r"built with dedup = 'none', and is asked for with 'exact': give the new one"):
        build(tmp_path / "store", recipe(source, dedup="exact"), tokenizer)
    other = tmp_path / "other.json"
    other.write_text(Tokenizer.train(["quite another text"], vocab_size=270).file_text)
    with pytest.raises(DataError, match="tokenised with another tokenizer"):
        build(tmp_path / "store", recipe(source), other)
    ends = Tokenizer.load(tokenizer, end_of_document="d")
    with pytest.raises(DataError, match=rf"documents end with token 0, .* {ends.end_of_document_id}, 'd' \(end_of_doc"):
        build_from_recipe(tmp_path / "store", recipe(source), ends, runner=in_this_process, tell=print)


def test_a_field_that_is_missing_is_told_before_a_task_runs(source: Path, tokenizer: Path, tmp_path: Path):
    (source / "z.json").write_text('[{"content": "x"}]')

    def none_runs(*_: Any) -> Iterator[Any]:
        raise AssertionError("a task was given out")

    with pytest.raises(DataError, match=r"z\.json, row 0 \(from 0\): no field 'text'; there are: 'content'"):
        build(tmp_path / "store", recipe(source), tokenizer, runner=none_runs)


def test_no_cluster_is_asked_before_the_source_was_looked_at(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def asked(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(launch_build, "_cluster", asked)
    how: dict[str, Any] = {"tokenizer": str(tokenizer), "root": str(tmp_path), "tell": lambda line: None}
    with pytest.raises(DataError, match="line 1: no field 'body'; there are: 'text'"):
        build_data("one", sources=[str(source)], text_field="body", **how)
    with pytest.raises(InterruptedError):
        build_data("one", sources=[str(source)], **how)
    build(tmp_path / "data/one", recipe(source, heldout_fraction=0.05), tokenizer)
    assert build_data("one", sources=[str(source)], **how).train.documents > 0


def test_what_is_left_out_is_judged_when_all_is_tokenised(source: Path, tokenizer: Path, tmp_path: Path):
    (source / "c.txt").write_bytes(b"\xff\xff" * 5000)
    with pytest.raises(DataError, match=r"more than data\.max_left_out = 0\.1"):
        build(tmp_path / "store", recipe(source), tokenizer)
    assert not (tmp_path / "store/manifest.json").exists()
    assert build(tmp_path / "store", recipe(source), tokenizer, max_left_out=0.9).left_out[0].reason == "not utf-8"


def test_more_held_out_text_than_a_run_can_use_is_refused_at_once(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_build, "MOST_HELDOUT_BYTES", 500)
    with pytest.raises(
        DataError, match=r"heldout_fraction = 0\.2 would hold out more than .* set it to 0\.0\d+ or less"
    ):
        build(tmp_path / "store", recipe(source), tokenizer)


def test_a_folder_with_files_of_somebodys_own_is_refused_and_stays_as_it_is(
    source: Path, tokenizer: Path, tmp_path: Path
):
    mine = tmp_path / "model"
    mine.mkdir()
    for name in ("tokenizer.json", "train-00000.bin"):
        (mine / name).write_text("mine")
    with pytest.raises(DataError, match=r"model is not empty and .*, but tokenizer\.json, train-00000\.bin: .*its own"):
        build(mine, recipe(source), tokenizer)
    assert {path.name: path.read_text() for path in mine.iterdir()} == dict.fromkeys(
        ["tokenizer.json", "train-00000.bin"], "mine"
    )
    (tmp_path / "other/building").mkdir(parents=True)
    (tmp_path / "other/building/plan.txt").write_text("mine")
    with pytest.raises(DataError, match=r"but building/: "):
        build(tmp_path / "other", recipe(source), tokenizer)


def test_a_build_that_failed_at_its_first_part_goes_on(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its claim is gone then, and of its shards no part knows."""

    def fail(part: Part) -> bytes:
        raise InterruptedError

    with monkeypatch.context() as broken, pytest.raises(InterruptedError):
        broken.setattr(Part, "to_json", fail)
        build(tmp_path / "store", recipe(source), tokenizer)
    assert (tmp_path / "store/train-00000.bin").exists()
    # As a writer leaves it that was killed.
    (tmp_path / "store/.tmp-train-00000.bin-dead").write_bytes(b"half")
    assert build(tmp_path / "store", recipe(source), tokenizer).train.documents
    assert not list((tmp_path / "store").glob(".tmp-*"))


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_file_of_two_sources_is_refused(source: Path, tokenizer: Path, tmp_path: Path, dedup: str):
    files = source / "*.jsonl"
    with pytest.raises(
        DataError, match=r"a\.jsonl is in the source '.*/source' and in the source '.*/\*\.jsonl': each"
    ):
        build(tmp_path / "store", recipe(source, files, dedup=dedup), tokenizer)
    with pytest.raises(DataError, match=r"a\.jsonl is in the source '.*/source' and in the source '.*/source'"):
        build(tmp_path / "store", recipe(source, source, dedup=dedup), tokenizer)


def test_nodes_that_leave_a_build_take_no_more_than_their_own_tasks(monkeypatch: pytest.MonkeyPatch):
    """Ray's own functions replaced, so that the cluster shrinks when it should."""
    cpus = iter([4, 4, *[1] * 40])
    cluster = SimpleNamespace(
        put=lambda given: given,
        remote=lambda **_: lambda function: SimpleNamespace(remote=lambda task, work, item: item),
        cluster_resources=lambda: {"CPU": next(cpus)},
        wait=lambda running, num_returns: (running[:1], running[1:]),
        get=lambda reference: reference,
        is_initialized=lambda: False,
    )
    monkeypatch.setattr(ray_tasks, "ray", cluster)
    done: Any = ray_tasks.on_ray(lambda work, item: item, None, range(20))  # pyright: ignore[reportArgumentType]
    assert sorted(done) == list(range(20))


def test_a_shard_that_is_not_there_at_the_end_is_missed(source: Path, tokenizer: Path, tmp_path: Path):
    """As where each node has a folder of its own at the store's path."""

    def elsewhere(task: Any, work: Any, items: Sequence[Any]) -> Generator[Any]:
        for item in items:
            yield task(work, item)
        (tmp_path / "store/train-00001.bin").unlink()

    with pytest.raises(DataError, match=r"train-00001\.bin is not what its task wrote there .*file system that all of"):
        build(tmp_path / "store", recipe(source), tokenizer, runner=elsewhere)


def test_a_damaged_part_is_not_used():
    text = b"AAAAAAAAAAA=\n{}"
    with pytest.raises(DataError, match=r"parts/x\.json is damaged: its checksum is another; delete it"):
        Part.parse(text, "parts/x.json")


def test_a_mistake_in_the_command_is_said_before_anything_starts(source: Path, tokenizer: Path, tmp_path: Path):
    def ask(**fields: Any) -> None:
        given = {"sources": [str(source)], "tokenizer": str(tokenizer), "root": str(tmp_path), **fields}
        build_data("web", tell=print, **given)

    with pytest.raises(ConfigError, match=r"no tokenizer is given.*--tokenizer.*let `raynium train` build the store"):
        ask(tokenizer=None)
    for fraction, rule in ((0.0, "greater than 0"), (1.0, "less than 1"), (float("nan"), "less than 1")):
        with pytest.raises(ConfigError, match=f"heldout_fraction = {fraction}: Input should be {rule}"):
            ask(heldout_fraction=fraction)
    with pytest.raises(
        DataError, match=r"tokenizer '.*/source' cannot be read: it is a folder without a tokenizer\.json"
    ):
        ask(tokenizer=str(source))
    with pytest.raises(ConfigError, match=r"the source '.*' holds the store, '.*/source/runs/data/web'"):
        ask(root=str(source / "runs"))
    assert not (tmp_path / "data").exists()


# ---- names and words -------------------------------------------------------------------------------------------------


def test_a_name_lies_under_the_root_and_a_path_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAYNIUM_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert store_place("web", "runs") == f"{tmp_path}/runs/data/web"
    assert store_place("web", "s3://bucket/runs/") == "s3://bucket/runs/data/web"
    assert store_place("./web", "s3://bucket/runs") == f"{tmp_path}/web"
    assert store_place("s3://bucket/web", "runs") == "s3://bucket/web"


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "...", "a\0b", "x" * 65, "\udcff"])
def test_a_name_that_no_mixture_takes_is_no_name_of_a_store(name: str):
    with pytest.raises(ConfigError, match=r"the store is '.*': a name is 1 to 64 of letters.*or give a path"):
        store_place(name, "runs")


def test_a_store_is_verified_by_name(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    build(tmp_path / "runs/data/web", recipe(source), tokenizer)
    command = ("data", "verify", "web", "--root", str(tmp_path / "runs"))
    ended = run_command(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.code == 0 and ended.out.startswith(f"{tmp_path}/runs/data/web is whole: ")


def test_a_store_of_a_mixture_that_is_not_there_is_built_by_a_command(tmp_path: Path):
    alone = ["run.name=x", f"run.root={tmp_path}", "data.path=null", "data.source=null"]
    config = resolve(load_config("quickstart", [*alone, "data.mixture=[{store: web, weight: 1}]"]))
    for ask in (lambda: check_stores(config, tell=print), lambda: fetch_stores(config.data, tmp_path / "cache")):
        with pytest.raises(
            DataError, match=r"mixture's store '.*/data/web' is no .*: it has no .*`raynium data build`"
        ):
            ask()


def test_a_store_says_what_it_holds(source: Path, tokenizer: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is no document store"):
        describe(str(tmp_path / "store"))
    build(tmp_path / "store", recipe(source, dedup="exact"), tokenizer)
    rows = describe(str(tmp_path / "store"))
    words = dict(rows)
    assert re.fullmatch(r"\d+ to train on, \d+ held out", words["documents"])
    assert "duplicates dropped" in words["recipe"] and "equal to an earlier document" in words["left out"]
    samples = [value for name, value in rows if name == "sample"]
    assert len(samples) == 3 and all(sample.startswith("'document number ") for sample in samples)
    shard = tmp_path / "store/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged in unit 0 of .*so it is not shown"):
        describe(str(tmp_path / "store"))


def test_reading_ahead_keeps_order_and_passes_on_what_is_raised():
    def failing() -> Iterator[int]:
        yield from range(3)
        raise StoreError("gone")

    seen: list[int] = []
    with pytest.raises(StoreError, match="gone"):
        seen.extend(ahead(failing()))
    assert list(ahead(iter(range(5)))) == list(range(5)) and seen == [0, 1, 2]
