"""One run from config to result, with a driver that only pretends: what is written down however it ends."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import build_documents, job_text

from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.errors import ClusterLost, ConfigError, RunFailed, RunInUse, StoreError, TrackingError
from raynium.launch import driver as driver_module
from raynium.launch import preparation
from raynium.launch import run as run_module
from raynium.launch.preparation import finished_record
from raynium.launch.run import run
from raynium.run.fence import claim_key
from raynium.run.past import Past
from raynium.run.protocol import Status
from raynium.run.record import Owner, RunRecord, read_record
from raynium.storage.process import this_process
from raynium.storage.store import Store
from raynium.tracking.client import mlflow_client


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    build_documents(folder)
    return folder


@pytest.fixture
def config(root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Config:
    for name in ("RAYNIUM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    name = request.node.originalname.replace("_", "-")[:60]
    return parse_config(job_text({"train.steps": 6, "run.name": name, "cluster.ranks_per_node": None}, root=root))


def ended(how: str, step: int) -> Status:
    metrics = {"train/loss": 2.0, "eval/bits_per_byte": 2.5}
    return Status(1, False, None, step, metrics, step, f"file:///step-{step}", (), how, None)  # pyright: ignore


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str | None]]:
    """Replaces Ray: `train(end)` has the driver return, raise or do `end`; gives the addresses it connected to."""

    def pretend(end: Status | BaseException | Callable[[], Status]) -> list[str | None]:
        addresses: list[str | None] = []

        class Driver(driver_module.Driver):
            def __init__(self, *arguments: Any):
                super().__init__(*arguments)
                self.stopped_by = "SIGTERM"

            def request_stop(self, by: str) -> None:
                pass

            def run(self) -> Status:
                if isinstance(end, BaseException):
                    raise end
                return end if isinstance(end, Status) else end()

        @contextlib.contextmanager
        def connect(address: str | None, **options: Any) -> Iterator[dict[str, float]]:
            addresses.append(address)
            yield {"CPU": 2.0}

        monkeypatch.setattr(driver_module, "Driver", Driver)
        monkeypatch.setattr("raynium.launch.connect.connect", connect)
        return addresses

    return pretend


def record_of(config: Config) -> RunRecord:
    record = read_record(Store(f"{config.run.root}/{config.run.name}"))
    assert record is not None
    return record


def mlflow_status(record: RunRecord) -> str:
    assert record.mlflow_uri is not None and record.mlflow_run_id is not None
    with mlflow_client(record.mlflow_uri, timeout_seconds=10) as client:
        return client.get_run(record.mlflow_run_id).info.status


def test_a_finished_run_is_written_down_and_not_run_again(
    config: Config, train: Callable[..., list[str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    train(ended("finished", 6))
    record = run(config, address=None)
    assert record == record_of(config)
    assert (record.state, record.step, mlflow_status(record)) == ("finished", 6, "FINISHED")
    assert record.result is not None and record.result["bits_per_byte"] == 2.5
    assert record.result["checkpoint"] == "file:///step-6"
    assert "steps: 6," in capsys.readouterr().out, "what differs from the defaults is shown"

    train(RunFailed("it was run again"))
    assert run(config, address=None) == record
    assert "has already finished at step 6" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"run\.seed is 1, but the checkpoint was trained with 0"):
        run(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}), address=None)
    assert record_of(config) == record


def test_a_run_that_ended_early_says_why_and_is_over(config: Config, train: Callable[..., list[str | None]]) -> None:
    why = "ended early at step 4: eval/loss has not improved in 2 evaluations; its best was 2 at step 2"
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"patience": 2})})
    train(replace(ended("finished", 4), cause=why))
    record = run(config, address=None)
    assert (record.state, record.step, record.cause, mlflow_status(record)) == ("finished", 4, why, "FINISHED")
    assert record.mlflow_uri is not None and record.mlflow_run_id is not None
    with mlflow_client(record.mlflow_uri, timeout_seconds=10) as client:
        note = client.get_run(record.mlflow_run_id).data.tags["mlflow.note.content"]
    assert note.startswith("**finished** at step 4 of 6") and "has not improved in 2 evaluations" in note
    train(RunFailed("it was run again"))
    assert run(config, address=None) == record
    more = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"patience": 3})})
    assert finished_record(config, Past.read(config)) == record and finished_record(more, Past.read(more)) is None


def test_a_stopped_run_has_no_result(config: Config, train: Callable[..., list[str | None]]) -> None:
    addresses = train(ended("stopped", 3))
    record = run(config, address="auto", job_id="job-1")
    assert addresses == ["auto"]
    assert (record.state, record.step, record.result, record.job_id) == ("stopped", 3, None, "job-1")
    assert mlflow_status(record) == "FINISHED", "it did as it was asked"


def test_a_failure_leaves_its_cause(config: Config, train: Callable[..., list[str | None]]) -> None:
    train(RunFailed("rank 1: killed by SIGKILL"))
    with pytest.raises(RunFailed):
        run(config, address=None)
    record = record_of(config)
    assert (record.state, record.cause) == ("failed", "RunFailed: rank 1: killed by SIGKILL")
    assert mlflow_status(record) == "FAILED"


def test_who_is_to_be_told_hears_that_the_run_failed_and_of_a_driver_that_was_killed_each_once(
    config: Config, train: Callable[..., list[str | None]], tmp_path: Path
) -> None:
    write = f"import sys; open({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.read() + '\\n')"
    fault = config.fault.model_copy(update={"notify_command": (sys.executable, "-c", write)})
    config, told = config.model_copy(update={"fault": fault}), []
    train(RunFailed("the store is away"))
    for _ in range(2):
        with pytest.raises(RunFailed):
            run(config, address=None)
        told = [json.loads(line)["incident"] for line in (tmp_path / "told").read_text().splitlines()]
        assert record_of(config).notified == [each["key"] for each in told]
        # As if it had been killed in training.
        left = asdict(record_of(config)) | {"state": "running", "owner": asdict(this_process()) | {"pid_started": "0"}}
        Store(f"{config.run.root}/{config.run.name}").replace("run.json", json.dumps(left).encode())
    assert [each["what"] for each in told] == ["run", "driver", "run"]
    assert told[0]["cause"] == "RunFailed: the store is away" and "ended without a word" in told[1]["cause"]


def test_who_is_to_be_told_hears_of_a_run_that_fails_before_it_has_a_node(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())"
    fault = config.fault.model_copy(update={"notify_command": (sys.executable, "-c", write)})

    def away(*arguments: Any) -> None:
        raise StoreError("the store is away")

    monkeypatch.setattr(preparation, "keep_tokenizer", away)
    with pytest.raises(StoreError):
        run(config.model_copy(update={"fault": fault}), address=None)
    assert json.loads((tmp_path / "told").read_text())["incident"]["cause"] == "StoreError: the store is away"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(1)])  # Ctrl-C twice; SIGTERM after training
def test_ctrl_c_leaves_a_run_that_can_be_started_again(
    config: Config, train: Callable[..., list[str | None]], end: BaseException
) -> None:
    train(end)
    with pytest.raises(type(end)):
        run(config, address=None)
    assert (record_of(config).state, record_of(config).cause) == ("stopped", None)
    train(ended("stopped", 3))
    assert run(config, address=None).state == "stopped"


def test_a_run_that_was_taken_over_is_left_to_its_new_driver(
    config: Config, train: Callable[..., list[str | None]]
) -> None:
    def be_taken_over() -> Status:
        mine = record_of(config)
        store = Store(f"{config.run.root}/{config.run.name}")
        other = Owner("elsewhere", "boot", 7, "7")
        store.write_new(claim_key(2), json.dumps(asdict(other)).encode())
        store.replace("run.json", replace(mine, owner=other).to_json())
        raise RunInUse("taken over")

    train(be_taken_over)
    with pytest.raises(RunInUse):
        run(config, address=None)
    record = record_of(config)
    assert (record.owner.host, record.state, mlflow_status(record)) == ("elsewhere", "preparing", "RUNNING")


@pytest.mark.parametrize("end", [RunFailed("rank 1: loss nan"), ClusterLost("gone"), KeyboardInterrupt()])
def test_a_store_that_is_gone_at_the_end_does_not_hide_the_end(
    config: Config, train: Callable[..., list[str | None]], monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def lose_the_store() -> Status:
        def gone(*arguments: Any) -> None:
            raise StoreError("no answer")

        monkeypatch.setattr(Store, "replace", gone)
        raise end

    train(lose_the_store)
    name = f"store-gone-{type(end).__name__}"
    with pytest.raises(type(end)):
        run(config.model_copy(update={"run": config.run.model_copy(update={"name": name})}), address=None)


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_an_mlflow_that_is_gone_at_the_end_costs_the_page_and_not_the_run(
    config: Config,
    train: Callable[..., list[str | None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str,
) -> None:
    def gone(*arguments: Any) -> None:
        raise TrackingError("MLflow at http://host: no answer within 10 s")

    monkeypatch.setattr(run_module, "end_page", gone)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": f"gone-{end}"})})
    train(ended("finished", 6) if end == "finished" else RunFailed("rank 1: killed"))
    with contextlib.nullcontext() if end == "finished" else pytest.raises(RunFailed):
        run(config, address=None)
    assert record_of(config).state == end
    assert "the MLflow page does not show how the run ended: MLflow at http://host" in capsys.readouterr().out
