"""The run coordinator: numbers generations, hands out their rendezvous, commits checkpoints, decides when to give up.

One small actor per run. It is an ordinary asyncio class: `driver.py` makes a Ray actor of it, tests run it on a loop.
If it dies, Ray starts a new one without memory; the agents' `watch` then returns "over", they join again, and the run
goes on from the newest checkpoint. What must outlive it is in the run's store.
"""

import asyncio
import json
import math
import secrets
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from raynium.accelerators.neuron_errors import ACTIONS, Fault
from raynium.accelerators.neuron_monitor import DeviceSample
from raynium.accelerators.neuron_monitor import metrics as device_metrics
from raynium.checkpoint.catalog import CheckpointRef, list_checkpoints, resume_point, set_aside
from raynium.checkpoint.commit import StepTaken, commit_checkpoint
from raynium.checkpoint.manifest import CHECKPOINTS_FOLDER, ShardEntry
from raynium.checkpoint.retention import Retention, apply_retention
from raynium.checkpoint.store import Store
from raynium.config.schema import Config
from raynium.errors import CheckpointDamaged, CheckpointError, StoreError
from raynium.launch.protocol import AgentInfo, Commit, Event, HeldImages, Order, RankExit, Status, Verdict

EVENTS_KEPT = 1000
DEVICE_SAMPLE_SECONDS = 60.0  # an older one is of a node whose monitor ended
HELD_OUT_METRICS = ("eval/loss", "eval/bits_per_byte")  # a checkpoint keeps those of its step


@dataclass
class _Generation:
    """One life of the ranks."""

    number: int
    id: str
    resume_step: int | None
    agents: tuple[AgentInfo, ...]
    state: Literal["running", "over"] = "running"
    cause: str = ""
    exits: dict[int, list[RankExit]] = field(default_factory=dict)  # node rank → its ranks' ends
    resume_images: HeldImages | None = None  # where the ranks' state came from, if not from the store
    shards: dict[int, dict[int, ShardEntry]] = field(default_factory=dict)  # step → rank → entry
    upload_seconds: dict[int, float] = field(default_factory=dict)  # step → of its slowest shard
    commits: set[asyncio.Task[None]] = field(default_factory=set)
    faults: dict[int, Fault] = field(default_factory=dict)  # node rank → what is broken there


class RunCoordinator:
    """All methods are coroutines on one loop, so each runs unbroken between its awaits."""

    def __init__(self, config: dict[str, Any], run_url: str, last_generation: int):
        """config: the resolved config as a dict; last_generation: of the run's earlier drivers, 0 for a new run."""
        self.config = Config.model_validate(config)
        self.store = Store(run_url)
        self._changed = asyncio.Condition()
        self._attempt = ""
        self._joined: dict[int, AgentInfo] = {}
        self._orders: dict[tuple[str, int], Order] = {}
        self._number = last_generation
        self._generation: _Generation | None = None
        self._generations: dict[int, _Generation] = {}
        self._stop_requested = False
        self._failures_without_progress = 0
        self._uploading_ids: list[str] = []  # generations of this attempt, whose agents may still upload for them
        self._damaged_step: int | None = None  # found by ranks, to be set aside before the next generation
        self._distrusted_images: set[tuple[str, int]] = set()  # ranks that started from them made no step
        self._evaluations: dict[int, dict[str, float]] = {}  # step → eval/… metrics, until its checkpoint is committed
        self._commits: list[Commit] = []
        self._committed_step: int | None = None
        self._committed_uri: str | None = None
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._devices: dict[int, tuple[float, DeviceSample]] = {}  # node rank → when it came, and the newest
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._event_count = 0
        self._ended: Literal["finished", "stopped", "failed"] | None = None
        self._cause: str | None = None

    # ---- node agents -----------------------------------------------------------------------------------------------

    async def join(self, agent: AgentInfo) -> Order:
        """Waits until every node is ready, then orders the next generation. An agent joins with no rank running."""
        async with self._changed:
            if agent.attempt != self._attempt:
                # Ray Train started a new worker group: the agents of the one before are gone.
                self._attempt = agent.attempt
                self._joined.clear()
                self._uploading_ids.clear()
                self._devices.clear()
                if self._generation is not None and self._generation.state == "running":
                    cause = "a node agent was lost; Ray Train started the node agents again"
                    self._append_event(f"generation {self._generation.number} failed: {cause}")
                    self._over(self._generation, cause)
            key = (agent.attempt, agent.node_rank)
            self._orders.pop(key, None)
            self._joined[agent.node_rank] = agent
            if len(self._joined) == self.config.cluster.nodes and self._ended is None:
                await self._order_generation()
            await self._changed.wait_for(
                lambda: self._ended is not None or key in self._orders or self._attempt != agent.attempt
            )
            if self._ended is not None or self._attempt != agent.attempt:
                return Order("end")
            return self._orders[key]

    async def watch(self, generation: int, stop_known: bool) -> Verdict:
        """Returns when the agent must act: the generation is over, or a stop was asked for that it does not know."""

        def over() -> bool:
            current = self._generations.get(generation)
            return current is None or current.state == "over" or self._ended is not None

        async with self._changed:
            await self._changed.wait_for(lambda: over() or (self._stop_requested and not stop_known))
            if not over():
                return Verdict("stop")
            known = self._generations.get(generation)
            return Verdict("over", known.cause if known else "the run coordinator was started again")

    async def exited(self, generation: int, node_rank: int, exits: list[RankExit]) -> None:
        """All ranks of one node have ended. One that should not have takes the generation down."""
        current = self._generations.get(generation)
        if current is None:
            return
        async with self._changed:
            current.exits[node_rank] = exits
            first = _first_cause(exits)
            if first is not None:
                self._report_failure(current, node_rank, first)
            elif len(current.exits) < self.config.cluster.nodes or current.state == "over":
                return
        if first is None:
            await self._finish(current, exits[0])

    async def node_fault(self, generation: int, node_rank: int, fault: Fault) -> None:
        """Something is broken on a node, though none of its ranks died of it: they hung, or trained on."""
        current = self._generations.get(generation)
        if current is not None:
            self._tell_fault(current, node_rank, fault)

    async def device_sample(self, node_rank: int, sample: DeviceSample) -> dict[str, float]:
        """One node's devices; returns the metrics of all nodes' newest samples."""
        now = time.monotonic()
        self._devices[node_rank] = now, sample
        return device_metrics(one for came, one in self._devices.values() if now - came <= DEVICE_SAMPLE_SECONDS)

    async def shard_saved(self, generation: int, step: int, rank: int, entry_json: str, upload_seconds: float) -> None:
        """One rank's shard is in the store, verified. The last one of a step commits the checkpoint."""
        current = self._generations.get(generation)
        if current is None:
            return
        shards = current.shards.setdefault(step, {})
        shards[rank] = ShardEntry.from_json(entry_json)
        current.upload_seconds[step] = max(current.upload_seconds.get(step, 0.0), upload_seconds)
        if len(shards) == self.config.world_size:
            task = asyncio.create_task(self._commit(current, step))
            current.commits.add(task)
            await task

    async def shard_failed(self, generation: int, step: int, rank: int, cause: str) -> None:
        """A shard could not be uploaded: this step's checkpoint will never exist; training goes on."""
        await self.tell(f"checkpoint of step {step} is lost: rank {rank}'s shard could not be saved: {cause}")

    async def give_up(self, cause: str) -> None:
        """An agent cannot do its part, and no other try could."""
        async with self._changed:
            self._end("failed", cause)

    async def report(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0's numbers, for the driver's display."""
        self._step = step
        self._metrics.update(metrics)
        if evaluation := {name: value for name, value in metrics.items() if name in HELD_OUT_METRICS}:
            self._evaluations[step] = evaluation

    async def commits(self, after: int) -> list[Commit] | None:
        """Those since commit number `after`; waits for one. None: the run has ended, no more come."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._commits) > after or self._ended is not None)
            return self._commits[after:] or None

    async def tell(self, text: str) -> None:
        """A line for the user's terminal."""
        self._append_event(text)

    # ---- driver ----------------------------------------------------------------------------------------------------

    async def request_stop(self) -> None:
        """Every rank saves at the next step and ends. Before any rank runs, the run just ends."""
        async with self._changed:
            self._stop_requested = True
            if self._generation is None or self._generation.state == "over":
                self._end("stopped", None)
            self._changed.notify_all()

    async def status(self, events_after: int) -> Status:
        """Events numbered above `events_after` come along."""
        current = self._generation
        return Status(
            generation=self._number,
            running=current is not None and current.state == "running",
            resume_step=current.resume_step if current else None,
            step=self._step,
            metrics=dict(self._metrics),
            committed_step=self._committed_step,
            committed_uri=self._committed_uri,
            agents=current.agents if current else (),
            ended=self._ended,
            cause=self._cause,
            events=tuple(event for event in self._events if event.number > events_after),
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    async def _order_generation(self) -> None:
        """All agents are here and no rank runs. Called with the lock held."""
        images = self._newest_images()
        if images is not None:  # as new as any checkpoint, since every checkpoint was such an image
            resume_step: int | None = images.step
        else:
            try:
                resume_step = await self._resume_step()
            except (StoreError, CheckpointError) as error:
                self._end("failed", f"no checkpoint could be chosen to go on from: {error}")
                return
        self._number += 1
        # The suffix keeps two drivers apart that count from the same number.
        generation_id = f"g{self._number:05d}-{secrets.token_hex(4)}"
        agents = tuple(agent for _, agent in sorted(self._joined.items()))
        self._generation = _Generation(self._number, generation_id, resume_step, agents, resume_images=images)
        self._generations[self._number] = self._generation
        self._uploading_ids.append(generation_id)
        self._step = resume_step or 0
        for agent in agents:
            self._orders[(agent.attempt, agent.node_rank)] = Order(
                "run", self._number, generation_id, agents[0].host, agents[0].free_port, resume_step, images
            )
        self._joined.clear()
        ranks = f"{self.config.world_size} ranks on {self.config.cluster.nodes} node(s)"
        origin = f"from the checkpoint of step {resume_step}" if resume_step is not None else "from step 0"
        if images is not None:
            origin = f"from the snapshot of step {resume_step} in memory"
        await self.tell(f"generation {self._number}: {ranks}, {origin}")
        self._changed.notify_all()

    async def _resume_step(self) -> int | None:
        """The step of the checkpoint to go on from; None: from the beginning."""
        if not self._uploading_ids:  # no agent of an earlier attempt lives: what is open will never be finished
            await asyncio.to_thread(self.store.discard_unfinished, CHECKPOINTS_FOLDER, older_than_unix=math.inf)
        if self._damaged_step is not None:
            await self.tell(f"CHECKPOINT DAMAGED: {await asyncio.to_thread(set_aside, self.store, self._damaged_step)}")
            self._damaged_step = None
        point = await asyncio.to_thread(resume_point, self.store, if_damaged=self.config.checkpoint.if_damaged)
        for note in point.set_aside:
            await self.tell(f"CHECKPOINT DAMAGED: {note}")
        if point.checkpoint is None:
            return None
        self._committed_step, self._committed_uri = point.checkpoint.step, point.checkpoint.uri
        return point.checkpoint.step

    def _newest_images(self) -> HeldImages | None:
        """The newest snapshot that every rank of the world has in its node's memory."""
        ranks: dict[tuple[str, int], set[int]] = defaultdict(set)
        for agent in self._joined.values():
            for held in agent.images:
                ranks[held.generation_id, held.step].update(held.ranks)
        whole = [
            key
            for key, found in ranks.items()
            if len(found) == self.config.world_size and key not in self._distrusted_images
        ]
        if not whole:
            return None
        generation_id, step = max(whole, key=lambda key: key[1])
        return HeldImages(generation_id, step, tuple(range(self.config.world_size)))

    def _report_failure(self, current: _Generation, node_rank: int, first: RankExit) -> None:
        """Called with the lock held."""
        if current.state == "over" and first.fault is not None:  # but it may say what the first one died of
            self._tell_fault(current, node_rank, first.fault)
        if current.state == "over":  # the ranks were killed because another node's died: not a cause of its own
            return
        assert first.cause is not None
        cause = f"rank {first.rank}: {first.cause}"
        for line in first.last_lines:
            self._append_event(f"  rank {first.rank} | {line}")
        self._append_event(f"generation {current.number} failed: {cause}")
        if first.fault is not None:
            self._tell_fault(current, node_rank, first.fault)
        if current.resume_images is not None and self._step <= current.resume_images.step:
            self._distrusted_images.add((current.resume_images.generation_id, current.resume_images.step))
        self._over(current, cause)
        if not first.retry or not self._may_go_on(current, first.error):
            self._end("failed", cause)

    def _tell_fault(self, current: _Generation, node_rank: int, fault: Fault) -> None:
        """Names the node that somebody has to see to, once a generation, with the line that says so."""
        if not fault.names_the_node or node_rank in current.faults:
            return
        current.faults[node_rank] = fault
        node = f"node {node_rank} ({current.agents[node_rank].host})"
        self._append_event(f"  {node} | {fault.evidence}")
        self._append_event(f"{node}: {fault}: {ACTIONS[fault.action]}")

    def _may_go_on(self, current: _Generation, error: str | None) -> bool:
        """What the policy says if ranks found, only while they read it, that their checkpoint is damaged."""
        if error != CheckpointDamaged.__name__ or current.resume_images is not None:
            return True
        if self.config.checkpoint.if_damaged == "stop":
            self._append_event(
                f"the checkpoint of step {current.resume_step} is damaged: look at it with `raynium checkpoints verify "
                "--deep`, then set checkpoint.if_damaged=use_older to go on from the next older one"
            )
            return False
        self._damaged_step = current.resume_step
        return True

    def _over(self, current: _Generation, cause: str) -> None:
        """Called with the lock held."""
        current.state, current.cause = "over", cause
        self._failures_without_progress += 1
        limit = self.config.fault.max_restarts_without_progress
        if self._stop_requested:
            self._end("stopped", None)
        elif self._failures_without_progress > limit:
            self._end(
                "failed",
                f"{cause}. It was the {self._failures_without_progress}th failure without a new checkpoint between "
                f"(fault.max_restarts_without_progress={limit})",
            )
        self._changed.notify_all()

    async def _commit(self, current: _Generation, step: int) -> None:
        entries = [entry for _, entry in sorted(current.shards.pop(step).items())]
        upload_seconds = current.upload_seconds.pop(step)
        config = self.config
        began = time.perf_counter()
        try:
            reference = await asyncio.to_thread(
                commit_checkpoint,
                self.store,
                step=step,
                generation=current.id,
                entries=entries,
                state=checkpoint_state(config, step),
                world_size=config.world_size,
                layout=layout(config),
                parent_step=current.resume_step,
                metrics=self._evaluations.pop(step, {}),
                upload_seconds=upload_seconds,
            )
            commit_seconds = time.perf_counter() - began
            if self._committed_step is None or step > self._committed_step:
                self._committed_step, self._committed_uri = step, reference.uri
                self._failures_without_progress = 0
        except StepTaken as error:
            await self.tell(f"step {step} was already committed by another generation: {error}")
            return
        except (StoreError, CheckpointError) as error:
            await self.tell(f"checkpoint of step {step} failed; training goes on: {error}")
            return
        try:
            await asyncio.to_thread(
                apply_retention,
                self.store,
                policy=Retention.of(config.checkpoint),
                living=[*self._uploading_ids, current.id],
                now_unix=time.time(),
            )
            await self._log_commit(reference, commit_seconds)
        except (StoreError, CheckpointError) as error:
            await self.tell(f"checkpoint of step {step} is committed, but older ones were not tidied up: {error}")

    async def _log_commit(self, reference: CheckpointRef, commit_seconds: float) -> None:
        """Hands the commit to whoever writes it into MLflow."""
        timing = reference.manifest.timing
        assert timing is not None
        metrics = {
            "checkpoint/bytes": float(reference.manifest.num_bytes),
            "checkpoint/longest_stall_seconds": timing.stall_seconds,
            "checkpoint/upload_seconds": timing.upload_seconds,
            "checkpoint/commit_seconds": commit_seconds,
        }
        listed = [vars(each) for each in await asyncio.to_thread(list_checkpoints, self.store)]
        async with self._changed:
            commit = Commit(len(self._commits) + 1, reference.step, metrics, json.dumps(listed, indent=2))
            self._commits.append(commit)
            self._changed.notify_all()

    async def _finish(self, current: _Generation, last: RankExit) -> None:
        """Every rank of every node ended as it should."""
        await asyncio.gather(*current.commits)
        assert last.outcome is not None
        step, reason = last.outcome["step"], last.outcome["reason"]
        async with self._changed:
            current.state = "over"
            saved = self._committed_step is not None and self._committed_step >= step
            if saved or self.config.checkpoint.save == "never":
                self._step = step
                self._end(reason, None)
            else:
                self._end(
                    "failed", f"training reached step {step}, but its checkpoint could not be committed (see above)"
                )

    def _end(self, ended: Literal["finished", "stopped", "failed"], cause: str | None) -> None:
        """Called with the lock held."""
        if self._ended is None:
            self._ended, self._cause = ended, cause
        self._changed.notify_all()

    def _append_event(self, text: str) -> None:
        self._event_count += 1
        self._events.append(Event(self._event_count, time.time(), text))


def checkpoint_state(config: Config, step: int) -> dict[str, Any]:
    """What a manifest holds beside tensors: the position in the data is a pure function of the step."""
    return {
        "step": step,
        "next_sample": step * config.train.global_batch_size,
        "tokens": step * config.tokens_per_step,
        "config": config.model_dump(mode="json"),
    }


def layout(config: Config) -> dict[str, int]:
    """The degrees the state was cut by; for people, since any layout reads any other."""
    parallel = config.parallel
    return {"data": config.data_parallel_size, "tensor": parallel.tensor, "pipeline": parallel.pipeline}


def _first_cause(exits: list[RankExit]) -> RankExit | None:
    """The exit that explains the others: broken hardware before all, then what cannot be retried, then a signal.

    When a rank is killed its peers fail a moment later with a broken connection; those are consequences. Broken
    hardware computes wrong numbers, which its peers then refuse. A rank that blames a peer comes last.
    """
    failed = [each for each in exits if each.cause is not None]
    if not failed:
        return None

    def order(each: RankExit) -> tuple[bool, bool, bool, bool, int]:
        broken = each.fault is not None and each.fault.names_the_node
        blames_a_peer = each.fault is not None and each.fault.guilty == "peer"
        return not broken, each.retry, blames_a_peer, each.exit_code >= 0, each.rank

    return min(failed, key=order)


class CoordinatorOnLoop:
    """A coordinator on an asyncio loop in a thread of this process: for tests, and for anything without Ray."""

    def __init__(self, coordinator: RunCoordinator):
        self.coordinator = coordinator
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
        self._thread.start()

    def call(self, method: str, *arguments: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(getattr(self.coordinator, method)(*arguments), self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
