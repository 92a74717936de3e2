"""Which agents still upload what ended generations have saved. Pure."""

from collections import defaultdict, deque
from collections.abc import Collection

from raynium.run.protocol import AgentInfo

# Of one agent. What it says of itself may be as old as its last generation, and its words may overtake each other.
ENDS_KEPT = 8


class Uploads:
    """Of the agents of one run."""

    def __init__(self) -> None:
        # By agent_id.
        self._agents: dict[str, AgentInfo] = {}
        self._over: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=ENDS_KEPT))

    def hears(self, agent: AgentInfo) -> None:
        """What it says of itself."""
        if set(agent.uploading) - set(self._over.get(agent.agent_id, ())):
            self._agents[agent.agent_id] = agent
        else:
            self._agents.pop(agent.agent_id, None)

    def ended(self, agent_id: str, generation_ids: Collection[str]) -> None:
        """It uploads nothing more of these."""
        self._over[agent_id] += generation_ids
        if (agent := self._agents.get(agent_id)) is not None:
            self.hears(agent)

    def agents(self) -> list[AgentInfo]:
        """That upload, as far as they live."""
        return list(self._agents.values())
