"""One MLflow run across attempts: made, re-opened, changed, ended; where it is kept; and what must never be written."""

import json
import os
import pwd
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
import urllib.request
import warnings
from pathlib import Path

import boto3
import pytest
from s3_server import S3Server

from raynium.errors import ConfigError, TrackingError
from raynium.storage.store import Store
from raynium.tracking.client import ArtifactsAway, check_reachable, mlflow_client, redact, sqlite_path
from raynium.tracking.provenance import flatten_config, is_secret_name, origin_tags, provenance_tags
from raynium.tracking.runs import (
    TrackedRun,
    finish_run,
    log_artifact_text,
    log_dataset,
    open_run,
    page_url,
    read_metric,
    resolve_uri,
    set_tags,
    ui_command,
    ui_environment,
)
from raynium.tracking.sender import MlflowTracker

VIEW = "?workflowType=machine_learning"
CONFIG = {"train": {"steps": 5, "lr": 3e-4}, "sample": {"prompts": ["a", "b"]}, "tracking": {"uri": None}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('root # with? 50%25 ü [a]')}/mlflow.db"


def open_test_run(uri: str, *, run_id: str | None = None, params: dict | None = None, **tags: str) -> TrackedRun:
    return open_run(uri, experiment="tests", run_name="first", run_id=run_id, params=params or CONFIG, tags=tags)


def stored(uri: str, run_id: str):
    with mlflow_client(uri, timeout_seconds=10) as client:
        return client.get_run(run_id)


# ---- where -----------------------------------------------------------------------------------------------------------


def test_store_is_config_then_environment_then_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert resolve_uri("https://config:1", "runs") == "https://config:1"
    assert resolve_uri(None, "s3://bucket/prefix") == "http://env:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri(None, "file:///data/runs") == "sqlite:////data/runs/mlflow.db"
    assert resolve_uri("sqlite:///some/m.db", "runs") == f"sqlite:///{tmp_path}/some/m.db"
    assert resolve_uri("postgresql+psycopg2://u:p@db/x", "runs") == "postgresql+psycopg2://u:p@db/x"


def test_bucket_root_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"run\.root = s3://bucket/x.*Set tracking\.uri or MLFLOW_TRACKING_URI"):
        resolve_uri(None, "s3://bucket/x")


@pytest.mark.parametrize("address", ["mlruns", "file:///data/mlruns", "sqlite://", "sqlite:///:memory:", "ftp://a:b@c"])
def test_stores_that_repeat_or_forget_points_are_refused(address: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=re.escape(f"tracking.uri = {redact(address)}: not a store")):
        resolve_uri(address, "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI = "):
        resolve_uri(None, "runs")


def test_sqlite_file_that_cannot_be_used_is_named_at_once(tmp_path: Path):
    with pytest.raises(TrackingError, match=r"nowhere does not exist"):
        check_reachable(f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    (tmp_path / "text.db").write_text("not a database " * 100)
    with pytest.raises(TrackingError, match=r"text\.db: file is not a database"):
        check_reachable(f"sqlite:///{tmp_path}/text.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(TrackingError, match="unable to open database file"):
        check_reachable(f"sqlite:///{tmp_path}/folder.db")


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_the_same_run_goes_on_over_attempts(uri: str):
    run = open_test_run(uri, host="a")
    finish_run(uri, run.run_id, "FAILED")
    assert stored(uri, run.run_id).info.status == "FAILED"
    again = open_test_run(uri, run_id=run.run_id, host="b")
    assert again == run
    data = stored(uri, run.run_id)
    assert (data.info.status, data.info.run_name, data.data.tags["host"]) == ("RUNNING", "first", "b")
    assert data.data.params["train.steps"] == "5"
    finish_run(uri, run.run_id, "FINISHED")
    assert stored(uri, run.run_id).info.status == "FINISHED"


def test_changed_settings_of_a_resume_are_tags_and_go_when_changed_back(uri: str):
    run = open_test_run(uri)
    changed = {"train": {"steps": 9, "lr": 3e-4, "new": 1}}
    open_test_run(uri, run_id=run.run_id, params=changed)
    data = stored(uri, run.run_id).data
    assert (data.params["train.steps"], data.tags["changed.train.steps"]) == ("5", "9")
    assert data.params["train.new"] == "1"
    assert "changed.train.lr" not in data.tags
    open_test_run(uri, run_id=run.run_id)
    assert "changed.train.steps" not in stored(uri, run.run_id).data.tags


def test_many_and_long_params_fit_mlflow_and_resume_without_a_change(uri: str):
    params = {f"p{index}": index for index in range(250)} | {"long": "x" * 7000}
    run = open_test_run(uri, params=params, note="y" * 9000)
    open_test_run(uri, run_id=run.run_id, params=params)
    data = stored(uri, run.run_id).data
    assert len(data.params) == 251
    assert data.params["long"].endswith("x… (7000 characters; the whole is in the run's artifacts)")
    assert data.tags["note"].endswith("y… (9000 characters; the whole is in the run's artifacts)")
    assert not [name for name in data.tags if name.startswith("changed.")]


def test_tags_are_set_over_what_they_were_and_hold_no_credentials(uri: str):
    run = open_test_run(uri, note="first")
    set_tags(uri, run.run_id, {"note": "second", "server": "https://me:secret@mlflow.example", "long": "x" * 9000})
    tags = stored(uri, run.run_id).data.tags
    assert tags["note"] == "second" and "secret" not in tags["server"]
    assert tags["long"].endswith("(9000 characters; the whole is in the run's artifacts)")


def test_artifacts_lie_beside_the_database_and_not_in_the_current_folder(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run = open_test_run(uri)
    log_artifact_text(uri, run.run_id, "samples/end.txt", "text é")
    (file,) = (sqlite_path(uri).parent / "mlartifacts").rglob("end.txt")
    assert file.read_text() == "text é"
    assert list(tmp_path.iterdir()) == []


def open_with_artifacts_at(location: str, folder: Path) -> TrackedRun:
    uri = f"sqlite:///{folder}/mlflow.db"
    with mlflow_client(uri, timeout_seconds=10) as client:
        client.create_experiment("team", artifact_location=location)
    return open_run(uri, experiment="team", run_name="x", run_id=None, params={}, tags={})


@pytest.mark.parametrize(
    ("location", "missing", "told"),
    [
        (
            "s3://bucket/mlflow",
            "boto3",
            r"kept in s3://bucket/mlflow/.*boto3.*pip install boto3 here.*--serve-artifacts",
        ),
        (
            "gs://bucket/mlflow",
            "google.cloud",
            r"kept in gs://bucket/mlflow/.*pip install .*or start the MLflow server",
        ),
        ("file:///proc/mlflow", "", r"kept in file:///proc/mlflow/.*This folder is looked for on this machine"),
        ("s3://bucket/mlflow", "", r"kept in s3://bucket/mlflow/.*EndpointConnectionError.*this machine's credentials"),
    ],
)
def test_a_store_of_artifacts_that_fails_is_named_and_costs_no_metric(
    location: str, missing: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_with_artifacts_at(location, tmp_path)
    # It keeps the credentials that it has found.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ArtifactsAway, match=told):
        log_artifact_text(run.uri, run.run_id, "config.yaml", "a: 1")
    tracker = MlflowTracker(tmp_path / "spool", uri=run.uri, run_id=run.run_id, flush_seconds=0.05)
    tracker.artifact("ledger.json", "{}")
    while tracker.status().artifacts_pending == 0:
        time.sleep(0.01)
    tracker.append({"train/loss": 1.0}, step=1, unix_ms=1)
    left = tracker.close(timeout_seconds=60)
    assert (left.points_pending, left.artifacts_pending, left.last_error) == (0, 1, None)
    assert [point.step for point in read_metric(run.uri, run.run_id, "train/loss")] == [1]


@pytest.mark.s3
def test_artifacts_go_to_s3_with_what_the_package_brings(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    bucket = s3_server.create_bucket("artifacts-of-mlflow")
    run = open_with_artifacts_at(f"{bucket}/mlflow", tmp_path)
    log_artifact_text(run.uri, run.run_id, "config.yaml", "a: 1")
    assert Store(f"{bucket}/mlflow/{run.run_id}/artifacts").read("config.yaml") == b"a: 1"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert "boto3" in project["dependencies"]


def test_deleted_runs_and_experiments_say_how_to_restore(uri: str):
    run = open_run(uri, experiment="gone", run_name="x", run_id=None, params={}, tags={})
    with mlflow_client(uri, timeout_seconds=10) as client:
        client.delete_run(run.run_id)
    with pytest.raises(TrackingError, match=f"mlflow runs restore --run-id {run.run_id}"):
        open_test_run(uri, run_id=run.run_id)
    with mlflow_client(uri, timeout_seconds=10) as client:
        client.delete_experiment(run.experiment_id)
    with pytest.raises(TrackingError, match=f"mlflow experiments restore -x {run.experiment_id}"):
        open_run(uri, experiment="gone", run_name="x", run_id=None, params={}, tags={})


def test_what_mlflow_refuses_is_told(uri: str):
    with pytest.raises(TrackingError, match="Invalid experiment name"):
        open_run(uri, experiment="", run_name="x", run_id=None, params={}, tags={})
    with pytest.raises(TrackingError, match=r"not found.*check tracking\.uri"):
        read_metric(uri, "0" * 32, "train/loss")


def test_an_older_database_names_the_upgrade(uri: str, tmp_path: Path):
    check_reachable(uri)
    shutil.copyfile(sqlite_path(uri), tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'cfd24bdc0731'")
    connection.close()
    code = "import sys; from raynium.tracking.client import check_reachable; check_reachable(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=False)
    assert "TrackingError" in done.stderr
    assert "run `mlflow db upgrade`" in done.stderr


def test_no_points_is_an_empty_list(uri: str):
    assert read_metric(uri, open_test_run(uri).run_id, "train/loss") == []


# ---- secrets and provenance ------------------------------------------------------------------------------------------


def test_secrets_reach_neither_params_nor_tags_nor_the_repr(uri: str):
    params = {"store": {"secret_key": "hunter2", "url": "https://me:hunter2@host/x?token=hunter2&a=b"}}
    run = open_test_run(uri, params=params, origin="https://me:hunter2@git.example/repo")
    data = stored(uri, run.run_id).data
    assert data.params == {"store.secret_key": "***", "store.url": "https://***@host/x?token=***&a=b"}
    assert data.tags["origin"] == "https://***@git.example/repo"
    assert "hunter2" not in repr(TrackedRun("r", "e", "http://me:hunter2@h"))


def test_failures_do_not_print_the_password():
    with pytest.raises(TrackingError) as caught:
        check_reachable("http://me:hunter2@127.0.0.1:9", timeout_seconds=2)
    assert "hunter2" not in str(caught.value)
    assert "***@127.0.0.1:9" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "a.db_password",
        "aws_secret_access_key",
        "AWS-Access-Key-ID",
        "x.api_key",
        "apikey",
        "hf_token",
        "token",
    ],
)
def test_names_of_secrets(name: str):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["data.tokenizer", "tokens", "eos_token", "train.tokens_per_step", "num_kv_heads", "key"]
)
def test_names_that_only_look_like_secrets(name: str):
    assert not is_secret_name(name)


def test_unset_secret_stays_visibly_unset():
    assert flatten_config({"a": {"password": None}, "b": {}}) == {"a.password": "None"}


def test_provenance_tells_commit_and_whether_it_was_changed(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert "git.dirty" not in provenance_tags(tmp_path, accelerator="cpu")
    git("init", "-q")
    assert "git.dirty" not in provenance_tags(tmp_path, accelerator="cpu"), "a checkout without a commit has none"
    (tmp_path / "job.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    tags = provenance_tags(tmp_path, accelerator="neuron")
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "new.py").write_text("")
    assert provenance_tags(tmp_path, accelerator="neuron")["git.dirty"] == "true"
    assert tags["accelerator"] == "neuron"
    assert tags["host"] == socket.gethostname()
    assert re.match(r"\d+\.\d+", tags["version.torch"]) and re.match(r"\d+\.\d+", tags["version.mlflow"])


def test_the_page_names_user_and_command_and_no_secret_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys, "argv", ["/x/raynium", "train", "my run.yaml", "tracking.uri=http://me:pw@h", "storage.secret_key=abc"]
    )
    monkeypatch.setenv("LOGNAME", "anna")
    tags = origin_tags(tmp_path)
    command = "raynium train 'my run.yaml' 'tracking.uri=http://***@h' 'storage.secret_key=***'"
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == ("anna", command)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert origin_tags(tmp_path)["mlflow.user"] == str(os.getuid()), "a container's user may have no name"


def test_the_document_store_is_the_runs_input(uri: str):
    run = open_test_run(uri)
    for _ in range(2):
        facts = {"tokens": 15}
        log_dataset(uri, run.run_id, path="s3://bucket/stores/books/", identity="ab" * 32, facts=facts)
    (given,) = stored(uri, run.run_id).inputs.dataset_inputs
    dataset = given.dataset
    assert (dataset.name, dataset.digest, dataset.source_type) == ("books", "ab" * 18, "s3")
    assert json.loads(dataset.source) == {"uri": "s3://bucket/stores/books/"}
    assert json.loads(dataset.profile) == {"identity": "ab" * 32, "tokens": 15}


def test_provenance_works_without_git_and_without_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from raynium.tracking import provenance

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    tags = provenance_tags(tmp_path, accelerator="cpu")
    assert tags["version.no-such-package"] == "not installed"
    assert "git.dirty" not in tags


# ---- the library's manners -------------------------------------------------------------------------------------------


def run_quietly(code: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """stdout of a fresh interpreter that must not write to stderr."""
    plain = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    command = [sys.executable, "-W", "default", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=plain | (env or {}), check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def test_importing_tracking_loads_neither_mlflow_nor_torch_nor_ray():
    modules = "client, metrics, provenance, runs, sender, spool, tracker"
    code = f"import sys\nfrom raynium.tracking import {modules}\n"
    assert run_quietly(code + "sys.stdout.write(str({'mlflow', 'torch', 'ray'} & set(sys.modules)))") == "set()"


def test_first_use_is_silent_and_sends_no_telemetry(tmp_path: Path):
    code = (
        "import logging, os, sys\nlogging.basicConfig(level=logging.INFO)\n"
        "from raynium.tracking.runs import open_run\n"
        "open_run(sys.argv[1], experiment='e', run_name='r', run_id=None, params={'a': 1}, tags={})\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "sys.stdout.write(f'{get_telemetry_client()} {os.environ[\"MLFLOW_DISABLE_TELEMETRY\"]}')\n"
    )
    assert run_quietly(code, f"sqlite:///{tmp_path}/mlflow.db") == "None true"


def test_telemetry_of_an_mlflow_imported_before_us_is_stopped(uri: str, monkeypatch: pytest.MonkeyPatch):
    from mlflow.telemetry import client as telemetry

    monkeypatch.setattr(telemetry, "_MLFLOW_TELEMETRY_CLIENT", object())
    check_reachable(uri)
    assert telemetry.get_telemetry_client() is None


def test_two_processes_may_make_the_same_database_at_once(tmp_path: Path):
    code = (
        "import sys\nfrom raynium.tracking.runs import open_run\n"
        "run = open_run(sys.argv[1], experiment='e', run_name='r', run_id=None, params={'a': 1}, tags={})\n"
        "sys.stdout.write(run.experiment_id)\n"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]


@pytest.mark.slow
def test_killed_while_the_database_is_made_the_next_start_succeeds(tmp_path: Path):
    """Killed at several points of the migrations; mlflow alone would leave a file that cannot be opened again."""
    code = (
        "import os, sys, threading, time\nfrom raynium.tracking import client\n"
        "client._load_mlflow()\nimport mlflow.store.tracking.sqlalchemy_store\n"
        "timer = threading.Timer(float(sys.argv[2]), os._exit, (9,))\ntimer.start()\n"
        "client.check_reachable(sys.argv[1])\ntimer.cancel()\n"
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for seconds in (0.4, 0.8):
        subprocess.run([sys.executable, "-c", code, uri, str(seconds)], check=False)
    open_test_run(uri)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_page_of_a_server_is_its_own_without_credentials(monkeypatch: pytest.MonkeyPatch, uri: str):
    assert page_url("http://127.0.0.1:5000/", "3", "ab") == f"http://127.0.0.1:5000/#/experiments/3/runs/ab{VIEW}"
    with pytest.raises(TrackingError, match=r"https://\*\*\*@h:1 is not a local store"):
        ui_command("https://me:pw@h:1")


def test_mlflows_variables_are_no_options_of_the_ui_that_we_start(monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings(action="ignore"):
        from mlflow.cli import server

    options = {name for option in server.params for name in [option.envvar] if isinstance(name, str)}
    assert {"MLFLOW_HOST", "MLFLOW_PORT", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_STATIC_PREFIX"} <= options
    for name in (*options, "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://elsewhere")
    assert not options & set(ui_environment()) and ui_environment()["MLFLOW_S3_ENDPOINT_URL"] == "http://elsewhere"


def test_ui_command_shows_the_run_its_metrics_and_artifacts(uri: str, tmp_path: Path):
    run = open_test_run(uri)
    log_artifact_text(uri, run.run_id, "config.yaml", "x: 1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    base = f"http://127.0.0.1:{port}"

    def get(path: str) -> bytes:
        with urllib.request.urlopen(base + path, timeout=60) as response:
            return response.read()

    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            ui_command(uri, port=port),
            env=ui_environment(),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(1800):
            try:
                get("/health")
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        assert b"<html" in get("/")
        answer = json.loads(get(f"/api/2.0/mlflow/runs/get?run_id={run.run_id}"))
        assert answer["run"]["info"]["run_name"] == "first"
        assert get(f"/get-artifact?path=config.yaml&run_uuid={run.run_id}") == b"x: 1"
        same = open_test_run(base, run_id=run.run_id)
        assert same.experiment_id == run.experiment_id
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
