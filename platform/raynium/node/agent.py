"""The node agent: runs one node's ranks, generation after generation, and everything they must not wait for.

It forks the ranks, watches them, uploads their snapshots, sends rank 0's metrics, and passes their output on. It knows
no ray: `driver.py` runs it inside a Ray Train worker and hands it a way to call the coordinator.
"""

import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raynium.accelerators.base import Accelerator, Place
from raynium.accelerators.detect import look
from raynium.checkpoint.format.manifest import ImageInfo
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import DataError, StoreError, TrackingError
from raynium.health.neuron_monitor import DeviceMonitor, DeviceSample, has_devices
from raynium.node.compile_cache import node_cache
from raynium.node.diagnosis import KERNEL_LOG, Diagnosis, KernelLog
from raynium.node.images import NodeImages, SavedShard, Snapshot, make_image_folder
from raynium.node.orphans import end_orphans
from raynium.node.ports import rendezvous_port
from raynium.node.ranks import RankGroup, start_template
from raynium.node.uploader import Uploader
from raynium.rank.plan import RankPlan
from raynium.run.last_save import pause_before_next_try
from raynium.run.protocol import AgentInfo, Commit, CoordinatorCalls, Order, Verdict
from raynium.tracking.ledger import GenerationBook, Ledger
from raynium.tracking.tracker import Tracker
from raynium.train.link import IMAGE_SLOTS

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # ranks, their ends and the coordinator's verdict all end a poll early; this is for what we forgot
SETTLE_SECONDS = 0.05  # after the first death: lets its peers' broken connections arrive, so that the cause is known
TRACKER_CLOSE_SECONDS = 30.0  # then the rest stays in the spool, and the next attempt on this node sends it
COMMIT_LOG_CLOSE_SECONDS = 10.0
COMPILES_TOLD = 20  # on the user's terminal, of one node: a run that compiles at every step would fill it
REPORT_SECONDS = 0.5  # the driver's display is not fed faster than this
LEDGER_SECONDS = 10.0  # MLflow is not sent the goodput ledger faster than this


@dataclass(frozen=True)
class Node:
    """Where this agent runs."""

    attempt: str  # one life of the Ray Train worker group
    node_rank: int
    host: str  # address the other nodes reach this one at
    node_id: str = ""  # Ray's


class NodeAgent:
    """Runs generations until the coordinator says that the run has ended."""

    def __init__(
        self,
        *,
        config: Config,
        run_url: str,
        node: Node,
        accelerator: Accelerator,
        coordinator: CoordinatorCalls,
        open_tracker: Callable[[], Tracker],
        data_folder: Callable[[], str],
        kernel_log: Path = KERNEL_LOG,
        neuron_monitor: str | None = None,
    ):
        """open_tracker is called on rank 0's node only; data_folder fills this node's cache and returns its path.

        kernel_log: a file like Linux's /dev/kmsg. neuron_monitor: the program that is asked about Neuron devices; None:
        AWS's, if this job trains on them.
        """
        self.config = config
        self.run_url = run_url
        self.node = node
        self.accelerator = accelerator
        self.coordinator = coordinator
        self._open_tracker = open_tracker
        self._data_folder = data_folder
        per_node = config.cluster.ranks_per_node
        self._ranks = range(node.node_rank * per_node, (node.node_rank + 1) * per_node)
        self._images = NodeImages(self._ranks)
        self._cache = node_cache(accelerator, run_url, node_rank=node.node_rank, inherited=os.environ)
        self._uploader = Uploader(run_url)
        # Threads that wait for the uploader: one for each image that can be on its way.
        self._uploads = ThreadPoolExecutor(IMAGE_SLOTS * per_node, thread_name_prefix="upload")
        self._saving: list[Future[None]] = []  # each is done when the coordinator knows how that upload ended
        self._kernel_log = KernelLog(kernel_log)
        self._diagnosis = Diagnosis(self._kernel_log)
        self._neuron_monitor = neuron_monitor
        if neuron_monitor is None and accelerator.name.startswith("neuron") and has_devices():
            self._neuron_monitor = "neuron-monitor"
        self._device_metrics: dict[str, float] = {}  # of all nodes, on node 0, until a step takes them along
        self._compiles_told: set[tuple[int, int, str]] = set()  # generation, step, what was said
        self._last_report = self._last_ledger = -math.inf  # a steady clock may begin at 0 when the machine starts
        self._goodput_metrics: dict[str, float] = {}  # of the run, until a step takes them along
        # As the coordinator knows, unless it was started again. Only node 0's agent hears of steps.
        self._trained_step = 0
        self._last_generation = 0
        self._group: RankGroup | None = None
        self._group_lock = threading.Lock()  # image offers go to the ranks of now, from any thread

    def run(self) -> None:
        """Returns when the run has ended, however it ended; the coordinator knows how."""
        # torch is imported in there while we prepare the data.
        compiles = self.config.engine.compile != "none"
        start_template(run_url=self.run_url, compile_backend=self.accelerator.compile_backend if compiles else None)
        for orphan in end_orphans():  # before any rank needs its memory, its cores or its lock
            self.coordinator.call("tell", f"node {self.node.node_rank} ({self.node.host}): {orphan}")
        if self._cache.sync is not None:
            self._cache.sync.start()
        image_folder = make_image_folder(self.config.run.name)
        try:
            try:
                data_folder = self._data_folder()
            except DataError as error:  # would be the same on every node and at every try
                self.coordinator.call("give_up", f"node {self.node.node_rank} ({self.node.host}): {error}").result()
                return
            tracker = self._open_tracker() if self.node.node_rank == 0 else None
            commits = _CommitLog(self.coordinator, tracker) if tracker is not None else None
            devices = self._watch_devices()
            try:
                if self._cache.sync is not None:
                    self._cache.sync.wait_filled()
                while (order := self.coordinator.call("join", self._info()).result()).kind == "run":
                    self._run_generation(order, data_folder, image_folder, tracker)
                if tracker is not None:
                    tracker.append(order.ledger.metrics(), step=order.ledger.step, unix_ms=int(time.time() * 1000))
            finally:
                if devices is not None:
                    devices.close()
                if tracker is not None and commits is not None:
                    self._uploads.shutdown(wait=True)
                    commits.close()
                    left = tracker.close(timeout_seconds=TRACKER_CLOSE_SECONDS)
                    if left.points_pending or left.artifacts_pending:
                        self.coordinator.call("tell", str(left)).result()
        finally:
            if self._cache.sync is not None:
                self._cache.sync.close()
            self._uploads.shutdown(wait=True)
            self._uploader.close()
            self._kernel_log.close()
            shutil.rmtree(image_folder)

    def rank_pids(self) -> list[int]:
        """Pids of the ranks that run now, in the order of their local ranks: for py-spy, gdb and tests."""
        alive = self._group.alive() if self._group else []
        return [each.process.pid for each in alive if each.process.pid is not None]

    def uploader_pid(self) -> int | None:
        """Pid of the process that uploads, once one was needed: for the same."""
        return self._uploader.pid()

    def _info(self) -> AgentInfo:
        return AgentInfo(
            attempt=self.node.attempt,
            node_rank=self.node.node_rank,
            host=self.node.host,
            free_port=rendezvous_port(self.node.host),
            pid=os.getpid(),
            images=self._images.held(),
            uploading=self._images.uploading(),
            machine=look().product_name or "",
            node_id=self.node.node_id,
            last_generation=self._last_generation,
        )

    def _environments(self, order: Order) -> dict[int, dict[str, str]]:
        """Rank → its whole environment: the standard variables, and what the accelerator's libraries read."""
        world = order.world
        assert world is not None, "an order to run has a world"
        environments = {}
        for local_rank, rank in enumerate(world.ranks_of(self.node.node_rank)):
            place = Place(
                rank=rank,
                world_size=world.size,
                local_rank=local_rank,
                local_world_size=world.ranks_per_node,
                master_host=order.master_host,
                master_port=order.master_port,
                run_name=self.config.run.name,
                inherited=os.environ,
            )
            environments[place.rank] = {
                "RANK": str(place.rank),
                "WORLD_SIZE": str(place.world_size),
                "LOCAL_RANK": str(place.local_rank),
                "LOCAL_WORLD_SIZE": str(place.local_world_size),
                "MASTER_ADDR": place.master_host,
                "MASTER_PORT": str(place.master_port),
            } | {**self.accelerator.environment(place), **self._cache.environment}
        return environments

    def _run_generation(self, order: Order, data_folder: str, image_folder: Path, tracker: Tracker | None) -> None:
        """Forks the ranks and stays until all have ended, because they did or because the coordinator said so."""
        self._last_generation = order.generation
        handle = _Handler(self, order, tracker)
        self._images.start_generation(order.resume_images)
        # A coordinator that was started again knows of no shard, and who starts from the last step saves it no more
        self._saving += [self._uploads.submit(self._tell_saved, saved) for saved in self._images.saved()]
        plan = RankPlan(
            config=self.config,
            world=handle.world,
            run_url=self.run_url,
            resume_step=order.resume_step,
            data_folder=data_folder,
            image_folder=str(image_folder),
            resume_images=self._images.find(order.resume_images) if order.resume_images is not None else {},
        )
        group = RankGroup(self._environments(order), plan.to_json())
        with self._group_lock:
            self._group = group
        self._offer_images()
        verdict = self._watch(order, group, stop_known=False)
        while group.alive():
            handle(*group.poll(POLL_SECONDS))
            if verdict.done():
                if verdict.result().kind == "over":
                    break
                group.broadcast({"kind": "stop"})
                verdict = self._watch(order, group, stop_known=True)
            if any(each.process.exitcode != 0 for each in group.ended()):
                time.sleep(SETTLE_SECONDS)
                break
        # ---- take the generation down: what the dead left behind explains them -------------------------------------
        failed_before_kill = {each.rank for each in group.ended()}
        group.kill()
        handle(*group.drain())
        if self.node.node_rank == 0:
            self._account(order, handle.book.ledger()).result()  # before the coordinator closes this generation
        ended = [each for rank, each in group.ranks.items() if rank in failed_before_kill]
        exits, fault = self._diagnosis.explain((each.process.pid or 0, each.exit()) for each in ended)
        with self._group_lock:
            self._group = None
        group.close()
        # After a failure uploads go on: a checkpoint that they complete is worth having.
        if all(each.cause is None for each in exits) and len(exits) == len(group.ranks):
            self._finish_saving(order)
        if exits:
            self.coordinator.call("exited", order.generation, self.node.node_rank, exits).result()
        if fault is not None:
            self.coordinator.call("node_fault", order.generation, self.node.node_rank, fault).result()

    def _watch(self, order: Order, group: RankGroup, *, stop_known: bool) -> "Future[Verdict]":
        verdict = self.coordinator.call("watch", order.generation, stop_known)
        verdict.add_done_callback(lambda _: group.ring())
        return verdict

    def _offer_images(self) -> None:
        with self._group_lock:
            if self._group is not None:
                for rank, slot in self._images.take_offers():
                    self._group.send(rank, {"kind": "image-free", "slot": slot})

    def note_output(self, rank: int, line: str) -> None:
        """Keeps what may explain the rank's end."""
        self._diagnosis.note(rank, line)

    def compiled(self, order: Order, rank: int, step: int, graphs: int, seconds: float, surprises: list[str]) -> None:
        """A rank compiled; what should not have been is told to the user, once for all ranks of this node."""
        if rank == self._ranks.start:
            logger.info("step %d, rank %d: %d graph(s) compiled in %.1f s", step, rank, graphs, seconds)
        for surprise in surprises:
            said = f"step {step}, rank {rank}: {surprise}"
            logger.warning(said)
            # Ranks differ in the seconds only.
            told = order.generation, step, re.sub(r"\([\d.]+ s\)", "", surprise)
            if told not in self._compiles_told and len(self._compiles_told) < COMPILES_TOLD:
                self._compiles_told.add(told)
                more = " (more are in the log only)" if len(self._compiles_told) == COMPILES_TOLD else ""
                self.coordinator.call("tell", said + more)
        if self._cache.sync is not None:
            self._cache.sync.changed()

    def save(self, order: Order, rank: int, slot: int, snapshot: Snapshot) -> None:
        """Takes over a rank's complete image."""
        self._images.complete(rank, slot, snapshot)
        self._offer_images()
        self._saving = [upload for upload in self._saving if not upload.done()]
        self._saving.append(self._uploads.submit(self._save_shard, rank, slot, snapshot, again=False))

    def _save_shard(self, rank: int, slot: int, snapshot: Snapshot, *, again: bool) -> None:
        try:
            entry = self._uploader.upload(snapshot.info, generation=snapshot.generation_id, rank=rank, again=again)
        except Exception as error:  # whatever it was, this image is in memory only
            failure = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            self._images.uploaded(rank, slot, failure=failure)
            self._offer_images()
            self.coordinator.call("shard_failed", snapshot.info.step, rank, failure).result()
            return
        saved = SavedShard(rank, snapshot, entry, time.monotonic() - snapshot.taken)
        self._images.uploaded(rank, slot, saved=saved)
        self._offer_images()
        self._tell_saved(saved)

    def _tell_saved(self, saved: SavedShard) -> None:
        self.coordinator.call(
            "shard_saved",
            saved.snapshot.info.step,
            saved.rank,
            saved.entry.to_json(),
            saved.upload_seconds,
            saved.snapshot.parent_step,
        ).result()

    def _finish_saving(self, order: Order) -> None:
        """The ranks are through. Their last checkpoint must be in before the run may count as finished.

        Whichever generation saved it. What could not be uploaded is still in memory, and tried again for a while.
        """
        over = self.coordinator.call("watch", order.generation, True)  # a node whose ranks still run may lose one
        began, tries = time.monotonic(), 0
        while True:
            for upload in self._saving:
                upload.result()
            failed = self._images.failed()
            tries += 1
            pause = pause_before_next_try(tries, time.monotonic() - began)
            if not failed or pause is None:
                return
            steps, cause = {each.snapshot.info.step for each in failed}, failed[0].failure
            self.coordinator.call(
                "tell",
                f"node {self.node.node_rank}: {len(failed)} shard(s) of step {max(steps)} are still in memory only, "
                f"and are uploaded again in {pause:.0f} s: {cause}",
            )
            wait([over], pause)
            if over.done():
                over.result()
                return
            self._saving = [
                self._uploads.submit(self._save_shard, each.rank, each.slot, each.snapshot, again=True)
                for each in failed
            ]

    def _watch_devices(self) -> DeviceMonitor | None:
        if self._neuron_monitor is None:
            return None
        return DeviceMonitor(run_name=self.config.run.name, publish=self._publish_devices, command=self._neuron_monitor)

    def _publish_devices(self, sample: DeviceSample) -> None:
        answer = self.coordinator.call("device_sample", self.node.node_rank, sample)
        if self.node.node_rank == 0:
            answer.add_done_callback(self._keep_device_metrics)

    def _keep_device_metrics(self, answer: "Future[dict[str, float]]") -> None:
        if not answer.cancelled() and answer.exception() is None:  # without a coordinator, `watch` ends the generation
            self._device_metrics = answer.result()

    def take_device_metrics(self, world: World, mfu: float | None) -> dict[str, float]:
        """Those that no step has reported yet. mfu: of this step, with attention; None: not known."""
        taken, self._device_metrics = self._device_metrics, {}
        counted = taken.get("device/flops_per_second")
        if mfu and counted is not None:
            peak_flops = self.accelerator.peak_flops(self.config.engine.dtype)
            assert peak_flops is not None, "the rank that reports an MFU had one"
            taken["device/flops_to_estimate_ratio"] = counted / (mfu * peak_flops * world.size)
        return taken

    def new_book(self, order: Order) -> GenerationBook:
        """For the ledger of a generation that begins now."""
        return GenerationBook(trained_step=max(self._trained_step, order.ledger.step), now=time.monotonic())

    def take_goodput_metrics(self, step: int) -> dict[str, float]:
        """The run's ledger, now and then. The last step's is the one that holds the run's end: see `run`."""
        if step == self.config.train.steps:  # MLflow keeps one value of each step, the first
            return {}
        taken, self._goodput_metrics = self._goodput_metrics, {}
        return taken

    def _account(self, order: Order, ledger: Ledger) -> "Future[Ledger]":
        self._trained_step = ledger.step
        answer = self.coordinator.call("account", order.generation, ledger)
        answer.add_done_callback(self._keep_run_ledger)
        return answer

    def _keep_run_ledger(self, answer: "Future[Ledger]") -> None:
        now = time.monotonic()
        if now - self._last_ledger < LEDGER_SECONDS or answer.cancelled() or answer.exception() is not None:
            return
        self._last_ledger = now
        self._goodput_metrics = answer.result().metrics()

    def report(self, order: Order, step: int, metrics: dict[str, float], ledger: Ledger) -> None:
        """Feeds the driver's display: every evaluation, the last step, and else not more often than it can show.

        ledger: of this generation so far.
        """
        now = time.monotonic()
        evaluated = any(name.startswith("eval/") for name in metrics)
        if evaluated or step == self.config.train.steps or now - self._last_report >= REPORT_SECONDS:
            self._last_report = now
            self.coordinator.call("report", step, metrics)
            self._account(order, ledger)


class _CommitLog:
    """Writes each commit into MLflow: its numbers at its step, and the list of the run's checkpoints as an artifact."""

    def __init__(self, coordinator: CoordinatorCalls, tracker: Tracker):
        self._coordinator = coordinator
        self._tracker = tracker
        self._thread = threading.Thread(target=self._follow, name="commit-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Once the run has ended: returns when the last commit is written down, or the coordinator is out of reach."""
        self._thread.join(COMMIT_LOG_CLOSE_SECONDS)

    def _follow(self) -> None:
        seen = 0
        while True:
            try:
                commits: list[Commit] | None = self._coordinator.call("commits", seen).result()
            except Exception as error:  # Ray's own errors, which this file must not import: the coordinator is gone
                logger.warning("checkpoints are no longer written into MLflow: %s", error)
                return
            if commits is None:
                return
            for commit in commits:
                seen = commit.number
                self._tracker.append(commit.metrics, step=commit.step, unix_ms=int(time.time() * 1000))
                try:
                    self._tracker.artifact("checkpoints.json", commit.checkpoints)
                except TrackingError as error:  # the disk is full: the next commit's list holds this one too
                    logger.warning("the list of checkpoints does not reach MLflow: %s", error)


@dataclass
class _Handler:
    """Sends each message and output line of the ranks where it belongs."""

    agent: NodeAgent
    order: Order
    tracker: Tracker | None

    def __post_init__(self) -> None:
        assert self.order.world is not None
        self.world = self.order.world
        self.book = self.agent.new_book(self.order)

    def __call__(self, messages: list[tuple[int, dict[str, Any]]], lines: list[tuple[int, str]]) -> None:
        for rank, line in lines:
            logger.info("rank %d | %s", rank, line)
            self.agent.note_output(rank, line)
        for rank, message in messages:
            if message["kind"] == "step":
                self.book.step(message["step"], message["metrics"], time.monotonic())
                self._step(message["step"], message["metrics"])
            elif message["kind"] == "compiled":
                fields = (message[name] for name in ("step", "graphs", "seconds", "surprises"))
                self.agent.compiled(self.order, rank, *fields)
                if rank == 0:
                    self.book.compiled(message["seconds"])
            elif message["kind"] == "image":
                info, replicas = (ImageInfo.from_json(message[name]) for name in ("info", "replicas"))
                snapshot = Snapshot(self.order.generation_id, self.order.resume_step, info, replicas)
                self.agent.save(self.order, rank, message["slot"], snapshot)

    def _step(self, step: int, metrics: dict[str, float]) -> None:
        if "checkpoint/skipped_saves" in metrics:
            why = "earlier ones are still being uploaded (checkpoint.if_busy=skip)"
            self.agent.coordinator.call("tell", f"step {step}: no checkpoint, because {why}")
        metrics = metrics | {"run/generation": float(self.order.generation)}
        metrics |= self.agent.take_device_metrics(self.world, metrics.get("throughput/mfu_with_attention"))
        self.agent.report(self.order, step, metrics, self.book.ledger())
        assert self.tracker is not None
        metrics |= self.agent.take_goodput_metrics(step)
        self.tracker.append(metrics, step=step, unix_ms=int(time.time() * 1000))
