"""One MLflow run for each Raynium run, across all its attempts: made, re-opened, ended and read here.

Called by the driver, the CLI and the SDK; blocking, but never for longer than seconds. Metric points go another way
(`sender.py`).
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from raynium.errors import ConfigError, TrackingError
from raynium.tracking.client import (
    DATABASE_PORTS,
    NO_TELEMETRY,
    SERVER_SCHEMES,
    check_reachable,
    log_text,
    mlflow_client,
    mlflow_uri,
    redact,
    refuse_stranger,
    sqlite_path,
)
from raynium.tracking.metrics import LAST_IN_MLFLOW, check_metrics, name_in_mlflow
from raynium.tracking.provenance import flatten_config

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REQUEST_TIMEOUT_SECONDS = 10.0
# MLflow's limit, beyond which it cuts silently.
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_PER_REQUEST = 100
# MLflow's SQL stores keep it in place of infinity.
LARGEST_FLOAT = sys.float_info.max

# Of its two views, MLflow opens the one for calls of finished models unless told otherwise.
TRAINING_VIEW = "workflowType=machine_learning"

RunStatus = Literal["FINISHED", "FAILED"]


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run. `uri` may hold credentials, so it is not in the repr.

    is_open: for writing. One that MLflow has, but that it could not be asked to open again, takes points all the same.
    """

    run_id: str
    experiment_id: str
    uri: str = field(repr=False)
    is_open: bool = True


@dataclass(frozen=True)
class MetricPoint:
    step: int
    value: float
    unix_ms: int


def resolve_uri(config_uri: str | None, root: str) -> str:
    """Where metrics go: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite at `<root>/mlflow.db`. Absolute.

    Raises ConfigError for a store that cannot keep the promise of one point per step, or if nothing can be derived.
    """
    uri = config_uri or os.environ.get("MLFLOW_TRACKING_URI")
    source = "tracking.uri" if config_uri else "MLFLOW_TRACKING_URI"
    if not uri:
        folder = root.removeprefix("file://")
        if "://" in folder:
            problem = (
                f"tracking.uri is not set and run.root = {redact(root)} is not a local folder: MLflow's database "
                "cannot live in a bucket. Set tracking.uri or MLFLOW_TRACKING_URI to an MLflow server"
            )
            raise ConfigError([problem])
        return f"sqlite:///{Path(folder).absolute() / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite" and str(sqlite_path(uri)) not in ("", ".", ":memory:"):
        return f"sqlite:///{sqlite_path(uri).absolute()}"
    if scheme in SERVER_SCHEMES or scheme in DATABASE_PORTS:
        return uri
    problem = (
        f"{source} = {redact(uri)}: not a store that keeps metrics without repeating points after a failure. Use "
        f"http(s)://host:port of an MLflow server, sqlite:////absolute/path/mlflow.db, or {', '.join(DATABASE_PORTS)}"
    )
    raise ConfigError([problem])


def open_run(
    uri: str,
    *,
    experiment: str,
    run_name: str,
    run_id: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, str],
) -> TrackedRun:
    """Make the MLflow run (`run_id=None`), or open the same one again for a new attempt. One process calls this.

    params: the resolved config, nested or flat. MLflow never changes a param, so on a resume the first value stays and
    a different one becomes the tag `changed.<name>`; a tag of an earlier change goes when the value is the first again.
    Values over MLflow's limit are cut and say so: log the whole config as an artifact.
    Raises TrackingError; TrackingAway, if MLflow does not answer.
    """
    check_reachable(uri)
    flat_params = {name: _cut(value, MAX_PARAM_CHARACTERS) for name, value in flatten_config(params).items()}
    all_tags = _cut_tags(tags)
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        if run_id is None:
            run = client.create_run(_experiment_id(client, experiment, uri=uri), run_name=run_name)
        else:
            run = _reopen(client, run_id, uri=uri)
        known = run.data.params
        new_params = {name: value for name, value in flat_params.items() if name not in known}
        for name, value in flat_params.items():
            change = f"changed.{name}"
            if name in known and known[name] != value:
                all_tags[change] = value
            elif change in run.data.tags:
                client.delete_tag(run.info.run_id, change)
        _log(client, run.info.run_id, params=new_params, tags=all_tags)
        return TrackedRun(run.info.run_id, run.info.experiment_id, uri)


def _experiment_id(client: "MlflowClient", name: str, *, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            # Else another process made it just now.
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow at {redact(uri)}: experiment {name!r} is deleted. "
            f"Restore it (mlflow experiments restore -x {experiment.experiment_id}), or set tracking.experiment"
        )
    return experiment.experiment_id


def _artifact_location(uri: str) -> str | None:
    """Beside an SQLite file, or MLflow would use the current directory; a server decides for itself."""
    return (sqlite_path(uri).parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None


def _reopen(client: "MlflowClient", run_id: str, *, uri: str) -> "Run":
    run = client.get_run(run_id)
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow at {redact(uri)}: run {run_id} is deleted, so its attempts cannot go on being logged to it. "
            f"Restore it (mlflow runs restore --run-id {run_id}), or start a run of another name"
        )
    client.update_run(run_id, status="RUNNING")
    return run


def _log(client: "MlflowClient", run_id: str, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    all_params = [Param(name, value) for name, value in params.items()]
    all_tags = [RunTag(name, value) for name, value in tags.items()]
    for start in range(0, max(len(all_params), len(all_tags)), MAX_PER_REQUEST):
        part = slice(start, start + MAX_PER_REQUEST)
        client.log_batch(run_id, params=all_params[part], tags=all_tags[part], synchronous=True)


def _cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(redact(text), MAX_TAG_CHARACTERS) for name, text in tags.items()}


def _cut(value: str, max_characters: int) -> str:
    if len(value) <= max_characters:
        return value
    note = f"… ({len(value)} characters; the whole is in the run's artifacts)"
    return value[: max_characters - len(note)] + note


def log_artifact_text(uri: str, run_id: str, path: str, text: str) -> None:
    """Store `text` (UTF-8) as the run's artifact `path`, at once; an artifact of the same path is replaced.

    Raises TrackingError; a run is worth more than this page of it.
    """
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        log_text(client, run_id, path=path, text=text)


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of the run, over what they were. Raises TrackingError."""
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        _log(client, run_id, params={}, tags=_cut_tags(tags))


def finish_run(uri: str, run_id: str, status: RunStatus, tags: Mapping[str, str] = {}) -> None:
    """Set the run's end state, and tags with it. A later attempt may `open_run` it again. Raises TrackingError."""
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        _log(client, run_id, params={}, tags=_cut_tags(tags))
        client.set_terminated(run_id, status)


def end_abandoned(uri: str, run_id: str, tags: Mapping[str, str], *, unix: float, still: Callable[[], bool]) -> None:
    """End as failed, at that time, a run whose driver has died; one that has ended is left alone. Raises TrackingError.

    still: whether nobody drives it, also asked after the write: a driver that took the run meanwhile keeps it open.
    """
    refuse_stranger(uri)
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        if client.get_run(run_id).info.status != "RUNNING" or not still():
            return
        _log(client, run_id, params={}, tags=_cut_tags(tags))
        client.set_terminated(run_id, "FAILED", end_time=int(unix * 1000))
        if not still():
            client.update_run(run_id, status="RUNNING")


def log_evaluation(uri: str, run_id: str, metrics: Mapping[str, float], *, step: int) -> None:
    """Points of an evaluation that somebody asked for, at once, whatever state the run is in. Raises TrackingError, and
    ValueError for a name outside METRICS.
    """
    check_metrics(metrics)
    refuse_stranger(uri)
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        for name, value in metrics.items():
            client.log_metric(run_id, name_in_mlflow(name), value, step=step)


def log_dataset(uri: str, run_id: str, *, path: str, identity: str, facts: Mapping[str, int | float]) -> None:
    """Name the run's document store as its input.

    identity: of its manifest; MLflow takes the first 36 of its 64 digits as the digest. facts: numbers to show of it.
    Raises TrackingError.
    """
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=path.rstrip("/").rpartition("/")[2] or path,
            digest=identity[:36],
            source_type="s3" if path.startswith("s3://") else "local",
            source=json.dumps({"uri": path}),
            profile=json.dumps({"identity": identity, **facts}),
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def read_metric(uri: str, run_id: str, key: str) -> list[MetricPoint]:
    """All points of one metric, sorted by step; empty if none was logged. Raises TrackingError."""
    refuse_stranger(uri)
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        # The history of a run that does not exist is an empty list.
        client.get_run(run_id)
        history = client.get_metric_history(run_id, name_in_mlflow(key))
    points = [MetricPoint(point.step, _restore_infinity(point.value), point.timestamp) for point in history]
    return sorted(points, key=lambda point: (point.step, point.unix_ms))


def metric_names(uri: str, run_id: str) -> list[str]:
    """The metrics that have a point, sorted. Raises TrackingError."""
    refuse_stranger(uri)
    with mlflow_client(uri, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        return sorted(name.removeprefix(LAST_IN_MLFLOW) for name in client.get_run(run_id).data.metrics)


def _restore_infinity(value: float) -> float:
    return value * 2 if abs(value) == LARGEST_FLOAT else value


def page_url(base: str, experiment_id: str, run_id: str) -> str:
    """Address of the run's page on an MLflow UI at `base`."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{TRAINING_VIEW}"


def home_url(base: str) -> str:
    """Address of the list of experiments there."""
    return f"{base.rstrip('/')}/#/experiments?{TRAINING_VIEW}"


def ui_command(uri: str, *, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """Command that serves the UI of a local store; run it with `ui_environment()`.

    Raises TrackingError for a store that has a server, whose UI is at `uri` itself.
    """
    if not uri.startswith("sqlite:"):
        raise TrackingError(f"{redact(uri)} is not a local store: its UI is served by its MLflow server; open that")
    return [
        *(sys.executable, "-m", "mlflow", "ui"),
        *("--backend-store-uri", mlflow_uri(uri), "--default-artifact-root", str(_artifact_location(uri))),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def ui_environment() -> dict[str, str]:
    """This process's environment without MLflow's variables, which are other words for the options of `ui_command`.

    What says how artifacts in S3 are reached stays. Added is what keeps an MLflow server from sending telemetry and
    running a job queue.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MLFLOW_S3_") or not name.startswith(("MLFLOW_", "_MLFLOW_"))
    }
    return {**inherited, **NO_TELEMETRY, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
