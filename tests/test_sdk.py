"""The Python SDK, against runs as a driver leaves them and a cluster that answers as Ray's dashboard does."""

import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny import job_text

import raynium
from raynium import Client, Run, find_run, list_runs, sdk
from raynium.config.load import load_config, parse_config
from raynium.errors import ConfigError, LaunchError, RunFailed, RunInUse, StoreError
from raynium.launch import jobs
from raynium.node.scratch import log_folder
from raynium.run.record import STOP_KEY, Owner, RecordKeeper, claim
from raynium.storage.store import Store
from raynium.tracking.client import mlflow_client
from raynium.tracking.runs import MetricPoint, open_run

pytestmark = pytest.mark.quick

JOB = job_text({"run.name": None, "cluster.ranks_per_node": None, "data.path": "data", "train.steps": 6})
CONFIG = {"run": {"root": "runs"}, "train": {"steps": 6}}
DEAD = Owner("elsewhere", "boot", 1, "1")


@pytest.fixture(autouse=True)
def quick_polls_and_a_plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk.run, "POLL_SECONDS", 0.01)
    monkeypatch.delenv("RAYNIUM_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def a_run(root: Path, name: str = "first", **changes: Any) -> RecordKeeper:
    keeper = claim(Store(root / name), name, CONFIG)
    keeper.update(**changes)
    return keeper


def die(keeper: RecordKeeper) -> None:
    """What a killed driver leaves: a record that says it runs, and no process."""
    record = replace(keeper.record, owner=DEAD, heartbeat_unix=0.0)
    keeper._store.replace("run.json", record.to_json())


class Jobs:
    """Ray's JobSubmissionClient as far as we use it. `states`: told one after the other, the last for ever."""

    def __init__(self, *states: str):
        self.states = list(states)
        self.submitted: list[dict[str, Any]] = []
        self.configs: list[str] = []

    def submit_job(self, **options: Any) -> str:
        self.submitted.append(options)
        self.configs.append(Path(options["runtime_env"]["working_dir"], "config.yaml").read_text())
        return options["submission_id"]

    def get_job_status(self, job_id: str) -> Any:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return SimpleNamespace(value=state)

    def get_job_logs(self, job_id: str) -> str:
        return "".join(f"line {number} of {job_id}\n" for number in range(100))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Client, Jobs]]:
    def connect(*states: str) -> tuple[Client, Jobs]:
        fake = Jobs(*states)
        monkeypatch.setattr(jobs, "connect_jobs", lambda address: fake)
        return Client("http://127.0.0.1:8265"), fake

    return connect


# ------------------------------------------------------------------------------------------------- names


def test_what_is_exported_is_what_can_be_imported() -> None:
    for name in raynium.__all__:
        assert getattr(raynium, name) is not None
    public = {name for name, value in vars(raynium).items() if not name.startswith("_") and callable(value)}
    assert public == set(raynium.__all__) and raynium.__all__ == sorted(raynium.__all__)


def test_a_run_is_found_below_the_current_folder_or_any_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path / "runs", step=3)
    assert find_run("first").record().step == 3
    assert find_run("first", str(tmp_path / "runs")).url == find_run("first", "runs/").url == find_run("first").url
    assert find_run("first", tmp_path / "runs").url == find_run("first").url
    assert find_run("first", "s3://bucket/runs").url == "s3://bucket/runs/first"
    with pytest.raises(StoreError, match=r"no run 'frist' at .* Check the name with `raynium runs`"):
        find_run("frist").record()
    with pytest.raises(ConfigError, match="two slashes"):
        find_run("first", "s3:/bucket")


def test_runs_are_listed_newest_first_and_what_is_no_run_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "runs"
    with pytest.raises(StoreError, match=r"there is no folder .*/runs: runs are where their run.root says"):
        list_runs("runs")
    root.mkdir()
    assert list_runs("runs") == list_runs(Path("runs")) == []
    for number, name in enumerate(("old", "new", "middle")):
        a_run(root, name, created_unix=float({"old": 1, "middle": 2, "new": 3}[name]), step=number)
    (root / "data").mkdir()
    (root / "a folder of somebody's").mkdir()
    (root / "mlflow.db").write_text("")
    Store(root / "damaged").replace("run.json", b"{")
    assert [record.name for record in list_runs("runs")] == ["new", "middle", "old"]
    assert "damaged/run.json is not a run record" in caplog.text


# ------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_waiting_for_a_run_that_has_ended_returns_its_record(tmp_path: Path, state: str) -> None:
    a_run(tmp_path / "runs", state=state, step=6)
    record = find_run("first").wait()
    assert (record.state, record.step) == (state, 6)


def test_waiting_returns_when_the_run_ends(tmp_path: Path) -> None:
    keeper = a_run(tmp_path / "runs", state="running")
    timer = threading.Timer(0.1, lambda: keeper.update(state="finished", step=6))
    timer.start()
    assert find_run("first").wait(60).step == 6
    timer.join()


def test_waiting_for_a_run_that_fails_raises_its_cause(tmp_path: Path) -> None:
    a_run(tmp_path / "runs", state="failed", cause="RunFailed: rank 1: killed by SIGKILL")
    with pytest.raises(RunFailed, match="run 'first' failed: RunFailed: rank 1: killed by SIGKILL"):
        find_run("first").wait()


def test_waiting_for_a_run_whose_driver_died_says_so(tmp_path: Path) -> None:
    die(a_run(tmp_path / "runs", state="running", step=3))
    with pytest.raises(RunFailed, match=r"its driver died at step 3\. Start it again to go on"):
        find_run("first").wait()


def test_a_job_that_runs_has_a_driver_whatever_the_clocks_say(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]]
) -> None:
    die(a_run(tmp_path, state="running", job_id="job-1", step=3))
    client, _ = cluster("RUNNING")
    run = Run("first", str(tmp_path / "first"), client, "job-1")
    with pytest.raises(TimeoutError):
        run.wait(0.05)
    client, _ = cluster("FAILED")
    with pytest.raises(RunFailed, match="its driver died at step 3"):
        replace(run, client=client).wait()


def test_an_answer_that_is_lost_while_waiting_is_asked_for_again(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path, state="finished", job_id="job-1", step=6)
    client, fake = cluster("RUNNING")
    answers: list[str] = ["RUNNING", "lost", "lost", "SUCCEEDED"]

    def status(job_id: str) -> Any:
        if (answer := answers.pop(0)) == "lost":
            raise RuntimeError("502 bad gateway")
        return SimpleNamespace(value=answer)

    monkeypatch.setattr(fake, "get_job_status", status)
    run = Run("first", str(tmp_path / "first"), client, "job-1")
    assert run.wait(60).step == 6
    answers += ["RUNNING", "lost"]
    monkeypatch.setattr(sdk.run, "SILENCE_SECONDS", 0.0)
    with pytest.raises(LaunchError, match="502"):
        run.wait(60)


def test_waiting_has_an_end(tmp_path: Path) -> None:
    a_run(tmp_path / "runs", state="running")
    with pytest.raises(TimeoutError, match=r"run 'first' has not ended after 0\.05 s"):
        find_run("first").wait(0.05)


def test_waiting_for_a_run_that_nobody_will_start_is_refused() -> None:
    with pytest.raises(StoreError, match="no run 'first'"):
        find_run("first").wait()


def test_a_job_that_dies_before_it_has_written_anything_is_quoted(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]]
) -> None:
    client, _ = cluster("PENDING", "RUNNING", "FAILED")
    run = Run("first", str(tmp_path / "first"), client, "job-1")
    with pytest.raises(RunFailed, match="ended as FAILED") as caught:
        run.wait()
    lines = str(caught.value).splitlines()
    assert lines[-1] == "line 99 of job-1" and len(lines) == 1 + sdk.run.LOG_LINES_IN_ERRORS


def test_a_job_takes_over_an_earlier_record(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier job left is not taken for this one's end; and the end is when the job ends, its log complete."""
    keeper = a_run(tmp_path, state="failed", cause="of the job before", job_id="job-0")
    client, fake = cluster("RUNNING")
    asked = 0

    def status(job_id: str) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            keeper.update(state="finished", job_id="job-1", step=6)
        return types.SimpleNamespace(value="RUNNING" if asked < 4 else "SUCCEEDED")

    monkeypatch.setattr(fake, "get_job_status", status)
    assert Run("first", str(tmp_path / "first"), client, "job-1").wait(60).step == 6
    assert asked == 4


def test_a_job_of_a_run_that_had_finished_before_has_nothing_to_do(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]]
) -> None:
    a_run(tmp_path, state="finished", job_id="job-0", step=6)
    client, _ = cluster("RUNNING", "SUCCEEDED")
    assert Run("first", str(tmp_path / "first"), client, "job-1").wait(60).job_id == "job-0"


def test_a_cluster_that_goes_away_is_a_launch_error(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, fake = cluster("RUNNING")
    for error in (RuntimeError("Request failed with status code 404"), ConnectionError("refused")):

        def fail(job_id: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(fake, "get_job_status", fail)
        with pytest.raises(LaunchError, match=rf"cluster at http://127\.0\.0\.1:8265 did not .*: {error}"):
            Run("first", str(tmp_path / "first"), client, "job-1").wait()


# ------------------------------------------------------------------------------------------------- looking


def test_metrics_come_from_mlflow_by_step(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    opened = open_run(uri, experiment="raynium", run_name="first", run_id=None, params=CONFIG, tags={})
    keeper = a_run(tmp_path / "runs")
    assert find_run("first").metrics("train/loss") == []  # tracking has not begun
    keeper.update(mlflow_uri=uri, mlflow_run_id=opened.run_id, mlflow_experiment_id=opened.experiment_id)
    with mlflow_client(uri, timeout_seconds=10) as client:
        for step in (2, 1, 3):
            client.log_metric(opened.run_id, "train/loss", 10.0 - step, timestamp=step, step=step)
        client.log_metric(opened.run_id, "eval/loss", 5.0, timestamp=4, step=3)
    assert find_run("first").metrics("train/loss") == [MetricPoint(step, 10.0 - step, step) for step in (1, 2, 3)]
    assert find_run("first").metrics("time/eval_seconds") == []
    with pytest.raises(ConfigError, match=r"metric 'train/los' is not one .* did you mean 'train/loss'\?"):
        find_run("first").metrics("train/los")

    frame = find_run("first").dataframe("eval/loss", "train/loss")
    assert list(frame.columns) == ["eval/loss", "train/loss"] and frame.index.name == "step"
    assert frame["train/loss"].to_dict() == {1: 9.0, 2: 8.0, 3: 7.0}
    assert frame["eval/loss"].dropna().to_dict() == {3: 5.0}
    assert list(find_run("first").dataframe().columns) == ["eval/loss", "train/loss"], "all that it has logged"
    with pytest.raises(ConfigError, match="metric 'loss' is not one of the names a run reports"):
        find_run("first").dataframe("loss")


def test_a_dataframe_before_anything_is_logged_is_empty(tmp_path: Path) -> None:
    a_run(tmp_path / "runs")
    assert find_run("first").dataframe("train/loss").shape == (0, 1) and find_run("first").dataframe().empty


def test_a_run_says_its_state_and_its_page_and_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    keeper = a_run(tmp_path / "runs", state="running", step=3, metrics={"train/loss": 2.5})
    run = find_run("first")
    assert (run.state, run.page) == ("running", None)
    assert "running at step 3 of 6" in run._repr_html_() and "2.5" in run._repr_html_()
    keeper.update(mlflow_uri="https://mlflow.example.com", mlflow_run_id="m<1>", mlflow_experiment_id="1")
    assert run.page == "https://mlflow.example.com/#/experiments/1/runs/m<1>?workflowType=machine_learning"
    assert "runs/m&lt;1&gt;?workflowType=machine_learning</a>" in run._repr_html_()
    die(keeper)
    assert run.state == "interrupted" and "ended without a word" in run._repr_html_()
    assert "no run &#x27;frist&#x27; at" in find_run("frist")._repr_html_()


def test_a_log_is_followed_in_pieces_whatever_the_bytes(tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    log.write_bytes(b"caf\xc3")
    keeper = a_run(tmp_path / "runs", state="running", log_path=str(log))
    pieces = find_run("first").follow()
    assert next(pieces) == "caf"
    with log.open("ab") as file:
        file.write(b"\xa9\n")
    assert next(pieces) == "\u00e9\n"
    keeper.update(state="stopped")
    assert list(pieces) == []


def test_a_jobs_log_is_followed_through_an_answer_that_is_lost(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]], caplog: pytest.LogCaptureFixture
) -> None:
    client, fake = cluster("RUNNING", "RUNNING", "RUNNING", "SUCCEEDED")
    texts: list[Any] = ["one\n", OSError("gone"), "one\ntwo\n", "one\ntwo\n"]

    def answer(job_id: str) -> str:
        text = texts.pop(0)
        if isinstance(text, OSError):
            raise text
        return text

    fake.get_job_logs = answer
    run = Run("first", str(tmp_path / "runs/first"), client, "job-1")
    assert list(run.follow()) == ["one\n", "two\n"]
    assert "asked again: the Ray cluster at" in caplog.text


def test_a_log_that_nobody_has_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run 'first'"):
        list(find_run("first").follow())
    a_run(tmp_path / "runs", state="finished")
    with pytest.raises(StoreError, match="on the host of its driver"):
        list(find_run("first").follow())


def test_a_stop_is_a_request_in_the_runs_folder(tmp_path: Path) -> None:
    keeper = a_run(tmp_path / "runs", state="running")
    assert not keeper.stop_requested()
    find_run("first").stop()
    assert keeper.stop_requested() and Store(tmp_path / "runs/first").exists(STOP_KEY)


def test_logs_of_the_driver_are_where_its_record_says(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]]
) -> None:
    keeper = a_run(tmp_path / "runs")
    with pytest.raises(StoreError, match=r"the log of run 'first' is None on the host of its driver"):
        find_run("first").logs()
    (tmp_path / "driver.log").write_bytes(b"one\n\xff\n")
    keeper.update(log_path=str(tmp_path / "driver.log"))
    assert find_run("first").logs() == "one\n\ufffd\n"
    client, _ = cluster("RUNNING")
    assert Run("first", find_run("first").url, client, "job-1").logs().startswith("line 0 of job-1")


def test_logs_of_the_ranks_are_those_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = find_run("first")
    with pytest.raises(StoreError, match="no rank of run 'first' has run on this host"):
        run.logs(of="ranks")
    folder = log_folder(Store(run.url).url)  # as an agent names it, from the address that the driver gave it
    folder.mkdir(parents=True)
    for node in (1, 0):
        (folder / f"node-{node:05d}.log").write_text(f"node {node}\n")
    assert run.logs(of="ranks") == "node 0\nnode 1\n"


# ------------------------------------------------------------------------------------------------- submitting


@pytest.mark.parametrize("overrides", [{"train.steps": 9}, ["train.steps=9"], ("train.steps=9",)])
def test_what_is_submitted_is_the_resolved_config(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]], overrides: Any
) -> None:
    (tmp_path / "job.yaml").write_text(JOB)  # without a name: that comes from the argument
    client, fake = cluster("PENDING")
    run = client.submit("job.yaml", overrides, name="second")
    assert (run.name, run.url, run.client) == ("second", f"file://{tmp_path}/runs/second", client)
    config = parse_config(fake.configs[0])
    assert (config.train.steps, config.run.name, config.data.path) == (9, "second", f"{tmp_path}/data")
    assert run.job_id == fake.submitted[0]["submission_id"]
    assert str(run.job_id).startswith("raynium-second-")


def test_a_config_may_be_a_dict(tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]]) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    client, fake = cluster("RUNNING")
    held = yaml.safe_load(JOB) | {"data": {**yaml.safe_load(JOB)["data"], "path": Path("data")}}
    client.submit(tmp_path / "job.yaml", {"train.steps": 9}, name="first")
    client.submit(held, {"train.steps": 9}, name="first")
    assert fake.configs[0] == fake.configs[1]
    with pytest.raises(ConfigError, match="trane is not a field"):
        client.submit({**held, "trane": {}})
    with pytest.raises(ConfigError, match="the config holds what no job file can hold"):
        client.submit({**held, "train": {"steps": {1, 2}}})


def test_the_name_comes_from_the_job_file_or_from_the_argument(cluster: Callable[..., tuple[Client, Jobs]]) -> None:
    client, _ = cluster("PENDING")
    assert client.submit("quickstart").name == "quickstart"
    assert client.submit("quickstart", {"run.name": "a"}).name == "a"
    assert client.submit("quickstart", {"run.name": "a"}, name="b").name == "b"
    assert client.submit("quickstart", ["run.name=a"], name="b").name == "b"


@pytest.mark.parametrize(
    ("config", "overrides", "match"),
    [
        ("quickstart", {"train.stepz": 3}, "did you mean"),
        ("quickstart", "train.steps=3", "it must be a list such as"),
        ("quickstart", ["train.steps"], "has no '='"),
        ("quickstart", {"train.global_batch_size": 3}, "global_batch_size"),
        ("quickstart", {"tracking.uri": "http://a:hunter2@host"}, "holds credentials"),
        ("llama3-8b", (), "YOUR-BUCKET"),
        ("nothing.yaml", (), "there is no job file"),
    ],
)
def test_bad_input_is_refused_before_the_cluster_is_asked(
    monkeypatch: pytest.MonkeyPatch, config: str, overrides: Any, match: str
) -> None:
    def connect(address: str) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(jobs, "connect_jobs", connect)
    with pytest.raises(ConfigError, match=match):
        Client("http://127.0.0.1:8265").submit(config, overrides, name="first")


def test_a_name_in_use_is_refused_before_the_cluster_is_asked(
    tmp_path: Path, cluster: Callable[..., tuple[Client, Jobs]]
) -> None:
    a_run(tmp_path / "runs", "quickstart", state="running", step=3)
    client, fake = cluster("PENDING")
    with pytest.raises(RunInUse, match=r"run 'quickstart' .* in use by process .*running, step 3"):
        client.submit("quickstart")
    assert not fake.submitted


def test_a_config_that_contradicts_the_checkpoint_is_refused_before_the_cluster_is_asked(
    cluster: Callable[..., tuple[Client, Jobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_config("quickstart", {"run.seed": 7}).model_dump(mode="json")
    checkpoint = SimpleNamespace(step=100, manifest=SimpleNamespace(state={"config": saved}))
    monkeypatch.setattr("raynium.run.past.latest", lambda store, **_: checkpoint)
    client, fake = cluster("PENDING")
    with pytest.raises(ConfigError, match=r"run\.seed is 0, but the checkpoint was trained with 7"):
        client.submit("quickstart")
    assert not fake.submitted


def test_a_cluster_that_refuses_a_job_is_quoted(
    cluster: Callable[..., tuple[Client, Jobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, fake = cluster("PENDING")

    def refuse(**options: Any) -> str:
        raise RuntimeError("Package size exceeds 500 MiB")

    monkeypatch.setattr(fake, "submit_job", refuse)
    with pytest.raises(LaunchError, match="Package size exceeds"):
        client.submit("quickstart")


def test_the_connection_is_made_once_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[str] = []
    fake = Jobs("RUNNING")

    def connect(address: str) -> Jobs:
        addresses.append(address)
        return fake

    monkeypatch.setattr(jobs, "connect_jobs", connect)
    client = Client("http://127.0.0.1:8265")
    assert addresses == []
    assert client.job_state("job-1") == "RUNNING" and "job-1" in client.job_logs("job-1")
    assert addresses == ["http://127.0.0.1:8265"]


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto", ""])
def test_an_address_of_another_kind_is_refused_at_once(address: str) -> None:
    with pytest.raises(LaunchError, match=rf"'{address}' is not the address of a Ray dashboard"):
        Client(address)
