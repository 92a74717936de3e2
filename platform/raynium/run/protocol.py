"""What driver, coordinator and node agents say to each other. Plain data: no ray, no torch."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from raynium.config.world import World
from raynium.health.faults import ACTIONS, Fault
from raynium.tracking.ledger import Ledger


@dataclass(frozen=True)
class HeldImages:
    """Snapshots of one generation and step that lie complete in a node's memory."""

    generation_id: str
    step: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class AgentInfo:
    """A node agent that is ready to run ranks."""

    attempt: str  # one life of the Ray Train worker group; every agent of it carries the same
    node_rank: int
    host: str  # address the other nodes reach this one at
    free_port: int  # for the rendezvous, used if this is node 0
    pid: int  # of the agent; its ranks are named by its log
    images: tuple[HeldImages, ...] = ()  # what its ranks could start from without the store
    machine: str = ""  # its product name, on EC2 the instance type; "": it shows none
    node_id: str = ""  # Ray's, new in each life of the node; "": without Ray
    last_generation: int = 0  # that it ran: a coordinator that was started again counts on from there
    uploading: tuple[str, ...] = ()  # ids of the generations for which it still uploads


@dataclass(frozen=True)
class Order:
    """The coordinator's answer to `join`: run one generation, or go home."""

    kind: Literal["run", "end"]
    world: World | None = None  # of a generation to run
    generation: int = 0
    generation_id: str = ""  # in every key this generation writes, so that an older one can never overwrite
    master_host: str = ""
    master_port: int = 0
    resume_step: int | None = None  # None: start from the initial weights
    resume_images: HeldImages | None = None  # all ranks have these in their nodes' memory: no need to read the store
    ledger: Ledger = field(default_factory=Ledger)  # of the whole run until now


@dataclass(frozen=True)
class Verdict:
    """The coordinator's answer to `watch`."""

    kind: Literal["stop", "over"]  # stop: save at the next step and end; over: kill the ranks and join again
    cause: str = ""


@dataclass(frozen=True)
class RankExit:
    """How one rank ended. `cause` is None when it ended as it should."""

    rank: int
    exit_code: int  # negative: the signal that killed it
    cause: str | None
    retry: bool  # False: the same would happen again
    error: str | None = None  # class of the exception that ended it, if one did
    outcome: dict[str, Any] | None = None  # {"step", "reason"} of a rank that ended as it should
    last_lines: tuple[str, ...] = ()
    fault: Fault | None = None  # a known fault that ended it; see node/diagnosis.py


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was committed, and the list of those that the run has since then."""

    number: int  # counts from 1
    step: int
    metrics: dict[str, float]  # checkpoint/…: bytes and seconds
    checkpoints: str  # JSON, for the MLflow page


@dataclass(frozen=True)
class Event:
    """A line for the user's terminal."""

    number: int
    unix: float
    text: str


@dataclass(frozen=True)
class NodeFault:
    """A verdict that names a node, which somebody has to see to."""

    generation: int
    node_rank: int
    host: str
    node_id: str  # as in AgentInfo
    fault: Fault

    def __str__(self) -> str:
        return f"node {self.node_rank} ({self.host}): {self.fault}: {ACTIONS[self.fault.action]}"

    def to_json(self) -> dict[str, Any]:
        fault = self.fault
        return {
            "generation": self.generation,
            "node_rank": self.node_rank,
            "host": self.host,
            "name": fault.name,
            "action": fault.action,
            "evidence": fault.evidence,
            "text": str(self),
        }


@dataclass(frozen=True)
class Status:
    """What the driver shows and records."""

    generation: int
    running: bool  # ranks have been ordered and have not ended
    resume_step: int | None
    step: int
    metrics: dict[str, float]  # the last value of every metric
    committed_step: int | None
    committed_uri: str | None
    agents: Sequence[AgentInfo]  # of the current generation, by node rank
    ended: Literal["finished", "stopped", "failed"] | None
    cause: str | None  # of a failure
    events: Sequence[Event] = field(default_factory=tuple)
    node_faults: Sequence[NodeFault] = ()  # all of this coordinator's life, oldest first
    ledger: Ledger = field(default_factory=Ledger)  # of this coordinator's life
    life: str = ""  # another one in each life of the coordinator, which knows nothing of those before


class CoordinatorCalls(Protocol):
    """How an agent reaches the coordinator: a Ray actor in production, an asyncio loop in tests."""

    def call(self, method: str, *arguments: Any) -> "Future[Any]":
        """Calls a coroutine of `RunCoordinator` by name; never blocks."""
        ...
