"""The run coordinator: numbers generations, hands out their rendezvous, commits checkpoints, decides when to give up.

One small actor per run. It is an ordinary asyncio class: `driver.py` makes a Ray actor of it, tests run it on a loop.
If it dies, Ray starts a new one without memory; the agents' `watch` then returns "over", they join again, and the run
goes on from the newest checkpoint. What must outlive it is in the run's store.
"""

import asyncio
import contextlib
import math
import secrets
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from raynium.checkpoint.catalog import resume_point, set_aside
from raynium.checkpoint.format.manifest import CHECKPOINTS_FOLDER, ShardEntry
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import CheckpointDamaged, CheckpointError, StoreError
from raynium.health.faults import CORES_TAKEN, Fault
from raynium.health.neuron_monitor import DeviceSample
from raynium.health.neuron_monitor import metrics as device_metrics
from raynium.run.last_save import pause_before_next_try
from raynium.run.patience import Patience
from raynium.run.protocol import AgentInfo, Commit, Event, HeldImages, NodeFault, Order, RankExit, Status, Verdict
from raynium.run.saves import Saves, WholeSave
from raynium.storage.store import Store
from raynium.tracking.ledger import CoordinatorBook, Ledger

EVENTS_KEPT = 1000
DEVICE_SAMPLE_SECONDS = 60.0  # an older one is of a node whose monitor ended
# NeuronCores of a killed process come back only after 5 to 10 s (a report from the field, not measured by us).
CORES_PAUSE_SECONDS = 2.0  # before ranks that found them taken try again
CORES_RETURN_SECONDS = 60.0  # so long this is no failure of the run


@dataclass
class _Generation:
    """One life of the ranks."""

    number: int
    id: str
    resume_step: int | None
    agents: tuple[AgentInfo, ...]
    state: Literal["running", "over"] = "running"
    cause: str = ""
    ended_nodes: set[int] = field(default_factory=set)  # node ranks whose ranks have ended
    resume_images: HeldImages | None = None  # where the ranks' state came from, if not from the store
    faults: dict[int, Fault] = field(default_factory=dict)  # node rank → what is broken there


class RunCoordinator:
    """All methods are coroutines on one loop, so each runs unbroken between its awaits."""

    def __init__(self, config: dict[str, Any], run_url: str, last_generation: int):
        """config: the resolved config as a dict; last_generation: of the run's earlier drivers, 0 for a new run."""
        self.config = Config.model_validate(config)
        self.store = Store(run_url)
        self._world = World.of(self.config)
        self._life = secrets.token_hex(4)
        self._changed = asyncio.Condition()
        self._attempt = ""
        self._past_attempts: set[str] = set()
        self._joined: dict[int, AgentInfo] = {}
        self._orders: dict[tuple[str, int], Order] = {}
        self._number = last_generation
        self._generation: _Generation | None = None
        self._generations: dict[int, _Generation] = {}
        self._stop_requested = False
        self._patience = Patience(self.config.fault)
        self._attempts: set[str] = set()  # that Ray Train has begun
        self._cores_taken_since: float | None = None  # of failures in a row that had no other reason
        self._order_not_before = 0.0
        self._uploading_ids: list[str] = []  # generations of this attempt, whose agents may still upload for them
        self._damaged_step: int | None = None  # found by ranks, to be set aside before the next generation
        self._distrusted_images: set[tuple[str, int]] = set()  # ranks that started from them made no step
        self._commits: set[asyncio.Task[None]] = set()
        self._choosing = asyncio.Lock()  # held while a checkpoint is chosen to go on from, or older ones are deleted
        self._read_step: int | None = None  # which the ranks may still be reading
        self._commits_taken = 0  # number of the last that an agent has sent to MLflow
        self._saves = Saves(self.config, self._world, self.store, tell=self._append_event)
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._devices: dict[int, tuple[float, DeviceSample]] = {}  # node rank → when it came, and the newest
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._node_faults: list[NodeFault] = []
        self._left_attempt = ""  # whose agents go home: others will go on elsewhere
        self._event_count = 0
        self._book = CoordinatorBook(now=time.monotonic())
        self._ledger_before = Ledger()  # of this coordinator's life; the driver tells it
        self._ended: Literal["finished", "stopped", "failed"] | None = None
        self._cause: str | None = None

    # ---- node agents -----------------------------------------------------------------------------------------------

    async def attempt_begins(self, attempt: str) -> None:
        """Ray Train has placed the node agents, which may yet die before they join."""
        async with self._changed:
            is_new = attempt not in self._attempts  # Ray repeats a call whose answer was lost
            expected = not self._attempts or self._is_left()
            self._attempts.add(attempt)
            if is_new and not expected and (too_many := self._patience.node_failure()) is not None:
                self._end("failed", f"a node agent was lost. {too_many}")

    async def join(self, agent: AgentInfo) -> Order:
        """Waits until every node is ready, then orders the next generation. An agent joins with no rank running."""
        await asyncio.sleep(max(0.0, self._order_not_before - time.monotonic()))
        async with self._changed:
            if agent.attempt in self._past_attempts:  # of a node that was cut off, and that Ray took for dead
                return Order("end", ledger=self._run_ledger())
            if agent.attempt != self._attempt:
                # Ray Train started a new worker group: the agents of the one before are gone.
                self._past_attempts.add(self._attempt)
                self._attempt = agent.attempt
                self._joined.clear()
                self._uploading_ids.clear()
                self._devices.clear()
                if self._generation is not None and self._generation.state == "running":
                    cause = "a node agent was lost; Ray Train started the node agents again"
                    self._append_event(f"generation {self._generation.number} failed: {cause}")
                    self._over(self._generation, cause, counts=False)  # `attempt_begins` has
            self._uploading_ids += [each for each in agent.uploading if each not in self._uploading_ids]
            key = (agent.attempt, agent.node_rank)
            known, current = self._orders.get(key), self._generation
            if known and current and current.state == "running" and known.generation > agent.last_generation:
                return known  # Ray repeats a call whose answer was lost on its way
            self._orders.pop(key, None)
            self._joined[agent.node_rank] = agent
            began, tries = time.monotonic(), 0
            while len(self._joined) == self.config.cluster.nodes and not self._has_ended_for(agent):
                tries += 1
                pause = await self._order_generation(pause_before_next_try(tries, time.monotonic() - began))
                with contextlib.suppress(TimeoutError):  # a stop, or a new attempt, ends it early
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._has_ended_for(agent)), pause)
            await self._changed.wait_for(lambda: key in self._orders or self._has_ended_for(agent))
            if self._has_ended_for(agent):
                return Order("end", ledger=self._run_ledger())
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
            current.ended_nodes.add(node_rank)
            first = _first_cause(exits)
            if first is not None:
                self._report_failure(current, node_rank, first)
            elif len(current.ended_nodes) < self.config.cluster.nodes or current.state == "over":
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

    async def shard_saved(
        self, step: int, rank: int, entry_json: str, upload_seconds: float, parent_step: int | None
    ) -> None:
        """One rank's shard is in the store, verified. The last one of a step commits the checkpoint.

        Whichever generation saved it, also one of before this coordinator. parent_step: the step that it started from.
        """
        entry = ShardEntry.from_json(entry_json)
        whole = self._saves.shard_saved(step, rank, entry, upload_seconds, parent=parent_step)
        if whole is not None:
            task = asyncio.create_task(self._commit(whole))
            self._commits.add(task)
            task.add_done_callback(self._commits.discard)
            await task

    async def shard_failed(self, step: int, rank: int, cause: str) -> None:
        """A shard could not be uploaded, and without it the step has no checkpoint; training goes on."""
        self._saves.shard_failed(step, rank, cause)

    async def give_up(self, cause: str) -> None:
        """An agent cannot do its part, and no other try could."""
        async with self._changed:
            self._end("failed", cause)

    async def report(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0's numbers, for the driver's display."""
        self._step, self._read_step = step, None
        self._metrics.update(metrics)
        self._saves.note_evaluation(step, metrics)

    async def account(self, generation: int, ledger: Ledger) -> Ledger:
        """What rank 0's agent has booked of a generation so far; returns the whole run's."""
        if generation == self._number:
            self._book.account(ledger)
        return self._run_ledger()

    async def commits(self, after: int) -> list[Commit] | None:
        """Those that no agent has sent to MLflow; waits for one. None: the run, or this attempt, has ended.

        after: number of the last that the caller has sent; 0 of an agent that has just begun.
        """
        if after > len(self._saves.commits):  # counted by a coordinator that has died: this one begins anew
            after = 0
        async with self._changed:
            self._commits_taken = max(self._commits_taken, after)
            await self._changed.wait_for(
                lambda: len(self._saves.commits) > self._commits_taken or self._ended is not None or self._is_left()
            )
            return self._saves.commits[self._commits_taken :] or None

    async def tell(self, text: str) -> None:
        """A line for the user's terminal."""
        self._append_event(text)

    # ---- driver ----------------------------------------------------------------------------------------------------

    async def ran_before(self, ledger: Ledger) -> None:
        """All of the run that was before this coordinator's life."""
        if ledger.total > self._ledger_before.total:  # Ray may run two calls in either order
            self._ledger_before = ledger

    async def request_stop(self) -> None:
        """Every rank saves at the next step and ends. Before any rank runs, the run just ends."""
        async with self._changed:
            self._stop_requested = True
            if self._generation is None or self._generation.state == "over":
                self._end("stopped", None)
            self._changed.notify_all()

    async def leave(self) -> None:
        """Every agent of this attempt goes home, once its uploads are in; the driver starts others on other nodes."""
        async with self._changed:
            self._left_attempt = self._attempt
            if self._generation is not None and self._generation.state == "running":
                self._generation.state, self._generation.cause = "over", "the run leaves these nodes"
                self._book.failed()
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
            committed_step=self._saves.committed_step,
            committed_uri=self._saves.committed_uri,
            agents=current.agents if current else (),
            ended=self._ended,
            cause=self._cause,
            events=tuple(event for event in self._events if event.number > events_after),
            node_faults=tuple(self._node_faults),
            ledger=self._book.ledger(time.monotonic()),
            life=self._life,
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _has_ended_for(self, agent: AgentInfo) -> bool:
        return self._ended is not None or agent.attempt != self._attempt or self._is_left()

    def _is_left(self) -> bool:
        return self._left_attempt == self._attempt != ""

    def _run_ledger(self) -> Ledger:
        return self._ledger_before + self._book.ledger(time.monotonic())

    async def _order_generation(self, next_try_seconds: float | None) -> float:
        """All agents are here and no rank runs. Called with the lock held.

        Returns how long to wait before it is tried again, where the store does not answer: at most `next_try_seconds`,
        None of which means that this was the last try.
        """
        images = self._newest_images()
        if images is not None:  # as new as any checkpoint, since every checkpoint was such an image
            resume_step: int | None = images.step
        else:
            try:
                async with self._choosing:
                    self._read_step = resume_step = await self._resume_step()
            except (StoreError, CheckpointError) as error:
                if isinstance(error, StoreError) and next_try_seconds is not None:
                    again = f"trying again in {next_try_seconds:.0f} s"
                    self._append_event(f"no checkpoint could be chosen to go on from, {again}: {error}")
                    return next_try_seconds
                self._end("failed", f"no checkpoint could be chosen to go on from: {error}")
                return 0.0
        self._number = 1 + max(self._number, *(agent.last_generation for agent in self._joined.values()))
        # The suffix keeps two drivers apart that count from the same number.
        generation_id = f"g{self._number:05d}-{secrets.token_hex(4)}"
        agents = tuple(agent for _, agent in sorted(self._joined.items()))
        self._generation = _Generation(self._number, generation_id, resume_step, agents, resume_images=images)
        self._generations[self._number] = self._generation
        self._uploading_ids.append(generation_id)
        self._step = resume_step or 0
        self._book.ordered(time.monotonic())
        ledger = self._run_ledger()
        for agent in agents:
            self._orders[(agent.attempt, agent.node_rank)] = Order(
                "run",
                self._world,
                self._number,
                generation_id,
                agents[0].host,
                agents[0].free_port,
                resume_step,
                images,
                ledger,
            )
        self._joined.clear()
        ranks = f"{self._world.size} ranks on {self.config.cluster.nodes} node(s)"
        origin = f"from the checkpoint of step {resume_step}" if resume_step is not None else "from step 0"
        if images is not None:
            origin = f"from the snapshot of step {resume_step} in memory"
        await self.tell(f"generation {self._number}: {ranks}, {origin}")
        self._changed.notify_all()
        return 0.0

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
        self._saves.resumed(point.checkpoint)
        return point.checkpoint.step

    def _newest_images(self) -> HeldImages | None:
        """The newest snapshot that every rank of the world has in its node's memory."""
        ranks: dict[tuple[str, int], set[int]] = defaultdict(set)
        for agent in self._joined.values():
            for held in agent.images:
                ranks[held.generation_id, held.step].update(held.ranks)
        whole = [
            key for key, found in ranks.items() if len(found) == self._world.size and key not in self._distrusted_images
        ]
        if not whole:
            return None
        generation_id, step = max(whole, key=lambda key: key[1])
        return HeldImages(generation_id, step, tuple(range(self._world.size)))

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
        cores_taken = first.fault is not None and first.fault.name == CORES_TAKEN
        if current.resume_images is not None and self._step <= current.resume_images.step and not cores_taken:
            self._distrusted_images.add((current.resume_images.generation_id, current.resume_images.step))
        self._over(current, cause, cores_taken=cores_taken)
        if not first.retry or not self._may_go_on(current, first.error):
            self._end("failed", cause)

    def _tell_fault(self, current: _Generation, node_rank: int, fault: Fault) -> None:
        """Names the node that somebody has to see to, once a generation, with the line that says so."""
        if not fault.names_the_node or node_rank in current.faults:
            return
        current.faults[node_rank] = fault
        agent = current.agents[node_rank]
        found = NodeFault(current.number, node_rank, agent.host, agent.node_id, fault)
        self._node_faults.append(found)
        self._append_event(f"  node {node_rank} ({found.host}) | {fault.evidence}")
        self._append_event(str(found))

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

    def _over(self, current: _Generation, cause: str, *, cores_taken: bool = False, counts: bool = True) -> None:
        """Called with the lock held."""
        current.state, current.cause = "over", cause
        self._book.failed()
        now = time.monotonic()
        if not cores_taken:
            self._cores_taken_since = None
        else:
            self._order_not_before = now + CORES_PAUSE_SECONDS
            self._cores_taken_since = self._cores_taken_since or now
        if self._cores_taken_since is not None and now - self._cores_taken_since < CORES_RETURN_SECONDS:
            counts = False
        too_many = self._patience.restart() if counts else None
        if self._stop_requested:
            self._end("stopped", None)
        elif too_many is not None:
            self._end("failed", f"{cause}. {too_many}")
        self._changed.notify_all()

    async def _commit(self, whole: WholeSave) -> None:
        async with self._choosing:
            reading = [self._read_step] if self._read_step is not None else []
            living = [*self._uploading_ids, whole.generation_id]
            is_newest = await self._saves.commit(whole, living=living, reading=reading)
        if is_newest:
            self._patience.progress()
        async with self._changed:
            self._changed.notify_all()  # `commits` waits for it

    async def _finish(self, current: _Generation, last: RankExit) -> None:
        """Every rank of every node ended as it should, and every node's agent has done what it could to save."""
        await asyncio.gather(*self._commits)
        assert last.outcome is not None
        step, reason = last.outcome["step"], last.outcome["reason"]
        await self._saves.commit_last(step, living=self._uploading_ids)
        async with self._changed:
            current.state = "over"
            problem = self._saves.problem(step)
            if problem is None:
                self._step = step
            self._end(reason if problem is None else "failed", problem)

    def _end(self, ended: Literal["finished", "stopped", "failed"], cause: str | None) -> None:
        """Called with the lock held."""
        if self._ended is None:
            self._ended, self._cause = ended, cause
            self._book.ended()
        self._changed.notify_all()

    def _append_event(self, text: str) -> None:
        self._event_count += 1
        self._events.append(Event(self._event_count, time.time(), text))


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
