"""The run coordinator: what is waited for, and who is told. Decisions are made by the parts that it holds.

`roster` knows which agents there are, `recovery` from where a generation starts, `lives` what a generation's end means,
`saves` what became of each checkpoint, `board` what people see. One small actor per run: an ordinary asyncio class, of
which `launch/driver.py` makes a Ray actor. If it dies, Ray starts a new one without memory, and calls that waited are
made again: agents whose ranks run say so, and their generation goes on. What must outlive it is in the run's store.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import CheckpointError, ConfigError, RunInUse, StoreError
from raynium.run import protocol
from raynium.run.board import Board
from raynium.run.fence import Fence
from raynium.run.generation import Generation
from raynium.run.last_save import pause_before_next_try
from raynium.run.lives import Lives
from raynium.run.points import PendingPoints, PointsKept, TakesRank0
from raynium.run.protocol import AgentInfo, GoHome, Order, StandBy, Status, Verdict
from raynium.run.recovery import Recovery
from raynium.run.roster import Roster
from raynium.run.saves import Saves, WholeSave
from raynium.run.verdicts.failures import blamed
from raynium.run.verdicts.hangs import artifacts_of
from raynium.storage.store import Store
from raynium.tracking.incidents import What
from raynium.tracking.ledger import Before, CoordinatorBook, Ledger
from raynium.tracking.tracker import Point

# Of one call, with all its tries: S3 that is throttled answers within it.
STORE_CALL_SECONDS = 60.0


class RunCoordinator:
    """All methods are coroutines on one loop, so each runs unbroken between its awaits. See `protocol.Coordinator`."""

    def __init__(self, config: dict[str, Any], run_url: str, last_generation: int, claim_number: int):
        """config: the resolved config as a dict; last_generation: of the run's earlier drivers, 0 for a new run.

        claim_number: of the driver, see `Fence`.
        """
        now = time.monotonic()
        self._config = Config.model_validate(config)
        # A generation's start and every commit wait for it.
        silence = self._config.fault.upload_silence_seconds
        store = Store(run_url, limit_seconds=min(silence, STORE_CALL_SECONDS))
        self._changed = asyncio.Condition()
        self._seen: tuple[object, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._board = Board(now=now)
        self._pending_points = PendingPoints()
        self._book = CoordinatorBook(life=self._board.life, now=now)
        self._roster = Roster(
            fits=lambda nodes: World.fits(self._config, nodes=nodes),
            least_nodes=self._config.cluster.min_nodes,
            replace_seconds=self._config.fault.replace_seconds,
        )
        self._orders = False
        self._recovery = Recovery(store, if_damaged=self._config.checkpoint.if_damaged, tell=self._board.tell)
        self._fence = Fence(store, claim_number)
        self._saves = Saves(
            self._config,
            store,
            self._fence,
            self._pending_points,
            life=self._board.life,
            tell=self._board.tell,
            note=lambda step, cause: self._lives.incidents.notes("checkpoint", where="", cause=cause, step=step),
        )
        self._lives = Lives(
            self._config.fault,
            last_generation,
            left_out=self._config.data.leave_out_steps,
            board=self._board,
            book=self._book,
            roster=self._roster,
            recovery=self._recovery,
        )

    # ---- node agents -----------------------------------------------------------------------------------------------

    async def agents_placed(self, attempt: str, replaced: Mapping[int, int] = {}) -> None:
        """By Ray Train; they may yet die before they join. replaced: none but these, seat → incarnation."""
        async with self._changing():
            self._lives.agents_placed(attempt, replaced=replaced, now=time.monotonic())

    async def agents_lost(self, attempt: str, lost: Mapping[int, int]) -> None:
        """Ray Train has noticed that these agents have died. lost: seat → incarnation."""
        async with self._changing():
            self._lives.agents_lost(attempt, lost, now=time.monotonic())

    async def join(self, agent: AgentInfo) -> Order | StandBy | GoHome:
        await asyncio.sleep(max(0.0, self._lives.not_before - time.monotonic()))
        async with self._changing():
            if self._roster.is_past(agent):
                return GoHome(self._run_ledger())
            self._lives.greet(agent, now=time.monotonic())
            if (given := self._lives.order_for(agent)) is not None:
                # Ray repeats a call whose answer was lost on its way.
                return given
            self._lives.rejoined(agent, now=time.monotonic())
            self._roster.joins(agent)
            self._lives.joined(agent, now=time.monotonic())
            self._lives.may_grow()
            while True:
                if self._lives.are_over_for(agent) or self._roster.is_past(agent):
                    return GoHome(self._run_ledger())
                if (order := self._lives.order_for(agent)) is not None:
                    return order
                if (passed := self._lives.passed_over(agent)) is not None:
                    return StandBy(passed.generation, passed.resume_images, passed.resume_step)
                if self._has_crew():
                    await self._order_generations()
                else:
                    await self._wait_for_a_crew(agent)

    async def watch(self, agent: AgentInfo, order: Order, *, stop_known: bool) -> Verdict:
        lives, node_rank = self._lives, order.node_rank(agent)
        async with self._changing():
            current = lives.of(agent, order, now=time.monotonic())
            if not self._saves.caught_up:
                self._in_task(self._catch_up())
            await self._wait(
                lambda: (
                    current.state == "over"
                    or lives.ended is not None
                    or ((lives.stop_requested or current.yields is not None) and not stop_known)
                    or current.wants_look(node_rank)
                )
            )
            if current.state == "over" or lives.ended is not None:
                return Verdict("over", current.cause)
            return Verdict("look" if current.wants_look(node_rank) else "stop")

    async def exited(self, agent: AgentInfo, order: Order, ended: protocol.NodeEnded) -> None:
        """One rank that should not have ended takes the generation down."""
        now, first = time.monotonic(), blamed(ended.exits)
        async with self._changing():
            current = self._lives.of(agent, order, now=now)
            if ended.booked is not None:
                self._book.account(order.generation_id, ended.booked, now)
            self._lives.ended_after(current, ended.step)
            if ended.exits and current.state == "running":
                current.hears(order.node_rank(agent), ended.exits)
            if first is not None:
                await self._wait(lambda: not self._lives.needs_more_words(current), protocol.PEER_WORD_SECONDS)
                if current.state == "running":
                    self._lives.ranks_failed(current, now=time.monotonic())
            finishes = first is None and current.state == "running" and current.all_have_ended()
            # Ranks that were killed because another node's died are no cause of their own, but may say what it was.
            for fault in (first.fault if first is not None else None, ended.fault):
                if fault is not None:
                    self._lives.node_fault(order.generation, order.node_rank(agent), fault)
        if finishes and ended.exits:
            outcome = ended.exits[0].outcome
            assert outcome is not None
            try:
                await self._saves.commit_last(outcome.step, living=self._roster.uploading)
            except RunInUse as error:
                return await self._taken_over(error)
            async with self._changing():
                problem = self._saves.problem(outcome.step)
                self._lives.finished(current, outcome, problem, now=time.monotonic())

    async def commits(self, sent: protocol.Commit | None) -> list[protocol.Commit] | None:
        async with self._changed:
            if sent is not None:
                self._saves.sent(sent)
            lives, saves = self._lives, self._saves
            await self._wait(lambda: bool(saves.unsent()) or lives.ended is not None or lives.have_left)
            return saves.unsent() or None

    async def tell(self, event: protocol.AgentEvent) -> protocol.News:
        now, metrics_of_nodes, artifacts = time.monotonic(), dict[str, float](), dict[str, str]()
        points, displaced, wants_all = tuple[Point, ...](), False, False
        match event:
            case protocol.Said(text, what, where):
                self._board.tell(text)
                if what is not None:
                    self._lives.incidents.notes(what, where=where, cause=text, step=self._board.step)
            case protocol.StepLeftOut(step, why):
                self._board.tell(f"BAD STEP {step}: {why}")
                self._lives.left_out(step, why)
            case protocol.Progressed(generation_id, step, metrics, ledger):
                self._saves.note_evaluation(step, metrics)
                self._book.account(generation_id, ledger, now)
                newest = self._lives.newest
                if newest is not None and newest.order.generation_id == generation_id:
                    self._recovery.stepped()
                    self._lives.incidents.stepped()
                    self._lives.stepped(metrics.get("time/step_seconds"))
                    self._board.report(step, metrics, now=now)
            case protocol.Evaluates(done, total):
                self._board.evaluates(done, total, now=now)
            case protocol.RanksSeen(generation, positions):
                if generation == self._lives.number:
                    self._board.positions(positions)
                    if (hung := self._lives.seen(event)) is not None:
                        self._in_task(self._end_hang(hung))
            case protocol.TimesSeen():
                # A straggler's generation may be to end.
                async with self._changing():
                    metrics_of_nodes, artifacts = self._lives.times_seen(event)
            case protocol.StacksTaken():
                artifacts = await self._looked(event)
            case protocol.ShardSaved():
                if (whole := self._saves.shard_saved(event)) is not None:
                    await self._commit(whole)
            case protocol.ShardFailed(step, rank, cause):
                self._saves.shard_failed(step, rank, cause)
            case protocol.Uploaded(agent_id, generation_ids):
                self._roster.uploads.ended(agent_id, generation_ids)
            case protocol.DevicesSeen(node_rank, sample):
                metrics_of_nodes = self._board.sample(node_rank, sample, now=now)
            case PointsKept():
                wants_all = self._pending_points.keep(event)
                points = self._pending_points.found(event.tenure)
            case TakesRank0():
                await self._saves.find_points()
                points = self._pending_points.handed_over(event)
            case protocol.MaySend():
                displaced = self._roster.is_past(event)
            case protocol.NodeLeaves(node_id, why):
                async with self._changing():
                    self._lives.node_leaves(node_id, why)
            case protocol.WentHome(attempt, seat, incarnation):
                self._roster.goes_home(attempt, seat, incarnation)
            case protocol.CannotGoOn(cause):
                async with self._changing():
                    self._lives.end("failed", cause)
        return protocol.News(self._run_ledger(), metrics_of_nodes, artifacts, points, displaced, wants_all)

    # ---- driver ----------------------------------------------------------------------------------------------------

    async def ran_before(self, number: int, before: Before) -> None:
        """All of the run that was before this coordinator's life; number counts the driver's words."""
        self._book.ran_before(number, before)

    async def knows_bad_nodes(self, node_ids: Collection[str]) -> None:
        """Ids of those that this run's verdicts have named before this coordinator's life."""
        async with self._changing():
            self._lives.named.bad.update(node_ids)
            self._lives.bar_named()
            self._lives.may_grow()

    async def request_stop(self, life: str) -> None:
        """Every rank saves at the next step and ends. Before any rank runs, the run just ends.

        life: whom the driver means. Another one, just started, may not know yet of ranks that run: it does nothing, and
        is asked again once the driver has met it.
        """
        if life != self._board.life:
            return
        async with self._changing():
            if not self._lives.stop_requested:
                self._in_task(self._end_a_stop_that_hangs())
            self._lives.request_stop()

    async def leave(self, before: str, cause: str, what: What | None = None) -> None:
        """Every agent of attempts whose names sort before this goes home, once its uploads are in; others are started.

        what: of the incident that this is: their ranks end at once. None: not before all have saved at the next step.
        """
        async with self._changing():
            self._lives.leave(before, cause, what, now=time.monotonic())

    async def status(self, events_after: int) -> Status:
        """Events numbered above `events_after` come along."""
        now, newest, running = time.monotonic(), self._lives.newest, self._lives.running is not None
        if running:
            self._board.check_silence(now=now)
        ended, cause = self._lives.ended or (None, None)
        return Status(
            generation=self._lives.number,
            running=running,
            resume_step=newest.order.resume_step if newest else None,
            step=self._board.step,
            metrics=dict(self._board.metrics),
            committed_step=self._saves.committed_step,
            committed_uri=self._saves.committed_uri,
            agents=tuple(agent for _, agent in sorted(newest.agents.items())) if newest else (),
            ended=ended,
            cause=cause,
            events=self._board.events(after=events_after),
            incidents=self._lives.incidents.seen(),
            evaluation=self._board.evaluation if running else None,
            node_faults=self._lives.node_faults,
            ledger=self._book.ledger(now),
            waits_for_seats=self._roster.waits_for_seats,
            all_are_home=self._roster.all_are_home,
            has_spares=self._roster.has_enough,
            busy_nodes=self._lives.busy_nodes,
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """Holds the lock; whoever waits looks again afterwards, if there is something to see."""
        async with self._changed:
            yield
            self._wake()

    def _wake(self) -> None:
        """Of a thousand agents that join or watch one after the other, none is woken by the others."""
        seen = (*self._lives.seen_by_others(), self._roster.changes, self._orders, len(self._saves.unsent()))
        if seen != self._seen:
            self._seen = seen
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Gives the lock back until the condition holds, or the time is over; others look again before.

        The condition is of what `_wake` looks at: it is asked again when that has changed.
        """
        self._wake()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait_for(condition), seconds)

    def _in_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run_ledger(self) -> Ledger:
        return self._book.whole_run(time.monotonic())

    def _has_crew(self) -> bool:
        """For a generation that nobody orders yet."""
        return not self._orders and self._lives.running is None and bool(self._roster.crew(now=time.monotonic()))

    async def _wait_for_a_crew(self, agent: AgentInfo) -> None:
        """Or until there is an order for this agent, or none any more. Called with the lock held."""
        limit = self._roster.seconds_to_wait(now=time.monotonic())

        def is_over() -> bool:
            lives = self._lives
            # Asked first: it notes since when too few are there, which a limit counts from.
            if self._has_crew() or (limit is None and self._roster.seconds_to_wait(now=time.monotonic()) is not None):
                return True
            if lives.order_for(agent) is not None or lives.passed_over(agent) is not None or lives.are_over_for(agent):
                return True
            return self._roster.is_past(agent)

        await self._wait(is_over, limit)

    async def _order_generations(self) -> None:
        """Until a crew has its order, or there is none any more. Called with the lock held."""
        self._orders = True
        began, tries, attempt = time.monotonic(), 0, self._roster.attempt

        def over() -> bool:
            return self._lives.ended is not None or not self._roster.is_current(attempt)

        try:
            while not over() and (crew := self._roster.crew(now=time.monotonic())):
                tries += 1
                pause = await self._order_generation(crew, pause_before_next_try(tries, time.monotonic() - began))
                if self._lives.running is not None:
                    return
                # A stop, or a new attempt, ends the pause early.
                await self._wait(over, pause)
        finally:
            self._orders = False

    async def _order_generation(self, agents: Sequence[AgentInfo], next_try_seconds: float | None) -> float:
        """agents: by node rank, of whom no rank runs. Called with the lock held.

        Returns how long to wait before it is tried again, where the store does not answer: at most `next_try_seconds`,
        None of which means that this was the last try.
        """
        refusal = "no checkpoint could be chosen to go on from"
        try:
            world = World.of(self._config, nodes=len(agents))
            await asyncio.to_thread(self._fence.check)
            ready, uploading = self._roster.ready(), self._roster.uploading
            origin = await self._recovery.origin(agents, world, ready=ready, uploading=uploading)
        except (ConfigError, StoreError, CheckpointError, RunInUse) as error:
            if isinstance(error, StoreError) and next_try_seconds is not None:
                self._board.tell(f"{refusal}, trying again in {next_try_seconds:.0f} s: {error}")
                return next_try_seconds
            is_whole = isinstance(error, ConfigError | RunInUse)
            self._lives.end("failed", str(error) if is_whole else f"{refusal}: {error}")
            return 0.0
        if origin.checkpoint is not None:
            self._saves.resumed(origin.checkpoint)
        self._lives.begin(agents, world, origin, now=time.monotonic())
        self._wake()
        return 0.0

    async def _commit(self, whole: WholeSave) -> None:
        if self._recovery.is_spoilt(whole.generation_id, whole.step):
            self._board.tell(f"step {whole.step} becomes no checkpoint: it was saved before a leap that came back")
            return
        try:
            async with self._recovery.choosing:
                living = [*self._roster.uploading, whole.generation_id]
                is_newest = await self._saves.commit(whole, living=living, reading=self._recovery.reading)
        except RunInUse as error:
            # Whoever orders a generation waits for `choosing` with the lock that this takes.
            return await self._taken_over(error)
        async with self._changing():
            if is_newest:
                self._lives.committed(whole.step)

    async def _taken_over(self, error: RunInUse) -> None:
        """Another driver owns the run: nothing more is written for this one, and its ranks end."""
        async with self._changing():
            self._lives.end("failed", str(error))

    async def _catch_up(self) -> None:
        await self._saves.catch_up()
        async with self._changing():
            pass

    async def _looked(self, taken: protocol.StacksTaken) -> dict[str, str]:
        """Of all nodes' ranks, for node 0, which has MLflow; else nothing."""
        async with self._changing():
            current = self._lives.looked(taken)
            if current is None or taken.node_rank != 0:
                return {}
            # The generation forgets them when it is over.
            looks = current.looks
            await self._wait(current.all_have_looked, protocol.LOOKS_SECONDS)
            return artifacts_of(current.order.generation, looks)

    async def _end_hang(self, current: Generation) -> None:
        async with self._changing():
            await self._wait(current.all_have_looked, protocol.LOOKS_SECONDS)
            self._lives.end_hang(current, now=time.monotonic())

    async def _end_a_stop_that_hangs(self) -> None:
        """Ranks or uploads that never come to an end do not keep a run that nobody wants any more."""
        limit = self._config.fault.stop_seconds
        async with self._changing():
            await self._wait(lambda: self._lives.ended is not None, limit)
            if self._lives.ended is None:
                self._board.tell(
                    f"the run has not saved and ended within {limit:g} s of the stop (fault.stop_seconds): it ends "
                    "now, without what its ranks still do or upload, and can go on from its newest checkpoint"
                )
                self._lives.end("stopped")
