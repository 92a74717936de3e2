"""The driver: takes a prepared run to its end. One process per run; `raynium train` and a Ray job both call it.

It starts the coordinator and Ray Train, shows progress, keeps the run record, and carries a stop request to the ranks.
What comes before is in `preparation.py`, what comes after in `run.py`.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raynium.accelerators.detect import detect
from raynium.checkpoint.store import Store
from raynium.config.schema import Config
from raynium.errors import LaunchError, RunFailed
from raynium.launch.agent import Node, NodeAgent
from raynium.launch.backend import ATTEMPT_VARIABLE, NodeAgentConfig
from raynium.launch.coordinator import RunCoordinator
from raynium.launch.display import Display
from raynium.launch.preparation import Prepared
from raynium.launch.protocol import Status
from raynium.launch.record import RecordKeeper
from raynium.launch.scratch import log_folder

logger = logging.getLogger(__name__)

# Ray replaces 127.0.0.1 by the network card's address; 127.0.0.2 it keeps (Linux: all of 127/8 is the loopback).
LOOPBACK = "127.0.0.2"
STATUS_SECONDS = 0.25  # how often the display is refreshed
STOP_POLL_SECONDS = 2.0  # how often the run's store is asked for a stop request
WAITING_SECONDS = 20.0  # how long Ray may look for nodes before the user is told what is missing

# Ray Train's own defaults cost 2 s per poll and 60 s per failed placement (measured, Ray 2.60).
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
CORE_RESOURCES = ("CPU", "GPU", "neuron_cores")
CONTROLLER_FAILURE_LIMIT = 30  # placements that fail in a row before Ray Train gives up; its default is never


@dataclass(frozen=True)
class RayCoordinatorCalls:
    """The coordinator as node agents reach it: a Ray actor."""

    actor: Any

    def call(self, method: str, *arguments: Any) -> "Future[Any]":
        return getattr(self.actor, method).remote(*arguments).future()


def run_agent(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each node. Referenced by name: it lives in the package, not in a job script."""
    from raynium.data.remote import localize
    from raynium.tracking.sender import MlflowTracker

    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    scratch = settings["scratch"]
    log_to_file(log_folder(settings["run_url"]) / f"node-{context.get_node_rank():05d}.log")
    NodeAgent(
        config=config,
        run_url=settings["run_url"],
        node=Node(
            attempt=os.environ[ATTEMPT_VARIABLE],
            node_rank=context.get_node_rank(),
            host=ray.util.get_node_ip_address(),
        ),
        accelerator=detect(config.cluster.accelerator),
        coordinator=RayCoordinatorCalls(settings["coordinator"]),
        open_tracker=lambda: MlflowTracker(
            f"{scratch}/spool/{settings['mlflow_run_id']}",
            uri=settings["mlflow_uri"],
            run_id=settings["mlflow_run_id"],
        ),
        data_folder=lambda: str(localize(config.data.path, f"{scratch}/data")),
    ).run()


def log_to_file(path: Path) -> None:
    """This process's own log, which holds its ranks' output, beside Ray's: Ray's goes with its session."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ours = logging.getLogger("raynium")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


class Driver:
    """One run's life on one cluster. `ray` is initialised, `prepared` holds the claimed run."""

    def __init__(self, config: Config, prepared: Prepared, display: Display):
        self.config = config
        self.prepared = prepared
        self.display = display
        self._stop = threading.Event()
        self._events_seen = 0

    def request_stop(self) -> None:
        """Every rank saves at the next step and ends. Safe to call from a signal handler."""
        self._stop.set()

    def run(self) -> Status:
        """Returns when the run has finished or was stopped; raises RunFailed with the cause otherwise."""
        keeper = self.prepared.keeper
        coordinator = (
            ray.remote(RunCoordinator)
            .options(
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                name=f"raynium-{self.config.run.name}-{time.time_ns()}",
            )
            .remote(self.config.model_dump(mode="json"), self.prepared.store.url, keeper.record.generation)
        )
        fitting = _InThread(lambda: self._trainer(coordinator).fit())
        status = self._watch(coordinator, fitting, keeper)
        if status.ended == "failed" or status.ended is None:
            cause = status.cause or f"Ray Train ended the run: {fitting.error}"
            raise RunFailed(f"run {self.config.run.name!r} failed at step {status.step}: {cause}")
        fitting.join()  # the agents close their trackers and free the nodes
        return status

    def _trainer(self, coordinator: Any) -> DataParallelTrainer:
        cluster = self.config.cluster
        store = self.prepared.store
        storage = ray_storage(store)
        return DataParallelTrainer(
            run_agent,
            train_loop_config={
                "config": self.config.model_dump(mode="json"),
                "run_url": store.url,
                "coordinator": coordinator,
                "mlflow_uri": self.prepared.mlflow.uri,
                "mlflow_run_id": self.prepared.mlflow.run_id,
                "scratch": self.prepared.scratch,
            },
            backend_config=NodeAgentConfig(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=cluster.nodes,
                resources_per_worker=node_resources(self.config),
                placement_strategy="STRICT_SPREAD" if cluster.nodes > 1 else "PACK",
            ),
            run_config=ray.train.RunConfig(
                name=f"driver-{keeper_id(self.prepared.keeper)}",
                failure_config=ray.train.FailureConfig(
                    max_failures=self.config.fault.max_node_failures,
                    controller_failure_limit=CONTROLLER_FAILURE_LIMIT,
                ),
                **storage,
            ),
        )

    def _watch(self, coordinator: Any, fitting: "_InThread", keeper: RecordKeeper) -> Status:
        """Shows progress, keeps the record, and carries a stop request, until the run or Ray Train has ended."""
        began = time.monotonic()
        last_stop_poll = 0.0
        told_waiting = stop_sent = False
        while True:
            over = not fitting.is_alive()
            status: Status = ray.get(coordinator.status.remote(self._events_seen))
            for event in status.events:
                self.display.line(event.text)
                self._events_seen = event.number
            self.display.show(status)
            live: Literal["preparing", "running"] = "running" if status.running else "preparing"
            changed = status.generation != keeper.record.generation or live != keeper.record.state
            (keeper.update if changed else keeper.beat)(
                state=live,
                generation=status.generation,
                agents=[{"host": agent.host, "pid": agent.pid} for agent in status.agents],
                step=status.step,
                metrics=status.metrics,
            )
            if status.ended is not None or over:
                return status
            now = time.monotonic()
            if now - last_stop_poll > STOP_POLL_SECONDS:
                last_stop_poll = now
                if keeper.stop_requested():
                    self._stop.set()
            if self._stop.is_set() and not stop_sent:
                stop_sent = True
                self.display.line("stopping: every rank saves at its next step, then the run ends")
                coordinator.request_stop.remote()
            if (
                status.generation == keeper.record.generation == 0
                and now - began > WAITING_SECONDS
                and not told_waiting
            ):
                told_waiting = True
                self.display.line(waiting_message(self.config))
            self._stop.wait(STATUS_SECONDS) if not stop_sent else time.sleep(STATUS_SECONDS)


def node_resources(config: Config) -> dict[str, float]:
    """What one node agent asks of Ray: all cores that its ranks will use."""
    ranks = config.cluster.ranks_per_node
    match config.cluster.accelerator:
        case "cpu":
            return {"CPU": ranks}
        case "cuda":
            return {"CPU": 1, "GPU": ranks}
        case "neuron" | "neuron_xla":
            return {"CPU": 1, "neuron_cores": ranks}
        case "auto":
            raise AssertionError("preparation settles the accelerator")


def settle_accelerator(config: Config, cluster_resources: Mapping[str, float]) -> Config:
    """`auto` becomes what the cluster's nodes have."""
    if config.cluster.accelerator != "auto":
        return config
    found = "neuron" if "neuron_cores" in cluster_resources else "cuda" if "GPU" in cluster_resources else "cpu"
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"accelerator": found})})


def waiting_message(config: Config) -> str:
    """What was asked of Ray, and what the cluster has."""
    nodes = [
        ", ".join(f"{value:g} {key}" for key, value in sorted(node["Resources"].items()) if key in CORE_RESOURCES)
        for node in ray.nodes()
        if node["Alive"]
    ]
    asked = ", ".join(f"{value:g} {key}" for key, value in node_resources(config).items())
    return (
        f"waiting for {config.cluster.nodes} node(s) with {asked} free each; the cluster has {len(nodes)}: "
        f"({'), ('.join(nodes)}). It goes on when they are there: the autoscaler adds them, or another job ends"
    )


def ray_storage(store: Store) -> dict[str, Any]:
    """Where Ray Train keeps its own small state: beside the run, on the same file system."""
    if store.url.startswith("s3://"):
        import fsspec
        import pyarrow.fs

        return {
            "storage_path": store.url.removeprefix("s3://") + "/ray",
            "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("s3"))),
        }
    return {"storage_path": store.url + "/ray"}


def keeper_id(keeper: RecordKeeper) -> str:
    """A name for this driver's Ray Train state: Ray would take an equal name for a run to restore."""
    return f"{keeper.record.owner.pid}-{int(keeper.record.owner.pid_started or 0)}-{int(time.time())}"


class _InThread(threading.Thread):
    """A call in a thread, so that the main thread stays free for signals and the display."""

    def __init__(self, call: Callable[[], Any]):
        super().__init__(name="ray-train-fit", daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:  # shown by the driver, with the coordinator's own cause where it has one
            self.error = error


@contextlib.contextmanager
def stop_on_signals(driver: Driver) -> Iterator[None]:
    """First Ctrl-C, SIGTERM or `ray job stop`: save and end. The second Ctrl-C ends at once."""

    def first(signal_number: int, frame: Any) -> None:
        driver.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, first) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Mapping[str, float]]:
    """Joins the cluster at `address`, or starts one here that ends with the context. Yields its resources."""
    for name, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    local = {"include_dashboard": False, "_node_ip_address": LOOPBACK} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        raise LaunchError(
            f"cannot reach {where}: {error}. Check the address and that the cluster runs (`ray status`), and that "
            f"RAY_AUTH_MODE and the token are those of the cluster"
        ) from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
