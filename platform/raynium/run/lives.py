"""The run's generations: which one runs, what its end means, and whether another follows. Neither ray nor I/O."""

import secrets
import time
from collections.abc import Collection, Mapping, Sequence

from raynium.config.fault import FaultSection
from raynium.config.world import World
from raynium.health.faults import Fault
from raynium.run.board import Board
from raynium.run.buddies import buddies
from raynium.run.generation import Generation
from raynium.run.leaps import Leaps
from raynium.run.named_nodes import NamedNodes
from raynium.run.protocol import (
    AgentInfo,
    EndKind,
    NodeFault,
    Order,
    Outcome,
    RanksSeen,
    StacksTaken,
    TimesSeen,
)
from raynium.run.recovery import Origin, Recovery
from raynium.run.roster import Roster
from raynium.run.verdicts.bad_steps import BadSteps
from raynium.run.verdicts.failures import Verdicts, blames_a_peer
from raynium.run.verdicts.hangs import Hangs, folder_of, with_looks
from raynium.run.verdicts.stragglers import Stragglers
from raynium.tracking.incidents import Incidents, What
from raynium.tracking.ledger import CoordinatorBook


class Lives:
    """`ended` is how the run ended, and why if it failed; None while another generation may follow."""

    def __init__(
        self, fault: FaultSection, last_generation: int, *, left_out: Collection[int], board: Board,
        book: CoordinatorBook, roster: Roster, recovery: Recovery,
    ):  # fmt: skip
        """left_out: steps that the config says are."""
        self.number = last_generation
        self.ended: tuple[EndKind, str | None] | None = None
        self.stop_requested = False
        self.incidents = Incidents(board.life, unix=time.time, steady=time.monotonic)
        # No generation is ordered before this time.
        self.not_before = 0.0
        # Why agents were sent home last, and of which incident; None: their ranks save before.
        self._farewell: tuple[str, What | None] = "", None
        self._fault = fault
        self._verdicts = Verdicts(fault)
        self._leaps = Leaps()
        self._bad_steps = BadSteps(left_out)
        # Of the newest generation.
        self._hangs: Hangs | None = None
        self._stragglers: Stragglers | None = None
        self._generations: dict[int, Generation] = {}
        self._board, self._book, self._roster, self._recovery = board, book, roster, recovery
        self.named = NamedNodes(roster, board, self.incidents)

    @property
    def newest(self) -> Generation | None:
        return self._generations.get(self.number)

    @property
    def running(self) -> Generation | None:
        return self.newest if self.newest is not None and self.newest.state == "running" else None

    def seen_by_others(self) -> tuple[object, ...]:
        """What calls wait for, and others change: while it is equal, nobody needs to look again."""
        current = self.newest
        if current is None:
            return (self.ended, self.stop_requested)
        running = (current.state, current.yields, current.hang is not None, self.needs_more_words(current))
        return (self.ended, self.stop_requested, self.number, *running, current.all_have_looked())

    @property
    def node_faults(self) -> tuple[NodeFault, ...]:
        return tuple(self._verdicts.node_faults)

    @property
    def busy_nodes(self) -> frozenset[str]:
        """Ids of nodes that the run would now lose something with: its ranks there are about to save and go on on
        others, or what they have saved is uploaded or read. A bad node on which it stays is none: it would be for ever.
        """
        newest = self.newest
        if newest is None or self.have_left:
            # The driver waits for the end of those who go home.
            return frozenset()
        leaves = newest.yields is not None or self._roster.has_enough
        reads = newest.state == "running" and self._board.step <= (newest.order.resume_step or 0)
        lenders = newest.lenders if reads else frozenset[str]()
        return self._roster.uploading_nodes | lenders | {each.node_id for each in newest.agents.values() if leaves}

    @property
    def have_left(self) -> bool:
        """Whether agents of this attempt have nothing to do here any more."""
        return self._roster.is_left and self.running is None

    def are_over_for(self, agent: AgentInfo) -> bool:
        return self.ended is not None or not self._roster.is_current(agent.attempt)

    # ---- how one begins --------------------------------------------------------------------------------------------

    def begin(self, agents: Sequence[AgentInfo], world: World, origin: Origin, *, now: float) -> None:
        """agents: of the crew, by node rank; no rank of theirs runs."""
        self.number = 1 + max(self.number, *(agent.last_generation for agent in agents))
        # The suffix keeps two drivers apart that count from the same number.
        generation_id = f"g{self.number:05d}-{secrets.token_hex(4)}"
        begins = self._book.ordered(generation_id, now)
        crew = {agent.seat: agent.incarnation for agent in agents}
        order = Order(
            world,
            tuple(crew),
            tuple(crew.values()),
            self.number,
            generation_id,
            master_host=agents[0].host,
            master_port=agents[0].free_port,
            resume_step=origin.step,
            resume_images=origin.images,
            ledger=self._book.whole_run(now),
            left_out=origin.left_out,
            begins=begins,
            buddies=buddies(agents),
            copies=origin.copies(agents, ready=self._roster.ready()),
        )
        lenders = frozenset(each.node_id for each in self._roster.ready() if each.address in order.copies)
        self._generations[self.number] = Generation(order, dict(enumerate(agents)), lenders=lenders)
        self._watch_ranks(order)
        self._verdicts.keeps(origin.step or 0)
        self._roster.departs(crew)
        self._roster.may_upload(order.generation_id)
        self.incidents.began_from(origin.step or 0)
        self._board.generation_begins(origin.step or 0, now=now)
        self._board.tell(f"generation {self.number}: {world.size} ranks on {world.nodes} node(s), from {origin}")

    def of(self, agent: AgentInfo, order: Order, *, now: float) -> Generation:
        """The generation of an agent that runs its ranks. If a coordinator that has died ordered it, it goes on."""
        current = self._generations.get(order.generation)
        if current is None:
            current = Generation(order, {}, state="over", cause="it is not the run's newest any more")
            newer = order.generation > self.number and not self._roster.is_past(agent)
            if newer and all(
                each.last_generation < order.generation
                for each in self._roster.ready()
                if each.attempt == agent.attempt and order.is_for(each)
            ):
                if (older := self.running) is not None:
                    # Told by an agent that was cut off, and was not missed yet.
                    older.state, older.cause = "over", "a newer one runs"
                self.greet(agent, now=now)
                # Those that wait for an order have not had this one.
                crew = dict(zip(order.seats, order.incarnations, strict=True))
                self._roster.departs(crew)
                current.state, current.found = "running", True
                self.number = order.generation
                self._generations[self.number] = current
                self._watch_ranks(order)
                self._roster.may_upload(order.generation_id)
                self._board.generation_begins(order.resume_step or 0, now=now)
                self._board.tell(f"the run coordinator was started again and found generation {self.number}")
                self._book.found_running(order.generation_id, now)
                # What was told of it before it was found.
                self._miss(self._roster.misses(crew), now=now)
                self._depart(now=now)
        if not self._roster.is_past(agent):
            current.agents[order.node_rank(agent)] = agent
            self._roster.speaks(agent)
            self._roster.may_upload(*agent.uploading)
            self.named.bar(agent, self.running)
        return current

    # ---- how one ends ----------------------------------------------------------------------------------------------

    def greet(self, agent: AgentInfo, *, now: float) -> None:
        """Whoever was there before it is gone: of its seat, or where it is the first of another attempt, all."""
        if agent.attempt == self._roster.attempt and self._roster.replaces(agent):
            self.agents_lost(agent.attempt, {agent.seat: agent.incarnation - 1}, now=now)
        self._greet_attempt(agent.attempt, now=now)

    def _greet_attempt(self, attempt: str, *, now: float) -> None:
        if self._roster.greets(attempt):
            self._board.forget_devices()
            if (current := self.running) is not None:
                cause = "a node agent was lost; Ray Train started the node agents again"
                self._failed(self.number, cause, what="agents")
                # It was counted when Ray Train placed the new ones.
                self.over(current, cause, now=now)
                self._book.agents_lost()

    def agents_placed(self, attempt: str, *, replaced: Mapping[int, int] = {}, now: float) -> None:
        """By Ray Train. They may yet die before they join. replaced: only these were, seat → incarnation."""
        if replaced:
            self.agents_lost(attempt, {seat: incarnation - 1 for seat, incarnation in replaced.items()}, now=now)
        if (replaced or self._roster.begins(attempt)) and (too_many := self._verdicts.agent_lost()) is not None:
            self.end("failed", too_many)

    def agents_lost(self, attempt: str, agents: Mapping[int, int], *, now: float) -> None:
        """Their processes or their nodes have died. It is counted once Ray Train has placed others.

        agents: seat → incarnation. None of that attempt may have spoken yet to a coordinator that was started again.
        """
        if attempt >= self._roster.attempt:
            self._greet_attempt(attempt, now=now)
            self._miss(self._roster.loses(agents), now=now)

    def _miss(self, lost: Collection[int], *, now: float) -> None:
        newest = self.newest
        if newest is None or not (ranks := [newest.order.seats.index(s) for s in lost if s in newest.order.seats]):
            return
        hosts = ", ".join(newest.agents[rank].host for rank in ranks if rank in newest.agents)
        cause = f"the node agent of {hosts or f'node {ranks[0]}'} was lost"
        if newest.state == "running":
            self._failed(self.number, cause, what="agents", node_rank=ranks[0])
            self.over(newest, cause, now=now)
        else:
            # Ranks on other nodes have missed its own before Ray did.
            self._board.tell(cause)

    def order_for(self, agent: AgentInfo) -> Order | None:
        """Of a generation that this agent is to run, and has not yet."""
        current = self.running
        if current is None or not current.order.is_for(agent) or self.number <= agent.last_generation:
            return None
        return current.order

    def passed_over(self, agent: AgentInfo) -> Order | None:
        """Of the newest generation, if others run it and this agent does not know of it."""
        current = self.running
        if current is None or agent.seat in current.order.seats or agent.last_generation >= self.number:
            return None
        return current.order

    def may_grow(self) -> None:
        """Another agent waits. If the ranks that run are fewer than wanted, or on a node that is bad or will leave,
        they save, end, and all begin together.
        """
        current = self.running
        if current is None or current.yields is not None:
            return
        if self._roster.can_grow(current.order.world.nodes):
            current.yields = "there are nodes for more ranks again"
        elif self._roster.can_relieve():
            current.yields = "there is another node for one that is bad or will leave"
        else:
            return
        self._board.tell(f"generation {self.number} saves and ends: {current.yields}")

    def rejoined(self, agent: AgentInfo, *, now: float) -> None:
        """The agent runs no ranks. A coordinator that has died may be the one that heard how they ended."""
        current = self.running
        if current is None or agent.seat not in current.order.seats or self.order_for(agent) is not None:
            return
        node_rank = current.order.node_rank(agent)
        if node_rank not in current.exits:
            cause = f"the ranks of node {node_rank} ended while nobody could hear of it"
            self._failed(self.number, cause, node_rank=node_rank)
            self.over(current, cause, now=now)

    def joined(self, agent: AgentInfo, *, now: float) -> None:
        """It is as far that a generation could be ordered, or waits for others."""
        self.named.bar(agent, self.running)
        self._book.agents_missing(now, missing=not self._roster.crew(now=now))

    def ended_after(self, current: Generation, step: int) -> None:
        """Of the ranks of one node, whose end is judged next."""
        if current.state == "running":
            self._board.reaches(step)
            if step > (current.order.resume_step or 0):
                self.incidents.stepped()

    def needs_more_words(self, current: Generation) -> bool:
        """Whether all that is known of its end is that ranks missed a peer, which is on another node."""
        first = current.first_cause
        missed = first is not None and blames_a_peer(first)
        return current.state == "running" and missed and not current.all_have_ended()

    def ranks_failed(self, current: Generation, *, now: float) -> None:
        """At least one rank ended that should not have."""
        first = current.first_cause
        assert first is not None
        node_rank = first.rank // current.order.world.ranks_per_node
        for line in first.last_lines:
            self._board.tell(f"  rank {first.rank} | {line}")
        cause = f"rank {first.rank}: {first.cause}"
        if first.undo is None:
            self._failed(current.order.generation, cause, node_rank=node_rank)
        else:
            self._board.tell(f"generation {current.order.generation} goes back: {cause}")
            burst = self._bad_steps.undone(first.undo, cause)
            self.incidents.opens("step", where="", cause=str(burst), step=self._board.step, key=burst.key)
        if first.fault is not None:
            self.node_fault(current.order.generation, node_rank, first.fault)
        if first.undo is not None:
            ids = [each.order.generation_id for each in self._generations.values()]
            self._recovery.undo(self._leaps.undo(first.undo), generations=ids)
        judgement = self._verdicts.ranks_failed(first, step=self._board.step, now=now)
        images = current.order.resume_images
        if images is not None and self._board.step <= images.step and judgement.doubts_images:
            self._recovery.distrust(images)
        self.over(current, cause, now=now)
        self.not_before = now + judgement.pause_seconds
        if judgement.ends is not None:
            self.end("failed", judgement.ends)
        elif self._recovery.refuses(current.order.resume_step, images, first.error):
            self.end("failed", cause)

    # ---- how one hangs ---------------------------------------------------------------------------------------------

    def _watch_ranks(self, order: Order) -> None:
        world = order.world
        self._hangs = Hangs(self._fault, world_size=world.size, resume_step=order.resume_step or 0)
        self._stragglers = Stragglers(world_size=world.size, ranks_per_node=world.ranks_per_node)
        self._bad_steps.knows((*order.left_out.undone, *order.left_out.suspected))

    def left_out(self, step: int, why: str) -> None:
        """Nothing was learned from it. Several close together are one incident, and what was known before is none."""
        if (burst := self._bad_steps.news(step, why)) is not None:
            self.incidents.notes("step", where="", cause=str(burst), step=step, key=burst.key)

    def stepped(self, seconds: float | None) -> None:
        """A step of the newest generation took so long; None: it was not told."""
        if self._hangs is not None and seconds is not None:
            self._hangs.stepped(seconds)

    def seen(self, seen: RanksSeen) -> Generation | None:
        """Where the newest generation's ranks of one node are. The generation, if it was just found to hang."""
        current = self.running
        if current is None or current.hang is not None or self._hangs is None:
            return None
        current.hang = self._hangs.seen(seen.positions, device_seconds=seen.device_seconds)
        return current if current.hang is not None else None

    def times_seen(self, seen: TimesSeen) -> tuple[dict[str, float], dict[str, str]]:
        """How long steps take the ranks of a node. Metrics and artifacts of all nodes, for node 0."""
        current = self.running
        if current is None or seen.generation != self.number or self._stragglers is None:
            return {}, {}
        for slow in self._stragglers.seen(seen.times):
            node_rank = slow.rank // current.order.world.ranks_per_node
            agent = current.agents.get(node_rank)
            host = "unknown" if agent is None else agent.host
            self._board.tell(f"straggler: rank {slow.rank} on node {node_rank} ({host}): {slow}")
            if self._fault.stragglers == "leave":
                cause = f"straggler: rank {slow.rank}: {slow}"
                self.incidents.notes("node", where=host, cause=cause, step=self._board.step)
                self.node_fault(seen.generation, node_rank, Fault("straggler", str(slow), "replace", "node"))
        return (self._stragglers.metrics, self._stragglers.artifacts) if seen.node_rank == 0 else ({}, {})

    def looked(self, taken: StacksTaken) -> Generation | None:
        """What one node's ranks of a generation that hangs do; None: it has been given up without it."""
        current = self._generations.get(taken.generation)
        if current is None or current.hang is None:
            return None
        current.looks[taken.node_rank] = taken.looks
        return current

    def end_hang(self, current: Generation, *, now: float) -> None:
        """All nodes have told what their ranks do, or had the time to."""
        if current.state != "running" or current.hang is None:
            return
        hang = with_looks(
            current.hang, {rank: look for looks in current.looks.values() for rank, look in looks.items()}
        )
        hosts = {node_rank: agent.host for node_rank, agent in current.agents.items()}
        cause = f"hang: {hang.describe(hosts, current.order.world.ranks_per_node)}"
        self._failed(
            current.order.generation, f"{cause}; what each rank did is in {folder_of(current.order.generation)}"
        )
        judgement = self._verdicts.hung(cause, step=self._board.step)
        self.over(current, cause, now=now)
        self.not_before = now + judgement.pause_seconds
        if judgement.ends is not None:
            self.end("failed", judgement.ends)

    def _failed(self, generation: int, cause: str, *, what: What = "ranks", node_rank: int | None = None) -> None:
        """node_rank: of the node that it came from, where somebody can say."""
        self._board.tell(f"generation {generation} failed: {cause}")
        agents = self._generations[generation].agents
        hosts = [agent.host for rank, agent in agents.items() if rank == node_rank or len(agents) == 1]
        self.incidents.opens(what, where=", ".join(hosts), cause=cause, step=self._board.step)

    def node_fault(self, generation: int, node_rank: int, fault: Fault) -> None:
        """Names the node that somebody has to see to, with the line that says so."""
        current = self._generations.get(generation)
        if current is None or (agent := current.agents.get(node_rank)) is None:
            return
        fault = self._verdicts.of_node(agent.host, fault)
        found = NodeFault(generation, node_rank, agent.host, agent.node_id, fault, agent.instance)
        if self._verdicts.node_fault(found):
            self.named.bad.add(agent.node_id)
            self._roster.bars(agent.seat)
            self._board.tell(f"  node {node_rank} ({found.host}) | {fault.evidence}")
            self._board.tell(str(found))
            # Else they end already, or there is no other node.
            if current is self.running and not current.exits and current.yields is None and self._roster.has_enough:
                current.yields = f"a spare takes the place of {agent.host}"
                self._board.tell(f"generation {generation} saves and ends: {current.yields}")

    def node_leaves(self, node_id: str, why: str | None) -> None:
        """The ranks save, end, and go on elsewhere. None: what was said of it before was withdrawn."""
        if why is None:
            self.named.stays(node_id, self._known())
            self.may_grow()
        elif self.named.leaves(node_id, why):
            self.bar_named()

    def bar_named(self) -> None:
        """Of all that are there: a node was named."""
        for agent in self._known():
            self.named.bar(agent, self.running)

    def _known(self) -> list[AgentInfo]:
        current = self.running
        return [*self._roster.ready(), *(() if current is None else current.agents.values())]

    def over(self, current: Generation, cause: str, *, now: float) -> None:
        """The ranks are taken down; others follow unless a stop was asked for."""
        current.state, current.cause = "over", cause
        # A run of months has thousands of generations, each with the last lines of its ranks.
        current.exits.clear()
        current.first_cause = None
        current.looks = {}
        self._book.failed(now)
        if self.stop_requested:
            self.end("stopped")

    def committed(self, step: int) -> None:
        """A checkpoint of this step."""
        self._verdicts.keeps(step)

    def leave(self, before: str, cause: str, what: What | None, *, now: float) -> None:
        """Agents of attempts whose names sort before this go home; others go on elsewhere. what: None: the ranks that
        run save and end first, or fail.
        """
        self._farewell = cause, what
        self._roster.leave(before)
        self._depart(now=now)

    def _depart(self, *, now: float) -> None:
        """Ends the generation that runs, if its agents were sent home."""
        (cause, what), current = self._farewell, self.running
        if current is None or not self._roster.is_left:
            return
        if what is None:
            if current.yields is None:
                current.yields = cause
                self._board.tell(f"generation {self.number} saves and ends: {cause}")
            return
        self.incidents.opens(what, where="", cause=cause, step=self._board.step)
        current.state, current.cause = "over", cause
        self._book.failed(now)
        self._book.agents_missing(now, missing=True)

    def request_stop(self) -> None:
        """Every rank saves at the next step and ends. Before any rank runs, the run just ends."""
        self.stop_requested = True
        if self.running is None:
            self.end("stopped")

    def finished(self, current: Generation, outcome: Outcome, problem: str | None, *, now: float) -> None:
        """All ranks ended as they should. problem: why the run has no checkpoint of that step."""
        yields = current.yields if outcome.reason == "stopped" and not self.stop_requested else None
        if problem is not None and (yields is not None or current.found):
            # Nobody asked the run to end. Or agents may have told a coordinator that died: their images are still
            # there, and they tell it again.
            self.over(current, "its last checkpoint is not known to be whole", now=now)
        elif problem is None:
            self._board.step = outcome.step
            if yields is not None:
                self.over(current, yields, now=now)
            else:
                self.end(outcome.reason, outcome.why)
        else:
            self.end("failed", problem)

    def end(self, ended: EndKind, cause: str | None = None) -> None:
        if self.ended is None:
            if (current := self.running) is not None:
                current.state = "over"
            self.ended = ended, cause
            self._book.ended()
