"""Which node agents a run has: one attempt's at a time, and of these, which run the next generation. Pure.

Each agent has a seat in Ray Train's worker group. A run may have more seats than its ranks take: the rest are spares.
Who runs a generation is its crew, by node rank: whoever stays keeps its node rank, and with it the snapshots in its
memory; a spare, or who replaces a lost one, takes the place of the lost one.

A coordinator that was started again knows none of this. What it is told before any agent speaks counts all the same,
and names that sort by age say who is the newer, in whatever order they speak.
"""

from collections.abc import Callable, Mapping

from raynium.run.protocol import AgentInfo, MaySend
from raynium.run.uploads import Uploads


class Roster:
    """An attempt is one life of Ray Train's worker group; its agents say how many nodes a generation takes."""

    def __init__(self, *, fits: Callable[[int], bool], least_nodes: int | None, replace_seconds: float):
        """fits: whether so many nodes can share the model and the batch. least_nodes: with so many the run goes on,
        once a lost one was not replaced for replace_seconds; None: it waits.
        """
        self._fits, self._least_nodes, self._replace_seconds = fits, least_nodes, replace_seconds
        self.attempt = ""
        # Grows with all that agents who wait may wait for, but for another one that joins: the last one sees to it.
        self.changes = 0
        # Ids of the generations for which agents of this attempt may still upload.
        self.uploading: list[str] = []
        # Of those, what is known to run, and to be over.
        self.uploads = Uploads()
        # The newest that this coordinator saw Ray Train place.
        self._placed = ""
        # Agents of attempts whose names sort before go home.
        self._left_before = ""
        # Seat → the agent that waits for an order there; → the incarnation that spoke last there; → the least that is
        # not past.
        self._ready: dict[int, AgentInfo] = {}
        self._holders: dict[int, int] = {}
        self._least: dict[int, int] = {}
        # Of the newest generation, by node rank; and those of them that have not spoken to this coordinator yet.
        self._crew: tuple[int, ...] = ()
        self._silent: set[int] = set()
        self._lost: set[int] = set()
        # Seats whose nodes were named, see `NamedNodes`.
        self._barred: set[int] = set()
        # Seat and incarnation.
        self._home: set[tuple[int, int]] = set()
        # Since when too few agents are there, all that are left being ready.
        self._short_since: float | None = None

    # ---- attempts ----------------------------------------------------------------------------------------------------

    def begins(self, attempt: str) -> bool:
        """Ray Train has placed this attempt's agents, which may yet die before they join. True: it replaces a lost one.

        Ray repeats a call whose answer was lost, so the same attempt may be named again.
        """
        before = max(self._placed, self.attempt)
        self._placed = max(self._placed, attempt)
        return attempt > before != "" and before >= self._left_before

    def greets(self, attempt: str) -> bool:
        """Takes note of an attempt whose agents speak, or are spoken of. True: it is new; those before are gone."""
        if attempt <= self.attempt:
            return False
        self.attempt = attempt
        self.changes += 1
        seats = (self._ready, self._holders, self._least, self._silent, self._lost, self._barred)
        for each in (*seats, self.uploading, self._home):
            each.clear()
        self._crew, self._short_since = (), None
        return True

    def is_current(self, attempt: str) -> bool:
        """Whether agents of this attempt still have something to do here."""
        return attempt == self.attempt and not self.is_left

    def leave(self, before: str) -> None:
        """Agents of attempts whose names sort before this go home; others will go on elsewhere."""
        self._left_before = max(self._left_before, before)
        self.changes += 1

    @property
    def is_left(self) -> bool:
        return "" < self.attempt < self._left_before

    # ---- agents ------------------------------------------------------------------------------------------------------

    def is_past(self, agent: AgentInfo | MaySend) -> bool:
        """Of a node that was cut off, and that Ray took for dead."""
        current = agent.attempt == self.attempt
        return agent.attempt < self.attempt or (current and agent.incarnation < self._least.get(agent.seat, 0))

    def replaces(self, agent: AgentInfo) -> bool:
        """Whether an older one held its seat until now, of whose end nobody has told."""
        return self._least.get(agent.seat, agent.incarnation) < agent.incarnation and agent.seat not in self._lost

    def loses(self, agents: Mapping[int, int]) -> list[int]:
        """They have died. agents: seat → incarnation. Returns the seats of those of which it was not known."""
        new = [seat for seat, incarnation in agents.items() if incarnation >= self._least.get(seat, 0)]
        for seat in new:
            self.changes += 1
            self._least[seat] = agents[seat] + 1
            self._lost.add(seat)
            self._barred.discard(seat)
            self._silent.discard(seat)
            self._ready.pop(seat, None)
            self._holders.pop(seat, None)
        return new

    def misses(self, crew: Mapping[int, int]) -> list[int]:
        """The seats of these agents that are gone."""
        return [seat for seat, incarnation in crew.items() if incarnation < self._least.get(seat, 0)]

    def speaks(self, agent: AgentInfo) -> None:
        """It is alive, and not past."""
        self._holders[agent.seat] = self._least[agent.seat] = agent.incarnation
        self._lost.discard(agent.seat)
        self.uploads.hears(agent)
        if agent.seat in self._silent:
            # Others may be as slow, and are waited for anew.
            self._silent.discard(agent.seat)
            self._short_since = None

    def joins(self, agent: AgentInfo) -> None:
        """No rank of the agent's runs any more."""
        if agent.seat in self._lost:
            # Who was there before is not waited for any more.
            self._crew = tuple(-1 if seat == agent.seat else seat for seat in self._crew)
        self.speaks(agent)
        self._ready[agent.seat] = agent
        self.may_upload(*agent.uploading)

    def bars(self, seat: int) -> bool:
        """Its node is bad, or will leave: it runs no rank while there are enough others. False: that was known."""
        known = seat in self._barred
        self._barred.add(seat)
        self.changes += not known
        return not known

    def frees(self, seat: int) -> None:
        """It may run ranks as any other."""
        self.changes += seat in self._barred
        self._barred.discard(seat)

    @property
    def has_enough(self) -> bool:
        """Whether the run can do without the seats that are barred."""
        nodes = max((agent.nodes for agent in self._ready.values()), default=len(self._crew))
        return len(self._holders.keys() - self._barred) >= nodes

    def goes_home(self, attempt: str, seat: int, incarnation: int) -> None:
        """It has done all that it had to: sent, uploaded, and given back."""
        if attempt == self.attempt:
            self._home.add((seat, incarnation))

    @property
    def waits_for_seats(self) -> bool:
        """Ray Train is to start an agent that has not come yet."""
        return bool(self._lost)

    @property
    def all_are_home(self) -> bool:
        """Of those that live."""
        return self._holders.items() <= self._home

    def may_upload(self, *generation_ids: str) -> None:
        self.uploading += [each for each in generation_ids if each not in self.uploading]

    @property
    def uploading_nodes(self) -> frozenset[str]:
        """Ids of nodes from which what generations that are over have saved is still on its way to the store."""
        return frozenset(agent.node_id for agent in self.uploads.agents() if not self.is_past(agent))

    # ---- crews -------------------------------------------------------------------------------------------------------

    def crew(self, *, now: float) -> tuple[AgentInfo, ...]:
        """Who is to run the next generation, by node rank; empty while somebody is waited for."""
        if (size := self._size(now)) is None:
            return ()
        fit = self._ready.keys() - self._barred
        fit = fit if len(fit) >= size else self._ready.keys()
        # In order, with a look-up that takes no time.
        staying = dict.fromkeys(seat for seat in self._staying() if seat in fit)
        others = sorted(fit - staying.keys())
        if size == len(self._crew):
            seats = [seat if seat in staying else others.pop(0) for seat in self._crew]
        else:
            seats = [*staying, *others][:size]
        return tuple(self._ready[seat] for seat in seats)

    def ready(self) -> list[AgentInfo]:
        """Those that wait for an order."""
        return list(self._ready.values())

    def seconds_to_wait(self, *, now: float) -> float | None:
        """Until a crew may be smaller than wanted; None: that is not what is waited for."""
        return None if self._short_since is None else max(0.0, self._short_since + self._replace_seconds - now)

    def can_grow(self, nodes: int) -> bool:
        """Whether a generation that runs on so many nodes could be followed by one on more."""
        if not self._ready:
            return False
        wanted = next(iter(self._ready.values())).nodes
        found = self._most(min(wanted, nodes + len(self._ready)), least=nodes + 1)
        return found is not None

    def can_relieve(self) -> bool:
        """Whether a generation that runs on seats that are barred could be followed by one that does not."""
        if self._barred.isdisjoint(self._crew):
            return False
        return len((self._ready.keys() | set(self._crew)) - self._barred) >= len(self._crew)

    def departs(self, crew: Mapping[int, int]) -> None:
        """They have their order, which a coordinator that has died may have given. crew: seat → incarnation, by node
        rank.
        """
        self._crew, self._short_since = tuple(crew), None
        for seat, incarnation in crew.items():
            if incarnation >= self._least.get(seat, 0):
                self._least[seat] = incarnation
                # Or one that had its seat before, and was cut off since.
                self._ready.pop(seat, None)
                if self._holders.get(seat) != incarnation:
                    self._holders.pop(seat, None)
        self._silent = crew.keys() - self._holders.keys() - self._lost

    def _staying(self) -> list[int]:
        return [seat for seat in self._crew if seat >= 0 and seat not in self._lost]

    def _size(self, now: float) -> int | None:
        # Asked at each join, of which a large run has a thousand: most know by the numbers alone.
        gone = self._crew.count(-1) + len(self._lost) + len(self._silent)
        if not self._ready or len(self._ready) < len(self._crew) - gone:
            return None
        if any(seat not in self._ready and seat not in self._silent for seat in self._staying()):
            return None
        # Those that are silent may be lost, as a coordinator was told that has died.
        if self._silent and not self._have_waited(now):
            return None
        wanted, here = next(iter(self._ready.values())).nodes, len(self._ready)
        if here >= wanted:
            return wanted
        if self._least_nodes is None:
            return None
        size = self._most(here, least=self._least_nodes)
        # A crew that was smaller than wanted already has waited.
        if size is not None and 0 < len(self._crew) <= size:
            return size
        if not self._lost and self.attempt <= self._placed:
            # Ray Train has placed all of an attempt's agents at once: the others are starting. Of one that was placed
            # before this coordinator began, some may have been lost before, too.
            return None
        return size if self._have_waited(now) else None

    def _have_waited(self, now: float) -> bool:
        self._short_since = now if self._short_since is None else self._short_since
        return now - self._short_since >= self._replace_seconds

    def _most(self, nodes: int, *, least: int) -> int | None:
        return next((size for size in range(nodes, least - 1, -1) if self._fits(size)), None)
