"""One life of the ranks, as the coordinator knows it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raynium.run.protocol import AgentInfo, Look, Order, RankExit
from raynium.run.verdicts.failures import blamed
from raynium.run.verdicts.hangs import Hang


@dataclass
class Generation:
    """One life of the ranks. agents: by node rank; exits: of the nodes whose ranks have all ended."""

    order: Order
    agents: dict[int, AgentInfo]
    # Ids of the nodes in whose memory others' ranks may read until the first step.
    lenders: frozenset[str] = frozenset()
    state: Literal["running", "over"] = "running"
    cause: str = ""
    # Ordered by a coordinator that has died: this one does not know all that was told of it.
    found: bool = False
    exits: dict[int, Sequence[RankExit]] = field(default_factory=dict)
    # Of all nodes, as far as they have said.
    first_cause: RankExit | None = None
    # Why its ranks are to save and end, and others to follow; None: they go on.
    yields: str | None = None
    # It hangs: what the ranks of each node do, as they have told so far.
    hang: Hang | None = None
    looks: dict[int, Mapping[int, Look]] = field(default_factory=dict)

    def hears(self, node_rank: int, exits: Sequence[RankExit]) -> None:
        """How the ranks of a node ended."""
        self.exits[node_rank] = exits
        known = [] if self.first_cause is None else [self.first_cause]
        self.first_cause = blamed([*known, *exits])

    def all_have_ended(self) -> bool:
        return len(self.exits) == self.order.world.nodes

    def wants_look(self, node_rank: int) -> bool:
        return self.hang is not None and node_rank not in self.looks

    def all_have_looked(self) -> bool:
        """Or nobody is waited for any more."""
        return self.state == "over" or len(self.looks) == self.order.world.nodes
