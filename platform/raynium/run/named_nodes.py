"""Nodes that somebody named: a verdict calls one bad, a notice says that one will be taken away.

They run no ranks while there are enough others, whichever agents of whichever attempt are or come there.
"""

from collections.abc import Iterable

from raynium.run.board import Board
from raynium.run.generation import Generation
from raynium.run.protocol import AgentInfo
from raynium.run.roster import Roster
from raynium.tracking.incidents import Incidents


class NamedNodes:
    """By their ids, which are Ray's."""

    def __init__(self, roster: Roster, board: Board, incidents: Incidents):
        self._roster, self._board, self._incidents = roster, board, incidents
        # By a verdict.
        self.bad: set[str] = set()
        # Why a node will leave; and those of which the user knows.
        self._leaving: dict[str, str] = {}
        self._told: set[str] = set()

    def leaves(self, node_id: str, why: str) -> bool:
        """A notice, which is told again and again, and maybe while nobody of that node is known. False: it is known."""
        known = node_id in self._leaving
        self._leaving.setdefault(node_id, why)
        return not known

    def stays(self, node_id: str, agents: Iterable[AgentInfo]) -> None:
        """The notice of before was withdrawn. agents: that are known."""
        if self._leaving.pop(node_id, None) is None:
            return
        self._told.discard(node_id)
        for agent in agents:
            if agent.node_id == node_id:
                self._board.tell(f"node {agent.seat} ({agent.host}) stays: its notice was withdrawn")
                self.bar(agent, None)

    def bar(self, agent: AgentInfo, current: Generation | None) -> None:
        """If its node was named. current: that runs: ranks of its that a notice concerns save, end and go on elsewhere;
        where there is no other node, on that one until it goes.
        """
        why = self._leaving.get(agent.node_id)
        if why is None and agent.node_id not in self.bad:
            self._roster.frees(agent.seat)
            return
        self._roster.bars(agent.seat)
        if why is None or agent.node_id in self._told:
            return
        self._told.add(agent.node_id)
        self._board.tell(f"node {agent.seat} ({agent.host}) will leave: {why}")
        # The key is the same in each life of the coordinator, which make one incident of it.
        key = f"leaves-{agent.node_id}"
        self._incidents.notes("node", where=agent.host, cause=why, step=self._board.step, key=key)
        if current is not None and agent in current.agents.values() and current.yields is None:
            current.yields = f"{agent.host} will leave"
            self._board.tell(f"generation {current.order.generation} saves and ends: {current.yields}")
