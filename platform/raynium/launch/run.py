"""Runs one config to its end and writes down the result: what `raynium train` and `jobs/train.py` call."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from raynium.config.reference import brief
from raynium.config.schema import Config
from raynium.convert.beginning import survey_weights
from raynium.errors import ClusterLost, RunInUse, StoreError, TrackingError
from raynium.launch.notify import Notifier, notifier_of, tell_end
from raynium.launch.page import end_page
from raynium.launch.preparation import Prepared, checked, finished_record, prepare, survey_data
from raynium.launch.ray_environment import set_ray_environment
from raynium.launch.settle import check_this_machine, settled
from raynium.run.past import Past, run_store
from raynium.run.protocol import Status
from raynium.run.record import RunRecord
from raynium.terminal.display import Display
from raynium.tracking.chart import time_chart
from raynium.tracking.client import ArtifactsAway
from raynium.tracking.runs import log_artifact_text


def run(
    config: Config, *, address: str | None, job_id: str | None = None, tags: Mapping[str, str] | None = None
) -> RunRecord:
    """Trains `config` on the Ray cluster at `address`, or on one that it starts on this machine (None).

    Returns the record of the finished or stopped run; raises RayniumError otherwise. A run that was interrupted goes on
    from its newest checkpoint; one that has already finished is not run again. tags: go to its MLflow run.
    """
    config = checked(config)
    set_ray_environment(starts_cluster=address is None)
    from raynium.launch.connect import connect
    from raynium.launch.tasks.ray_tasks import on_ray

    console = Console(highlight=False, soft_wrap=True)

    def tell(line: str) -> None:
        console.print(Text(line))

    past = Past.read(config)
    config = past.with_steps(config)
    # A mistake in the data is told before a cluster is started or joined, MLflow asked, or a record written.
    if (record := finished_record(config, past)) is not None:
        tell(f"run {config.run.name!r} has already finished at step {record.step}")
        return record
    if past.newest is None:
        survey_weights(config)
    surveyed = survey_data(config, past, tell)
    with contextlib.ExitStack() as cluster:
        # Joining a cluster is quick, and says what its nodes have; one of our own is started when all else is ready.
        resources = cluster.enter_context(connect(address)) if address is not None else None
        config = settled(config, cluster_resources=resources, saved=past.config)
        if address is None:
            check_this_machine(config)
        console.print(Text(brief(config)))
        prepared = prepare(
            config,
            past,
            surveyed=surveyed,
            job_id=job_id,
            tags=tags or {},
            tell=tell,
            runner=None if address is None else on_ray,
        )
        with Display(prepared.config.train.num_steps, console, prepared.log_path) as display:
            notifier = notifier_of(prepared.config.fault, prepared.keeper, display.line)
            try:
                if address is None:
                    cluster.enter_context(connect(None, least_cpus=config.cluster.ranks_per_node))
                return _run_prepared(prepared, display, notifier)
            except (KeyboardInterrupt, SystemExit) as error:
                # SystemExit: a job's SIGTERM where no rank is left to hear of it.
                by = "SIGINT" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
                _write_end(prepared, display, notifier, {"state": "stopped", "stopped_by": by})
                raise
            except BaseException as error:
                lost = isinstance(error, ClusterLost)
                end = prepared.keeper.failure(f"{type(error).__name__}: {error}", cluster_lost=lost)
                _write_end(prepared, display, notifier, end)
                raise


def _run_prepared(prepared: Prepared, display: Display, notifier: Notifier) -> RunRecord:
    """Drives the run to its end on the connected cluster, and writes the end down."""
    from raynium.launch.driver import Driver
    from raynium.launch.stop_signals import stop_on_signals

    driver = Driver(prepared, display, notifier)
    with stop_on_signals(driver.request_stop):
        status = driver.run()
    assert status.ended in ("finished", "stopped")
    finished = status.ended == "finished"
    with prepared.keeper.beating():
        result = _result(prepared, status) if finished else None
    # The cause is of a run that finished before its last step.
    end = {"state": status.ended, "stopped_by": None if finished else driver.stopped_by, "result": result}
    end |= {"cause": status.cause if finished else None}
    prepared.keeper.update(**driver.facts(status) | end)
    _end_mlflow_run(prepared, display, prepared.keeper.record)
    tell_end(notifier, prepared.keeper, prepared.keeper.record, display.line)
    return prepared.keeper.record


def _result(prepared: Prepared, status: Status) -> dict[str, Any]:
    """What a finished run shows: held-out bits per byte beside two baselines, and text from the model."""
    # Imported here, since it imports torch, which takes seconds.
    from raynium.data.baselines import compute_baselines

    config = prepared.config
    result: dict[str, Any] = {
        "held_out": {name: value for name, value in status.metrics.items() if name.startswith("eval/")},
        "checkpoint": status.committed_uri,
        "samples": [],
    }
    if (bits := status.metrics.get("eval/bits_per_byte")) is not None:
        baselines = compute_baselines(prepared.documents, max_documents=config.evaluate.max_documents)
        result["bits_per_byte"] = bits
        result["unigram_bits_per_byte"] = baselines.unigram_bits_per_byte
        result["zlib_bits_per_byte"] = baselines.zlib_bits_per_byte
    if config.sample.prompts:
        from raynium.generation.drawing import Drawing
        from raynium.generation.sampler import open_sampler

        sampler = open_sampler(run_store(config).url)
        settings = config.sample.model_dump(exclude={"prompts"})
        answers = sampler.answers(config.sample.prompts, Drawing(**settings, seed=config.run.seed))
        result["samples"] = [answer.prompt + answer.text for answer in answers]
    return result


def _write_end(prepared: Prepared, display: Display, notifier: Notifier, changes: dict[str, Any]) -> None:
    """Writes down an end that is an exception. What goes wrong here must not hide that from the user."""
    try:
        prepared.keeper.update(**changes)
    except RunInUse:
        # The record and the MLflow page are another driver's by now.
        return
    except StoreError as error:
        display.line(f"the run record does not show how the run ended: {error}")
    record = replace(prepared.keeper.record, **changes)
    _end_mlflow_run(prepared, display, record)
    tell_end(notifier, prepared.keeper, record, display.line)


def _end_mlflow_run(prepared: Prepared, display: Display, record: RunRecord) -> None:
    """Writes the end into MLflow. A server that is away by now costs the page its end, not the run its result."""
    mlflow = prepared.mlflow
    samples = record.result["samples"] if record.result is not None else []
    try:
        end_page(mlflow, record)
        log_artifact_text(mlflow.uri, mlflow.run_id, "time.svg", time_chart(record.ledger))
        if record.incidents:
            log_artifact_text(mlflow.uri, mlflow.run_id, "incidents.json", json.dumps(record.incidents, indent=1))
        if samples:
            log_artifact_text(mlflow.uri, mlflow.run_id, "samples.txt", "\n\n----------\n\n".join(samples))
    except ArtifactsAway as error:
        display.line(f"the MLflow page does not show all files of the run: {error}")
    except TrackingError as error:
        display.line(f"the MLflow page does not show how the run ended: {error}")
