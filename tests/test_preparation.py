"""Bad input, one by one: an error with the field, the value, the rule and the remedy; nothing stands in the way after.

Everything is real but Ray: files, the document store, the MLflow store. Each test has a run of its own under one root.
"""

import getpass
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import Server
from tiny import build_documents, job_text

from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.manifest import FileEntry, SavedBlock, SavedBlocks, ShardEntry, shard_key, step_folder
from raynium.checkpoint.state import checkpoint_state
from raynium.config.load import load_config, parse_config
from raynium.config.paths import OUR_NAMES, OUR_PREFIXES
from raynium.config.schema import Config
from raynium.data.store import TOKENIZER_NAME, open_store
from raynium.data.tokenizer import Tokenizer
from raynium.errors import ConfigError, DataError, RayniumError, RunInUse, StoreError, TrackingAway, TrackingError
from raynium.launch import preparation
from raynium.launch import run as run_module
from raynium.launch.preparation import Prepared, checked, finished_record, prepare, survey_data
from raynium.models.decoder import Decoder
from raynium.node.compile_cache import FOLDER
from raynium.run import record as record_module
from raynium.run.past import Past, run_store
from raynium.run.record import RECORD_KEY, RunRecord, claim, read_record
from raynium.storage.checksum import UNIT_BYTES, checksum, to_text
from raynium.storage.store import Store
from raynium.tracking.client import mlflow_client
from raynium.tracking.runs import TrackedRun, _artifact_location, finish_run, resolve_uri

# What a run record's config has at least.
LEAST = {"run": {"root": "runs"}, "train": {"steps": 1}}
JOB = job_text({"train.steps": 6, "data.path": None})
run_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of all runs of this file, with a document store in `data`; its MLflow store is made once."""
    folder = tmp_path_factory.mktemp("root")
    build_documents(folder)
    return folder


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAYNIUM_HOME", raising=False)


def finished(config: Config) -> RunRecord | None:
    return finished_record(config, Past.read(config))


class Attempt:
    """A call is what a driver does before it asks for a node, for one run of its own. `told`: what it said."""

    def __init__(self, root: Path, name: str):
        self.root = root
        self.name = name
        self.told: list[str] = []

    def config(self, **changes: Any) -> Config:
        own = {"run.root": str(self.root), "run.name": self.name, "data.path": str(self.root / "data")}
        return checked(parse_config(JOB, own | changes))

    def __call__(self, **changes: Any) -> Prepared:
        config = self.config(**changes)
        past = Past.read(config)
        surveyed = survey_data(config, past, self.told.append)
        return prepare(config, past, surveyed=surveyed, job_id=None, tags={}, tell=self.told.append)

    def refused(self, kind: type[RayniumError], match: str, **changes: Any) -> str:
        """Tries with these changes, looks that nothing stands in the way of the next try, and returns the message."""
        with pytest.raises(kind, match=match) as caught:
            self(**changes)
        store = Store(self.root / self.name)
        found = read_record(store)
        assert found is None or found.state == "failed"
        assert not [key for key in store.list().sizes if "probe" in key]
        claim(store, self.name, LEAST).update(state="failed")  # the next try gets the name
        return str(caught.value)


@pytest.fixture
def attempt(root: Path) -> Attempt:
    return Attempt(root, f"run-{next(run_numbers)}")


# ------------------------------------------------------------------------------------------------- the config itself


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train.stepz": 3}, r"train\.stepz is not a field .*did you mean train\.steps"),
        ({"train.steps": "many"}, r"train\.steps is .*many.* must be a whole number of at least 1"),
        ({"train.global_batch_size": 3}, r"train\.global_batch_size is 3: it must be a multiple of 2 .* set 2 or 4"),
        ({"data.seq_len": 65}, r"data\.seq_len is 65, longer than model\.max_seq_len 64"),
        ({"parallel.tensor": 3}, r"parallel\.tensor is 3, which does not divide .*set parallel\.tensor to 1"),
        ({"parallel.tensor": 4, "model.num_heads": 4, "model.num_kv_heads": 4}, r"cluster\.ranks_per_node 2: tensor"),
        ({"model.vocab_size": 2**33}, r"model\.vocab_size is 8589934592: .* at most 32 bits"),
        ({"run.root": "s3://YOUR-BUCKET/runs"}, r"run\.root is 's3://YOUR-BUCKET/runs': YOUR-BUCKET stands for"),
    ],
)
def test_a_config_that_cannot_run_is_refused(attempt: Attempt, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        attempt(**changes)
    assert not (attempt.root / attempt.name).exists()


def test_all_places_of_a_preset_that_must_be_filled_in_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        checked(load_config("llama3-8b"))
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["run.root", "data.path", "data.tokenizer"]


def test_a_job_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"there is no job file 'jobs/none\.yaml' in .* Give the path of a YAML"):
        load_config("jobs/none.yaml")


# ------------------------------------------------------------------------------------------------- credentials


SECRETS = [
    ("tracking.uri", "https://anna:hunter2@mlflow.example.com/x", "MLFLOW_TRACKING_USERNAME and"),
    ("tracking.uri", "https://hunter2@mlflow.example.com", "MLFLOW_TRACKING_TOKEN"),
    ("tracking.uri", "postgresql://anna:hunter2@db/mlflow", "PGPASSWORD"),
    ("tracking.uri", "https://mlflow.example.com/?api_token=hunter2", "MLFLOW_TRACKING_TOKEN"),
    ("run.root", "s3://AKIA:hunter2@bucket/runs", "AWS_ACCESS_KEY_ID"),
    ("data.path", "s3://AKIA:hunter2@bucket/data", "AWS_ACCESS_KEY_ID"),
    ("data.source", "s3://AKIA:hunter2@bucket/text", "AWS_ACCESS_KEY_ID"),
    ("data.tokenizer", "https://anna:hunter2@host/tokenizer.json", "in the environment"),
]


@pytest.mark.parametrize(("field", "url", "remedy"), SECRETS)
def test_a_config_holds_no_credentials(attempt: Attempt, field: str, url: str, remedy: str) -> None:
    message = attempt.refused(ConfigError, "a URL that holds credentials", **{field: url})
    assert message.startswith(f"{field} is ") and remedy in message
    assert "hunter2" not in message


def test_credentials_of_the_home_folder_do_not_get_into_a_config_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYNIUM_HOME", "s3://AKIA:hunter2@bucket")
    with pytest.raises(ConfigError, match=r"run\.root is s3://\*\*\*@bucket…"):
        checked(parse_config(JOB, {"data.path": "data"}))


def test_credentials_in_the_environment_reach_neither_record_nor_terminal(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://anna:hunter2@mlflow.example.com:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    opened = TrackedRun("m1", "1", address)
    runs_asked_for: list[str | None] = []

    def open_run(uri: str, **options: Any) -> TrackedRun:
        assert uri == address
        runs_asked_for.append(options["run_id"])
        return opened

    monkeypatch.setattr(preparation, "open_run", open_run)
    monkeypatch.setattr(preparation, "check_reachable", lambda uri: None)
    monkeypatch.setattr(preparation, "log_artifact_text", lambda *arguments: None)
    prepared = attempt()
    prepared.keeper.update(state="stopped")
    assert prepared.keeper.record.mlflow_uri == "https://mlflow.example.com:5000"
    attempt()
    assert runs_asked_for == [None, "m1"], "the address without credentials is known again"
    for path in (attempt.root / attempt.name).rglob("*.*"):
        assert b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in str(attempt.told) + repr(prepared)


# ------------------------------------------------------------------------------------------------- data


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_text(Tokenizer.train(["quite another text"], vocab_size=260).file_text)
    return str(path)


def test_data_that_is_not_there_is_named(attempt: Attempt, tmp_path: Path) -> None:
    attempt.refused(DataError, "is no document store.*data.source", **{"data.path": str(tmp_path / "no")})
    told = attempt.refused(
        DataError, str(tmp_path / "text"),
        **{"data.path": str(tmp_path / "new"), "data.source": str(tmp_path / "text")},
    )  # fmt: skip
    assert not (tmp_path / "new" / "manifest.json").exists(), told


def test_data_without_text_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    changes = {"data.path": str(tmp_path / "new"), "data.source": str(tmp_path / "text")}
    attempt.refused(DataError, "text", **changes)
    (tmp_path / "text" / "empty.txt").write_text("")
    attempt.refused(DataError, "text", **changes)


def test_data_shorter_than_a_sample_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(10):
        (tmp_path / "text" / f"{number}.txt").write_text("ab")
    changes = {"data.path": str(tmp_path / "new"), "data.source": str(tmp_path / "text"), "data.heldout_fraction": 0.5}
    match = r"has at most \d+ training tokens; one sample takes data\.seq_len \+ 1 = 65"
    attempt.refused(DataError, match, **changes, **{"data.seq_len": 64})


def test_a_store_of_another_tokenizer_is_refused(attempt: Attempt, other_tokenizer: str) -> None:
    attempt.refused(DataError, "another tokenizer.*remove data.tokenizer", **{"data.tokenizer": other_tokenizer})


def test_a_vocabulary_smaller_than_the_stores_is_refused(attempt: Attempt) -> None:
    attempt.refused(DataError, "vocab_size", **{"model.vocab_size": 300})


def text_of(folder: Path, *, files: int = 60) -> str:
    folder.mkdir()
    for number in range(files):
        (folder / f"{number}.txt").write_text(f"text {number} says hello again and again")
    return str(folder)


BAD_DATA = [
    ("a source that is not there", {"data.source": "absent"}, "there is no such folder or file"),
    ("a malformed line", {"data.source": "lines"}, r"a\.jsonl, line 2: not JSON"),
    ("text that would be lost", {"data.source": "latin"}, "would lose .* more than data.max_left_out = 0.1"),
    (
        "a tokenizer that is not there",
        {"data.source": "text", "data.tokenizer": "absent.json"},
        "there is no such file",
    ),
    ("an end without a tokenizer", {"data.source": "text", "data.end_of_document": "x"}, "names a token of data.tok"),
    ("a small vocabulary", {"data.source": "text", "model.vocab_size": 200}, "has at least 257 tokens"),
    ("neither store nor source", {}, "is no document store.*set data.source"),
    ("a store whose manifest is a pipe", {"data.path": "piped"}, "manifest.json cannot be read: it is a pipe"),
]


@pytest.mark.parametrize(("changes", "match"), [row[1:] for row in BAD_DATA], ids=[row[0] for row in BAD_DATA])
def test_bad_data_is_told_before_ray_mlflow_or_a_record_exist(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], match: str
) -> None:
    text_of(tmp_path / "text")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped/manifest.json")
    places = {name: str(tmp_path / place) for name, place in changes.items() if name in PLACES}
    config = attempt.config(**{"data.path": str(tmp_path / "new")} | changes | places)
    for name in ("connect", "prepare"):
        monkeypatch.setattr(run_module, name, None, raising=False)
    with pytest.raises(DataError, match=match):
        run_module.run(config, address=None)
    assert not (attempt.root / attempt.name).exists() and not (tmp_path / "new").exists()


PLACES = ("data.path", "data.source", "data.tokenizer")


def test_an_imported_model_is_not_given_a_store_of_another_tokenizer(attempt: Attempt, tmp_path: Path) -> None:
    places = {"data.path": str(tmp_path / "new"), "data.source": text_of(tmp_path / "text")}
    changes: dict[str, Any] = {**places, "data.heldout_fraction": 0.2}
    Tokenizer.train(["imported"], vocab_size=260).keep(Store(attempt.root / attempt.name))
    with pytest.raises(DataError, match=r"the run has a tokenizer, .*give that file as data\.tokenizer"):
        attempt(**changes)
    kept = f"{attempt.root}/{attempt.name}/{TOKENIZER_NAME}"
    assert attempt(**changes | {"data.tokenizer": kept}).documents[0].manifest.vocab_size == 260


def test_what_is_left_out_is_told_each_time(attempt: Attempt, tmp_path: Path) -> None:
    places = {"data.path": str(tmp_path / "new"), "data.source": text_of(tmp_path / "text")}
    changes: dict[str, Any] = {**places, "data.heldout_fraction": 0.2}
    (tmp_path / "text/a.csv").write_bytes(b"1,2")
    (tmp_path / "text/b.txt").write_bytes(b"\xff\xff")
    attempt(**changes).keeper.update(state="stopped")
    said = (
        "data: left out less than 1 % of its text: 1 .csv, which is not read (first: a.csv), 1 not UTF-8 (first: b.txt)"
    )
    assert said in attempt.told
    attempt.told.clear()
    attempt(**changes)
    assert said in attempt.told


# ------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db-wal", "mlartifacts", "compile-cache", "data"])
def test_a_run_does_not_take_a_name_of_ours(attempt: Attempt, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.name is '{name}': under run\.root that is Raynium's own"):
        attempt.config(**{"run.name": name})


@pytest.mark.parametrize("inside", ["", "/", "/checkpoints"])
def test_a_store_is_not_in_the_folder_of_a_run(attempt: Attempt, inside: str) -> None:
    place = f"{attempt.root}/{attempt.name}{inside}"
    with pytest.raises(ConfigError, match=r"data\.path is .* in the folder of run"):
        attempt.config(**{"data.path": place})
    attempt.config(**{"data.path": f"{attempt.root}/{attempt.name}-data"})


def test_names_of_ours_are_those_that_are_used() -> None:
    assert {FOLDER, Path(str(_artifact_location("sqlite:////x/mlflow.db"))).name} <= OUR_NAMES
    assert resolve_uri(None, "/x").rpartition("/")[2].startswith(OUR_PREFIXES)


def test_a_file_in_the_way_of_the_root_is_named(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    attempt.refused(StoreError, str(tmp_path / "file"), **{"run.root": str(tmp_path / "file")})


def test_a_disk_without_room_for_the_checkpoints_is_refused(attempt: Attempt) -> None:
    # 12 bytes for each of 400 G parameters, three times.
    wide = {"model.num_layers": 100_000_000, "data.path": str(attempt.root / "data")}
    attempt.refused(StoreError, r"bytes free and the run needs .*lower checkpoint\.keep_last", **wide)


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_told_before_anything_is_started(attempt: Attempt, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        attempt.refused(StoreError, "[Nn]o space left", **{"run.root": str(disk)})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_that_mlflow_knows_starts_while_it_is_away_and_opens_its_page_later(
    attempt: Attempt, mlflow_server: Server
) -> None:
    tracked = {"tracking.uri": mlflow_server.uri}
    first = attempt(**tracked)
    first.keeper.update(state="stopped")
    finish_run(mlflow_server.uri, first.mlflow.run_id, "FAILED")
    mlflow_server.kill()
    try:
        again = attempt(**tracked, **{"optimizer.learning_rate": 1e-4})
        assert again.mlflow == replace(first.mlflow, is_open=False)
        assert any("the run starts without its MLflow page" in line for line in attempt.told)
        with pytest.raises(TrackingAway):
            again.open_mlflow()
    finally:
        mlflow_server.start()
    assert again.open_mlflow() == first.mlflow
    run = MlflowClient(mlflow_server.uri).get_run(first.mlflow.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["changed.optimizer.learning_rate"] == "0.0001"


def test_the_page_names_data_size_and_budget_and_has_the_file_to_go_on_with(attempt: Attempt) -> None:
    prepared = attempt()
    with mlflow_client(prepared.mlflow.uri, timeout_seconds=10) as client:
        run = client.get_run(prepared.mlflow.run_id)
    count = sum(parameter.numel() for parameter in Decoder(prepared.config.model).parameters())
    assert run.data.params["parameters"] == str(count)
    assert run.data.params["token_budget"] == str(6 * 4 * 32), "steps, samples, tokens of each"
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "data" and prepared.documents[0].manifest.identity.startswith(given.dataset.digest)
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    # The page's last words: `raynium train <root>/<name>/config.yaml`.
    assert checked(load_config(str(attempt.root / attempt.name / "config.yaml"))) == prepared.config


def test_data_that_the_page_cannot_name_costs_the_page_only(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise TrackingError("no answer")

    monkeypatch.setattr(preparation, "log_dataset", refuse)
    assert attempt().mlflow.is_open
    assert "the MLflow page does not name the data: no answer" in attempt.told


def test_a_new_run_waits_for_an_mlflow_that_is_away(attempt: Attempt, mlflow_server: Server) -> None:
    mlflow_server.kill()
    back = threading.Timer(1, mlflow_server.start)
    back.start()
    try:
        assert attempt(**{"tracking.uri": mlflow_server.uri}).mlflow.is_open
    finally:
        back.join()
    assert "waiting for MLflow, for 40 s at most" in attempt.told[0]


@pytest.mark.timeout(200)  # mlflow's own patience is many minutes
@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "nobody answers"])
def test_an_mlflow_that_cannot_be_reached_is_told_in_seconds(
    attempt: Attempt, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "MLFLOW_WAIT_SECONDS", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        attempt.refused(TrackingError, f"MLflow at {address}: .*set tracking.uri", **{"tracking.uri": address})
    told = [line for line in attempt.told if not line.startswith("waiting for MLflow")]
    assert told == [], "no data is made for a run that could not report"


def test_a_bucket_needs_an_mlflow_of_its_own(attempt: Attempt) -> None:
    config = attempt.config(**{"run.root": "s3://bucket/x"})
    past = Past(Store(config.run.root), None, None, num_checkpoints=0)
    with pytest.raises(ConfigError, match=r"tracking\.uri is not set and run\.root"):
        prepare(config, past, surveyed=None, job_id=None, tags={}, tell=attempt.told.append)


# ------------------------------------------------------------------------------------------------- the run's past


DATA = bytes(4096) + b"12345678"  # a header, and two float32


def commit(store: Store, config: dict[str, Any], step: int) -> None:
    """A checkpoint that holds one number."""
    key = shard_key("g1", 0)
    store.replace(f"{step_folder(step)}/{key}", DATA)
    crc = to_text(checksum(DATA))
    file = FileEntry(key=key, size=len(DATA), crc64nvme=crc, unit_bytes=UNIT_BYTES, unit_crc64nvme=crc)
    block = SavedBlock(name="model/x", dtype="float32", global_shape=(2,), offsets=(0,), shape=(2,), begin=4096)
    commit_checkpoint(
        store, step=step, generation="g1", entries=[ShardEntry(step=step, file=file, tensors=SavedBlocks.of((block,)))],
        state={"step": step, "config": config}, world_size=1, layout={},
    )  # fmt: skip


def saved_run(attempt: Attempt, *, step: int = 4, state: str = "stopped", **changes: Any) -> Prepared:
    prepared = attempt(**changes)
    commit(prepared.store, prepared.config.model_dump(mode="json"), step)
    prepared.keeper.update(state=state, step=step)
    return prepared


def test_the_name_of_a_live_run_is_refused_and_the_run_is_left_alone(
    attempt: Attempt,
) -> None:
    live = attempt()
    before = live.store.read(RECORD_KEY)
    with pytest.raises(RunInUse, match=rf"is in use by process {os.getpid()} on .* Stop it with `raynium stop"):
        attempt()
    assert live.store.read(RECORD_KEY) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model.hidden_size": 64}, "model.hidden_size"),
        ({"run.seed": 7}, "run.seed"),
        ({"train.global_batch_size": 8}, "train.global_batch_size"),
    ],
)
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_config_that_contradicts_the_checkpoint_names_the_field(
    attempt: Attempt, changes: dict[str, Any], field: str, state: str
) -> None:
    saved = saved_run(attempt, step=6 if state == "finished" else 4, state=state)
    before = saved.store.read(RECORD_KEY)
    with pytest.raises(ConfigError, match=rf"{field} is .* but the checkpoint was trained with .* Set {field} back to"):
        if finished(attempt.config(**changes)) is None:
            attempt(**changes)
    assert saved.store.read(RECORD_KEY) == before


def test_fewer_steps_than_the_checkpoint_has_are_refused(attempt: Attempt) -> None:
    saved = saved_run(attempt, step=6, state="finished")
    assert finished(saved.config) is not None
    assert finished(attempt.config(**{"train.steps": 5})) is None
    with pytest.raises(
        ConfigError, match=r"train\.steps is 5, but run .* checkpoint of step 6\. Set train\.steps to 6"
    ):
        attempt(**{"train.steps": 5})


def test_a_change_that_is_allowed_is_told(attempt: Attempt) -> None:
    first = saved_run(attempt)
    attempt.told.clear()
    again = attempt(**{"optimizer.learning_rate": 1e-4, "checkpoint.every_steps": 2})
    assert [line for line in attempt.told if line.startswith("note")] == [
        "note: optimizer.learning_rate changed from 0.0003 to 0.0001: the rate changes from here on"
    ]
    assert again.mlflow.run_id == first.mlflow.run_id, "one MLflow run for the life of a run"
    record = read_record(again.store)
    assert record is not None and record.config["optimizer"]["learning_rate"] == 1e-4


# ------------------------------------------------------------------------------------------------- the run's data


@pytest.fixture
def other_data(tmp_path: Path) -> Path:
    """A store of other text, which lies beside it in `text`."""
    (tmp_path / "other").mkdir()
    return build_documents(tmp_path / "other", num_files=20)


def test_the_identity_of_the_data_is_in_config_record_and_page(attempt: Attempt) -> None:
    prepared = attempt()
    identity = open_store(attempt.root / "data").manifest.identity
    record = read_record(prepared.store)
    assert prepared.config.data.identity == identity and record is not None
    assert record.config["data"]["identity"] == checkpoint_state(prepared.config, 4)["config"]["data"]["identity"]
    client = MlflowClient(prepared.mlflow.uri)
    assert client.get_run(prepared.mlflow.run_id).data.params["data.identity"] == identity


def test_the_same_data_elsewhere_goes_on_without_a_word(attempt: Attempt, tmp_path: Path) -> None:
    saved_run(attempt)
    attempt.told.clear()
    shutil.copytree(attempt.root / "data", tmp_path / "copy")
    assert attempt(**{"data.path": str(tmp_path / "copy")}).documents[0].place == str(tmp_path / "copy")
    assert not [line for line in attempt.told if line.startswith("note")]


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_other_data_at_the_same_path_is_refused_with_both_identities(
    attempt: Attempt, other_data: Path, tmp_path: Path, state: str
) -> None:
    path = tmp_path / "data"
    shutil.copytree(attempt.root / "data", path)
    saved = saved_run(attempt, step=6 if state == "finished" else 4, state=state, **{"data.path": str(path)})
    before = saved.store.read(RECORD_KEY)
    shutil.rmtree(path)
    shutil.copytree(other_data, path)
    with pytest.raises(ConfigError, match=r"Give the data\.path of a store with the data of then") as caught:
        if finished(attempt.config(**{"data.path": str(path)})) is None:
            attempt(**{"data.path": str(path)})
    assert all(open_store(each).manifest.identity in str(caught.value) for each in (attempt.root / "data", path))
    assert saved.store.read(RECORD_KEY) == before


def test_a_finished_run_needs_its_data_no_more(attempt: Attempt, tmp_path: Path) -> None:
    shutil.copytree(attempt.root / "data", tmp_path / "data")
    saved_run(attempt, step=6, state="finished", **{"data.path": str(tmp_path / "data")})
    shutil.rmtree(tmp_path / "data")
    assert finished(attempt.config(**{"data.path": str(tmp_path / "data")})) is not None


def test_data_that_is_built_anew_from_other_text_is_refused(attempt: Attempt, other_data: Path, tmp_path: Path) -> None:
    saved_run(attempt)
    changes = {"data.path": str(tmp_path / "new"), "data.source": str(other_data.parent / "text")}
    with pytest.raises(ConfigError, match=r"data\.identity is .* but the checkpoint was trained with"):
        attempt(**changes)
    record = read_record(Store(attempt.root / attempt.name))
    assert record is not None and record.state == "failed" and "data.identity is" in (record.cause or "")


def test_a_config_that_names_other_data_than_is_there_is_refused(attempt: Attempt) -> None:
    match = r"holds other data \(identity \w{64}\) than data\.identity = '0{64}' says; give a data\.path with that data"
    attempt.refused(DataError, match, **{"data.identity": "0" * 64})
    attempt.refused(ConfigError, r"data\.identity is .*64 hex digits", **{"data.identity": "0"})


# ------------------------------------------------------------------------------------------------- what it makes


def test_a_prepared_run_has_all_that_later_ones_need(attempt: Attempt) -> None:
    prepared = attempt()
    assert parse_config(prepared.store.read("config.yaml").decode()) == prepared.config
    assert prepared.store.read(TOKENIZER_NAME) == (attempt.root / "data" / TOKENIZER_NAME).read_bytes()
    record = read_record(prepared.store)
    assert record is not None and record.state == "preparing" and record.mlflow_run_id == prepared.mlflow.run_id
    assert record.config == prepared.config.model_dump(mode="json")
    assert run_store(prepared.config).url == prepared.store.url


def heartbeat(run_folder: Path) -> float:
    return json.loads((run_folder / RECORD_KEY).read_text())["heartbeat_unix"]


def test_the_heart_beats_while_something_long_is_made(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host would take the run for dead after a minute of tokenising."""
    monkeypatch.setattr(record_module, "HEARTBEAT_SECONDS", 0.01)
    beats = []

    def long_work(*arguments: Any, **options: Any) -> None:
        deadline = time.monotonic() + 30
        while len(set(beats)) < 3:
            assert time.monotonic() < deadline
            beats.append(heartbeat(attempt.root / attempt.name))
        raise DataError("no")

    monkeypatch.setattr("raynium.launch.preparation.prepare_stores", long_work)
    with pytest.raises(DataError):
        attempt()


def test_ctrl_c_while_data_is_made_is_no_failure(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raynium.launch.preparation.prepare_stores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt()
    record = read_record(Store(attempt.root / attempt.name))
    assert record is not None and (record.state, record.cause) == ("stopped", None)


def test_a_heartbeat_that_is_lost_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = claim(Store(tmp_path / "run"), "test", LEAST)
    monkeypatch.setattr(record_module, "HEARTBEAT_SECONDS", 0.01)
    write = keeper._store.replace
    fails = iter([True, True, False])

    def sometimes(key: str, data: bytes) -> None:
        if next(fails, False):
            raise StoreError("throttled")
        write(key, data)

    monkeypatch.setattr(keeper._store, "replace", sometimes)
    began = keeper.record.heartbeat_unix
    with keeper.beating():
        deadline = time.monotonic() + 30
        while heartbeat(tmp_path / "run") == began:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert caplog.text.count("a heartbeat of run test was lost: throttled") == 2
