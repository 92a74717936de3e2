"""The node agent: runs one node's ranks, generation after generation, and everything they must not wait for.

It forks the ranks, watches them, and passes on what they say: images to `saving.py`, all else to `reports.py`. It knows
no ray: `launch/worker.py` runs it inside a Ray Train worker and hands it the coordinator.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from raynium.accelerators.base import Accelerator, Place
from raynium.accelerators.detect import look
from raynium.accelerators.timeouts import EXECUTION_TIMEOUT_SECONDS
from raynium.checkpoint.format.manifest import ImageInfo
from raynium.config.images import image_slots
from raynium.config.schema import Config
from raynium.errors import DataError
from raynium.health.metadata_service import Instance
from raynium.health.neuron_monitor import DeviceMonitor, DeviceSample, has_devices
from raynium.health.notices import Notice, NoticeWatch, ask_for_notices
from raynium.node.buddies import Buddies, CopyError, buddies_of
from raynium.node.compile_cache import node_cache
from raynium.node.diagnosis import KERNEL_LOG, Diagnosis, KernelLog, seconds_for_others
from raynium.node.images import Snapshot
from raynium.node.looking import look_at
from raynium.node.node_zero import NodeZero
from raynium.node.orphans import end_orphans
from raynium.node.ranks import RankGroup, start_template, wait_for_template
from raynium.node.recovery_clock import AGREE, DRAIN, FORK
from raynium.node.reports import Reports
from raynium.node.saving import Saving
from raynium.node.spares import Spares
from raynium.node.uploader import Uploader
from raynium.rank.plan import RankPlan
from raynium.rank.ports import rendezvous_socket
from raynium.run.protocol import (
    LOOKS_SECONDS,
    PEER_WORD_SECONDS,
    AgentInfo,
    CannotGoOn,
    Coordinator,
    DevicesSeen,
    GoHome,
    NodeEnded,
    NodeLeaves,
    Order,
    RankExit,
    Said,
    StacksTaken,
    StandBy,
    Verdict,
    WentHome,
)
from raynium.storage.own_folder import drop_folder, own_folder, shared_memory_folder
from raynium.storage.process import is_halted
from raynium.tracking.tracker import Tracker
from raynium.train.link import Compiled, ImageWritten, RankMessage, Stop

logger = logging.getLogger(__name__)

# Ranks, their ends and the coordinator's verdict all end a poll early; this is for what we forgot.
POLL_SECONDS = 1.0
# After a death, while others may still say why: how often it is looked.
SETTLE_SECONDS = 0.01
# Ranks have got on for so long before others are made ready to take their places.
SPARES_AFTER_SECONDS = 1.0


@dataclass(frozen=True)
class Node:
    """Where this agent runs.

    attempt: one life of Ray Train's group of agents, of which `nodes` run a generation. seat: this one's place in it.
    host: the other nodes reach it there. node_id: Ray's. The others: as in AgentInfo.
    """

    attempt: str
    seat: int
    nodes: int
    host: str
    incarnation: int = 0
    node_id: str = ""
    instance: Instance | None = None
    zone: str = ""
    placement_group: str = ""


class NodeAgent:
    """Runs generations until the coordinator says that the run has ended."""

    def __init__(
        self,
        *,
        config: Config,
        run_url: str,
        node: Node,
        accelerator: Accelerator,
        coordinator: Coordinator,
        open_tracker: Callable[[], Tracker],
        data_places: Callable[[], list[str]],
        kernel_log: Path = KERNEL_LOG,
        neuron_monitor: str | None = None,
        ask_for_notices: Callable[[], list[Notice] | None] = ask_for_notices,
        secret: bytes = b"",
        wait_for_admission: Callable[[], None] = lambda: None,
    ):
        """open_tracker is called once this node is to run rank 0; data_places makes the stores ready.

        kernel_log: a file like Linux's /dev/kmsg. neuron_monitor: the program that is asked about Neuron devices; None:
        AWS's, if this job trains on them. ask_for_notices: see `health/notices.py`. secret: of the run's agents, with
        which they know each other. wait_for_admission: returns once this node may run ranks.
        """
        self.config = config
        self.run_url = run_url
        self.node = node
        self.accelerator = accelerator
        self.coordinator = coordinator
        self._node_zero = NodeZero(coordinator, open_tracker, node.attempt)
        self._data_places = data_places
        self._name = f"node {node.seat} ({node.host})"
        uploader = Uploader(run_url, silence_seconds=config.fault.upload_silence_seconds)
        per_node, num_images = config.cluster.ranks_per_node, image_slots(config.fault)
        self._saving = Saving(coordinator, uploader, ranks_per_node=per_node, num_images=num_images, host=node.host)
        self._cache = node_cache(accelerator, run_url, is_first=node.seat == 0, inherited=os.environ)
        self._kernel_log = KernelLog(kernel_log)
        self._diagnosis = Diagnosis(self._kernel_log)
        self._ask_for_notices = ask_for_notices
        self._wait_for_admission = wait_for_admission
        self._secret = secret
        # If this run copies snapshots to other nodes.
        self._buddies: Buddies | None = None
        asks_aws = accelerator.name.startswith("neuron") and has_devices()
        self._neuron_monitor = neuron_monitor or ("neuron-monitor" if asks_aws else None)
        self._last_generation = 0
        # In the newest generation; -1: this agent has run none.
        self.node_rank = -1
        self._group: RankGroup | None = None
        # Whether the run is another driver's by now.
        self._fenced = False
        # On a device they could hold neither cores nor device memory, which is what a start there waits for.
        self._makes_spares = accelerator.device_type == "cpu" and config.engine.kind == "native"
        self._spares: Spares | None = None

    def run(self) -> None:
        """Returns when the run has ended, however it ended; the coordinator knows how."""
        # torch is imported in there while we end orphans, whose memory, cores or lock ranks need, and prepare the data.
        # On a device the template compiles nothing: autograd counts the devices in its first use, for the ranks too.
        warms_up = self.config.engine.compile != "none" and self.accelerator.device_type == "cpu"
        start_template(run_url=self.run_url, compile_backend=self.accelerator.compile_backend if warms_up else None)
        for orphan in end_orphans():
            self.coordinator.tell(Said(f"{self._name}: {orphan}"))
        self._wait_for_admission()
        if self._cache.sync is not None:
            self._cache.sync.start()
        image_folder = own_folder(shared_memory_folder(), self.config.run.name)
        images, tell = self._saving.images, self.coordinator.tell
        self._buddies = buddies_of(self.config, self.node.host, image_folder, self._secret, images, tell)
        try:
            try:
                data_places = self._data_places()
            except DataError as error:
                # It would be the same on every node and at every try.
                self.coordinator.tell(CannotGoOn(f"{self._name}: {error}")).result()
                return
            try:
                self._run_generations(data_places, image_folder)
            finally:
                self._saving.wait()
                self._node_zero.close()
        finally:
            if self._cache.sync is not None:
                self._cache.sync.close()
            self._saving.close()
            if self._buddies is not None:
                self._buddies.close()
            self._kernel_log.close()
            drop_folder(image_folder)
        self.coordinator.tell(WentHome(self.node.attempt, self.node.seat, self.node.incarnation)).result()

    def rank_pids(self) -> list[int]:
        """Pids of the ranks that run now, in the order of their local ranks: for py-spy, gdb and tests."""
        alive = self._group.alive() if self._group else []
        return [each.process.pid for each in alive if each.process.pid is not None]

    def taken_over(self, cause: str) -> None:
        """Another driver owns the run: ends the ranks, also if the coordinator is too frozen to. Any thread."""
        self._fenced = True
        self.coordinator.tell(CannotGoOn(cause))
        if (group := self._group) is not None:
            group.ring()

    def uploader_pid(self) -> int | None:
        """Pid of the process that uploads, once one was needed: for the same."""
        return self._saving.uploader_pid()

    # ---- generations -------------------------------------------------------------------------------------------------

    def _run_generations(self, data_places: list[str], image_folder: Path) -> None:
        reports = Reports(
            self.config,
            self.coordinator,
            peak_flops_per_rank=lambda: self.accelerator.peak_flops(self.config.engine.dtype),
            halted=self._is_halted,
            device_seconds=EXECUTION_TIMEOUT_SECONDS if self.accelerator.name.startswith("neuron") else 0.0,
        )
        devices = self._watch_devices(reports)

        def leaves(why: Notice | None) -> None:
            self.coordinator.tell(NodeLeaves(self.node.node_id, str(why) if why is not None else None))

        notices = NoticeWatch(self._ask_for_notices, leaves, lambda: leaves(None))
        try:
            if self._cache.sync is not None:
                self._cache.sync.wait_filled()
            self._wait_for_template()
            while True:
                with rendezvous_socket(self.node.host) as rendezvous:
                    agent = self._info(rendezvous)
                    reports.recovery.begins(AGREE, time.monotonic())
                    order = self.coordinator.join(agent).result()
                    if isinstance(order, GoHome):
                        break
                    if isinstance(order, StandBy):
                        self._stand_by(order, image_folder)
                        continue
                    reports.recovery.begins(FORK, time.monotonic())
                    self.node_rank = order.node_rank(agent)
                    follows = order.generation == self._last_generation + 1
                    self._last_generation = order.generation
                    self._node_zero.begins(order, has_rank0=self.node_rank == 0, follows=follows)
                    reports.begin_generation(order, self._ranks(order), self._node_zero.tracker)
                    try:
                        group = self._fork(order, rendezvous, data_places=data_places, image_folder=image_folder)
                    except CopyError as error:
                        failed = RankExit(self._ranks(order)[0], 1, str(error), retry=True)
                        ended = NodeEnded((failed,), reports.end_generation())
                        self.coordinator.exited(agent, order, ended).result()
                        continue
                self._run_generation(group, agent, order, reports)
            self._node_zero.ends(order.ledger)
        finally:
            notices.close()
            self._drop_spares()
            if devices is not None:
                devices.close()

    def _wait_for_template(self) -> None:
        """Nothing counts on this node before it can fork: as a spare it would cost the others its imports."""
        try:
            wait_for_template()
        except (OSError, EOFError) as error:
            # Its ranks meet that again, and the user is told.
            logger.warning("this node's ranks cannot be forked yet (%s)", error or "EOF")

    def _stand_by(self, order: StandBy, image_folder: Path) -> None:
        """The node is a spare from now on, whose memory holds what others begin with, at most; if it had rank 0,
        another has MLflow now.
        """
        self._last_generation, self.node_rank = order.generation, -1
        self._drop_spares()
        if self._buddies is not None:
            self._buddies.begin_generation(order.lends, None, adopts=True)
        self._saving.begin_generation((), None, image_folder)
        self._node_zero.gives_up(order.resume_step)

    def _info(self, rendezvous: socket.socket) -> AgentInfo:
        return AgentInfo(
            attempt=self.node.attempt,
            seat=self.node.seat,
            nodes=self.node.nodes,
            host=self.node.host,
            free_port=rendezvous.getsockname()[1],
            pid=os.getpid(),
            incarnation=self.node.incarnation,
            images=self._saving.images.held(),
            uploading=self._saving.images.uploading(),
            buddy_port=0 if self._buddies is None else self._buddies.port,
            copies=() if self._buddies is None else self._buddies.held(),
            machine=look().product_name or "",
            node_id=self.node.node_id,
            instance=self.node.instance,
            zone=self.node.zone,
            placement_group=self.node.placement_group,
            last_generation=self._last_generation,
        )

    def _ranks(self, order: Order) -> range:
        """That this node runs."""
        return order.world.ranks_of(self.node_rank)

    def _environments(self, order: Order) -> dict[int, dict[str, str]]:
        """Rank → its whole environment: the standard variables, and what the accelerator's libraries read."""
        environments = {}
        for local_rank, rank in enumerate(self._ranks(order)):
            place = Place(
                rank=rank,
                world_size=order.world.size,
                local_rank=local_rank,
                local_world_size=order.world.ranks_per_node,
                master_host=order.master_host,
                master_port=order.master_port,
                run_name=self.config.run.name,
                inherited=os.environ,
            )
            environments[rank] = place.standard_variables() | {
                **self.accelerator.environment(place),
                **self._cache.environment,
            }
        return environments

    def _fork(
        self, order: Order, rendezvous: socket.socket, *, data_places: list[str], image_folder: Path
    ) -> RankGroup:
        held, where = order.resume_images, None
        if self._buddies is not None:
            self._buddies.begin_generation(held, order.buddies[self.node_rank], adopts=order.reshapes)
        self._saving.begin_generation(self._ranks(order), None if order.reshapes else held, image_folder)
        if self._buddies is not None and held is not None:
            if order.reshapes:
                where = str(self._buddies.gather(held, order.copies))
            else:
                for holder, ranks in order.copies.items():
                    for rank in set(ranks) & set(self._ranks(order)):
                        self._buddies.fetch(rank, held, holder)
        images = self._saving.images.find(held) if held is not None else {}
        plan = RankPlan(
            config=self.config,
            world=order.world,
            run_url=self.run_url,
            resume_step=order.resume_step,
            data_places=data_places,
            image_folder=str(image_folder),
            resume_images=images,
            held=where,
            undone_steps=list(order.left_out.undone),
            suspected_steps=list(order.left_out.suspected),
        )
        take_spare = self._spares.take if self._spares is not None else None
        try:
            return RankGroup(self._environments(order), plan.to_json(), rendezvous=rendezvous, take_spare=take_spare)
        finally:
            self._drop_spares()

    def _keep_spares(self, group: RankGroup, reports: Reports) -> None:
        """For the next generation, once the ranks of this one get on."""
        if self._spares is not None or not self._makes_spares or reports.stepping_seconds() < SPARES_AFTER_SECONDS:
            return
        try:
            self._spares = Spares(group)
        except (OSError, EOFError) as error:
            # It would take the ranks down each time: a template that fails to fork ends with all that it forked.
            self._makes_spares = False
            logger.warning("this node has no room for spare ranks (%s): a restart forks its ranks then", error or "EOF")

    def _drop_spares(self) -> None:
        if self._spares is not None:
            self._spares.close()
            self._spares = None

    def _run_generation(self, group: RankGroup, agent: AgentInfo, order: Order, reports: Reports) -> None:
        """Stays until all ranks have ended, because they did or because the coordinator said so."""
        self._group = group
        self._saving.serve(group)
        self._stay_with(group, agent, order, reports)
        reports.recovery.begins(DRAIN, time.monotonic())
        # ---- take the generation down: what the dead left behind explains them -------------------------------------
        ended_by_themselves = {each.rank for each in group.ended()}
        group.kill()
        self._handle(order, reports, *group.drain())
        ended = [each for rank, each in group.ranks.items() if rank in ended_by_themselves]
        exits, fault = self._diagnosis.explain((each.process.pid or 0, each.exit()) for each in ended)
        self._saving.serve(None)
        self._group = None
        group.close()
        # After a failure uploads go on: a checkpoint that they complete is worth having.
        if all(each.cause is None for each in exits) and len(exits) == len(group.ranks):
            self._saving.finish(agent, order)
        exits = self._cache.without_broken(exits)
        # The next generation may have it elsewhere.
        self._node_zero.tell()
        ended = NodeEnded(tuple(exits), reports.end_generation(), fault, reports.newest_step())
        self._saving.tell_end(agent, order, ended)

    def _stay_with(self, group: RankGroup, agent: AgentInfo, order: Order, reports: Reports) -> None:
        """Until all ranks have ended, or the rest must: one failed, or the coordinator says so."""
        stop_known, first_death = False, None
        verdict = self._watch(group, agent, order, stop_known=stop_known)
        poll_seconds = min(POLL_SECONDS, reports.positions_seconds)
        while group.alive():
            self._handle(order, reports, *group.poll(poll_seconds if first_death is None else SETTLE_SECONDS))
            if self._fenced:
                logger.warning("generation %d ends: another driver has taken the run over", order.generation)
                return
            if verdict.done():
                if verdict.result().kind == "over":
                    logger.info("generation %d is over: %s", order.generation, verdict.result().cause)
                    reports.recovery.failed(time.monotonic())
                    return
                if verdict.result().kind == "stop":
                    group.broadcast(Stop())
                    stop_known = True
                else:
                    self._look(group, order, reports)
                verdict = self._watch(group, agent, order, stop_known=stop_known)
            failed = [each for each in group.ended() if each.process.exitcode != 0]
            if failed:
                if first_death is None:
                    first_death = time.monotonic()
                    reports.recovery.failed(first_death)
                # The one that knows most decides how long the others' words are waited for.
                patience = min(
                    seconds_for_others(each.failure, each.process.exitcode)
                    if group.has_said_all(each)
                    else PEER_WORD_SECONDS
                    for each in failed
                )
                if time.monotonic() - first_death >= patience:
                    return
            reports.tell_positions()
            self._keep_spares(group, reports)
        if any(each.process.exitcode != 0 for each in group.ended()):
            reports.recovery.failed(time.monotonic())

    def _look(self, group: RankGroup, order: Order, reports: Reports) -> None:
        """The run hangs: what the ranks of all nodes do is kept, before the coordinator says that they are to die."""
        reports.recovery.failed(time.monotonic())
        looks = look_at(group, lambda messages, lines: self._handle(order, reports, messages, lines))
        for rank, each in sorted(looks.items()):
            logger.warning("the run hangs, and rank %d is here: %s", rank, each.stacks)
        told = self.coordinator.tell(StacksTaken(order.generation, self.node_rank, looks))
        try:
            reports.keep_artifacts(told.result(2 * LOOKS_SECONDS).artifacts)
        except TimeoutError:
            logger.warning("the coordinator did not take the stacks of this node's ranks in time: they are here only")

    def _watch(self, group: RankGroup, agent: AgentInfo, order: Order, *, stop_known: bool) -> "Future[Verdict]":
        verdict = self.coordinator.watch(agent, order, stop_known=stop_known)
        verdict.add_done_callback(lambda _: group.ring())
        return verdict

    def _handle(
        self,
        order: Order,
        reports: Reports,
        messages: Sequence[tuple[int, RankMessage]],
        lines: Sequence[tuple[int, str]],
    ) -> None:
        """Sends each message and output line of the ranks where it belongs."""
        for rank, line in lines:
            logger.info("rank %d | %s", rank, line)
            self._diagnosis.note(rank, line)
        for rank, message in messages:
            if isinstance(message, ImageWritten):
                info, replicas = ImageInfo.from_json(message.info), ImageInfo.from_json(message.replicas)
                snapshot = Snapshot(order.generation_id, order.world, order.resume_step, info, replicas)
                self._node_zero.tell()
                self._saving.take(rank, message.slot, snapshot, upload=message.upload)
                if self._buddies is not None:
                    self._buddies.offer(rank, message.slot, snapshot)
                continue
            reports.take(rank, message)
            if isinstance(message, Compiled) and self._cache.sync is not None:
                self._cache.sync.changed()

    def _is_halted(self, rank: int) -> bool:
        each = self._group.ranks.get(rank) if self._group is not None else None
        return each is not None and is_halted(each.process.pid or 0)

    def _watch_devices(self, reports: Reports) -> DeviceMonitor | None:
        if self._neuron_monitor is None:
            return None

        def publish(sample: DeviceSample) -> None:
            if self.node_rank < 0:
                # A spare's devices do nothing.
                return
            answer = self.coordinator.tell(DevicesSeen(self.node_rank, sample))
            if self.node_rank == 0:
                answer.add_done_callback(reports.keep_news)

        return DeviceMonitor(run_name=self.config.run.name, publish=publish, command=self._neuron_monitor)
