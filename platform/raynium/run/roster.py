"""Which node agents a run has: one attempt's at a time, and of these, which are ready to run ranks. Pure."""

from raynium.run.protocol import AgentInfo


class Roster:
    """An attempt is one life of Ray Train's worker group; its agents say how many nodes it has."""

    def __init__(self) -> None:
        self.attempt = ""
        # Ids of the generations for which agents of this attempt may still upload.
        self.uploading: list[str] = []
        self._begun: set[str] = set()
        self._past: set[str] = set()
        self._left = ""
        self._ready: dict[int, AgentInfo] = {}

    def begins(self, attempt: str) -> bool:
        """Ray Train has placed this attempt's agents, which may yet die before they join. True: it replaces a lost one.

        Ray repeats a call whose answer was lost, so the same attempt may be named again.
        """
        replaces = attempt not in self._begun and bool(self._begun) and not self.is_left
        self._begun.add(attempt)
        return replaces

    def greets(self, agent: AgentInfo) -> bool:
        """Takes note of who calls. True: the agent is the first of a new attempt, and those before it are gone."""
        if agent.attempt == self.attempt:
            return False
        self._past.add(self.attempt)
        self.attempt = agent.attempt
        # Of a coordinator that was started again after it was placed.
        self._begun.add(self.attempt)
        self._ready.clear()
        self.uploading.clear()
        return True

    def is_past(self, attempt: str) -> bool:
        """Of a node that was cut off, and that Ray took for dead."""
        return attempt in self._past

    def is_current(self, attempt: str) -> bool:
        """Whether agents of this attempt still have something to do here."""
        return attempt == self.attempt and not self.is_left

    def joins(self, agent: AgentInfo) -> None:
        """No rank of the agent's runs any more."""
        self._ready[agent.node_rank] = agent
        self.may_upload(*agent.uploading)

    def may_upload(self, *generation_ids: str) -> None:
        self.uploading += [each for each in generation_ids if each not in self.uploading]

    def is_complete(self) -> bool:
        return bool(self._ready) and all(len(self._ready) == agent.nodes for agent in self._ready.values())

    def ready(self) -> tuple[AgentInfo, ...]:
        """Those that have joined, by node rank."""
        return tuple(agent for _, agent in sorted(self._ready.items()))

    def departs(self) -> None:
        """All that were ready have their order."""
        self._ready.clear()

    def leave(self) -> None:
        """This attempt's agents go home; others will go on elsewhere."""
        self._left = self.attempt

    @property
    def is_left(self) -> bool:
        return self._left == self.attempt != ""
