"""The node agent: runs one node's ranks, generation after generation, and everything they must not wait for.

It forks the ranks, watches them, uploads their snapshots, sends rank 0's metrics, and passes their output on. It knows
no ray: `driver.py` runs it inside a Ray Train worker and hands it a way to call the coordinator.
"""

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raynium.accelerators.base import Accelerator
from raynium.checkpoint.manifest import ImageInfo
from raynium.checkpoint.store import Store
from raynium.checkpoint.upload import upload_shard
from raynium.config.schema import Config
from raynium.errors import DataError, RayniumError
from raynium.launch.images import make_image_folder
from raynium.launch.protocol import AgentInfo, CoordinatorCalls, Order, Verdict
from raynium.launch.ranks import RankGroup, start_template
from raynium.rank_plan import RankPlan
from raynium.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # ranks, their ends and the coordinator's verdict all end a poll early; this is for what we forgot
SETTLE_SECONDS = 0.05  # after the first death: lets its peers' broken connections arrive, so that the cause is known
TRACKER_CLOSE_SECONDS = 30.0  # then the rest stays in the spool, and the next attempt on this node sends it
REPORT_SECONDS = 0.5  # the driver's display is not fed faster than this


@dataclass(frozen=True)
class Node:
    """Where this agent runs."""

    attempt: str  # one life of the Ray Train worker group
    node_rank: int
    host: str  # address the other nodes reach this one at


def free_port(host: str) -> int:
    """A TCP port that was free a moment ago on this host."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


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
    ):
        """open_tracker is called on rank 0's node only; data_folder fills this node's cache and returns its path."""
        self.config = config
        self.run_url = run_url
        self.node = node
        self.accelerator = accelerator
        self.coordinator = coordinator
        self._open_tracker = open_tracker
        self._data_folder = data_folder
        self._store = Store(run_url)
        self._uploads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="upload")
        self._last_report = 0.0
        self._group: RankGroup | None = None

    def run(self) -> None:
        """Returns when the run has ended, however it ended; the coordinator knows how."""
        start_template()  # torch is imported in there while we prepare the data
        images = make_image_folder(self.config.run.name)
        try:
            try:
                data_folder = self._data_folder()
            except DataError as error:  # would be the same on every node and at every try
                self.coordinator.call("give_up", f"node {self.node.node_rank} ({self.node.host}): {error}").result()
                return
            tracker = self._open_tracker() if self.node.node_rank == 0 else None
            try:
                while (order := self.coordinator.call("join", self._info()).result()).kind == "run":
                    self._run_generation(order, data_folder, images / order.generation_id, tracker)
            finally:
                if tracker is not None:
                    left = tracker.close(timeout_seconds=TRACKER_CLOSE_SECONDS)
                    if left.points_pending or left.artifacts_pending:
                        self.coordinator.call("tell", str(left)).result()
        finally:
            self._uploads.shutdown(wait=True)
            shutil.rmtree(images)

    def rank_pids(self) -> list[int]:
        """Pids of the ranks that run now, in the order of their local ranks: for py-spy, gdb and tests."""
        alive = self._group.alive() if self._group else []
        return [each.process.pid for each in alive if each.process.pid is not None]

    def _info(self) -> AgentInfo:
        return AgentInfo(self.node.attempt, self.node.node_rank, self.node.host, free_port(self.node.host), os.getpid())

    def _environments(self, order: Order) -> dict[int, dict[str, str]]:
        """Rank → its whole environment: the standard variables, and what the accelerator's libraries read."""
        per_node = self.config.cluster.ranks_per_node
        environments = {}
        for local_rank in range(per_node):
            rank = self.node.node_rank * per_node + local_rank
            environments[rank] = {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.config.world_size),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(per_node),
                "MASTER_ADDR": order.master_host,
                "MASTER_PORT": str(order.master_port),
            } | self.accelerator.environment(
                local_rank=local_rank, local_world_size=per_node, master_host=order.master_host
            )
        return environments

    def _run_generation(self, order: Order, data_folder: str, images: Path, tracker: Tracker | None) -> None:
        """Forks the ranks and stays until all have ended, because they did or because the coordinator said so."""
        images.mkdir()
        plan = RankPlan(
            config=self.config,
            run_url=self.run_url,
            resume_step=order.resume_step,
            data_folder=data_folder,
            image_folder=str(images),
        )
        group = self._group = RankGroup(self._environments(order), plan.to_json())
        saving: list[Future[None]] = []
        handle = _Handler(self, order, group, tracker, saving)
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
        exits = [each.exit() for rank, each in group.ranks.items() if rank in failed_before_kill]
        self._group = None
        group.close()
        # After a failure uploads go on: a checkpoint that they complete is worth having.
        self._uploads.submit(_remove_when_saved, images, saving)
        if all(each.cause is None for each in exits) and len(exits) == len(group.ranks):
            for upload in saving:  # the last checkpoint must be in before the generation may count as finished
                upload.result()
        if exits:
            self.coordinator.call("exited", order.generation, self.node.node_rank, exits).result()

    def _watch(self, order: Order, group: RankGroup, *, stop_known: bool) -> "Future[Verdict]":
        verdict = self.coordinator.call("watch", order.generation, stop_known)
        verdict.add_done_callback(lambda _: group.ring())
        return verdict

    def save_shard(self, order: Order, group: RankGroup, rank: int, info: ImageInfo) -> None:
        """Uploads one rank's image; runs in the upload pool. The rank may overwrite its image afterwards."""
        try:
            entry = upload_shard(self._store, info, generation=order.generation_id, rank=rank)
        except RayniumError as error:
            self.coordinator.call("shard_failed", order.generation, info.step, rank, str(error)).result()
        else:
            self.coordinator.call("shard_saved", order.generation, info.step, rank, entry.to_json()).result()
        finally:
            group.send(rank, {"kind": "image-free"})

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Feeds the driver's display: every evaluation, the last step, and else not more often than it can show."""
        now = time.monotonic()
        evaluated = any(name.startswith("eval/") for name in metrics)
        if evaluated or step == self.config.train.steps or now - self._last_report >= REPORT_SECONDS:
            self._last_report = now
            self.coordinator.call("report", step, metrics)

    def submit_upload(self, order: Order, group: RankGroup, rank: int, info: ImageInfo) -> Future[None]:
        return self._uploads.submit(self.save_shard, order, group, rank, info)


def _remove_when_saved(images: Path, saving: list[Future[None]]) -> None:
    """Gives back the memory of a generation that is over."""
    wait(saving)
    shutil.rmtree(images)


@dataclass
class _Handler:
    """Sends each message and output line of the ranks where it belongs."""

    agent: NodeAgent
    order: Order
    group: RankGroup
    tracker: Tracker | None
    saving: list[Future[None]]

    def __call__(self, messages: list[tuple[int, dict[str, Any]]], lines: list[tuple[int, str]]) -> None:
        for rank, line in lines:
            logger.info("rank %d | %s", rank, line)
        for rank, message in messages:
            if message["kind"] == "step":
                self._step(message["step"], message["metrics"])
            elif message["kind"] == "image":
                info = ImageInfo.from_json(message["info"])
                self.saving.append(self.agent.submit_upload(self.order, self.group, rank, info))

    def _step(self, step: int, metrics: dict[str, float]) -> None:
        metrics = metrics | {"run/generation": float(self.order.generation)}
        self.agent.report(step, metrics)
        assert self.tracker is not None
        self.tracker.append(metrics, step=step, unix_ms=int(time.time() * 1000))
