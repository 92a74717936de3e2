"""What driver, coordinator and node agents say to each other. Plain data: no ray, no torch."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from raynium.config.world import World
from raynium.health.faults import ACTIONS, Fault
from raynium.health.metadata_service import Instance
from raynium.health.neuron_monitor import DeviceSample
from raynium.run.held_images import HeldImages
from raynium.run.leaps import LeftOut
from raynium.run.points import PointsKept, TakesRank0
from raynium.run.positions import RankPosition
from raynium.tracking.incidents import Incident, What
from raynium.tracking.ledger import Cause, Ledger, LifeLedger
from raynium.tracking.tracker import Point

EndKind = Literal["finished", "stopped", "failed"]

# A rank whose connection broke says so at once; the one that broke it may come to word later, and so long is waited.
PEER_WORD_SECONDS = 0.5
# Of a run that hangs: until every node must have told what its ranks do, or is not waited for.
LOOKS_SECONDS = 3.0
# Host and port.
Address = tuple[str, int]


# ---- what an agent is, and is ordered ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgentInfo:
    """A node agent.

    attempt: one life of the Ray Train worker group; every agent of it carries the same, and a later one's name sorts
    after it. seat: its place in there, which one that replaces it takes; incarnation: how many agents had it before.
    So of two that claim a seat the newer is known. nodes: how many agents run a generation; the others are spares.
    host: the address that the other nodes reach this one at. free_port: for the rendezvous, used if this is node 0.
    images: what its ranks could start from without the store. machine: its product name, on EC2 the instance type; ""
    if it shows none. node_id: Ray's, new in each life of the node; ""
    without Ray. last_generation: that it ran, since a coordinator that was started again counts on from there.
    uploading: generations for which it still uploads. buddy_port: at which it takes copies of other nodes' snapshots;
    0: at none. copies: that it has of them. instance: of EC2, if fault.bad_instance asks for it and there is one.
    zone, placement_group: what Ray's labels say of the node's place; "" for nothing.
    """

    attempt: str
    seat: int
    nodes: int
    host: str
    free_port: int
    pid: int
    incarnation: int = 0
    images: tuple[HeldImages, ...] = ()
    machine: str = ""
    node_id: str = ""
    last_generation: int = 0
    uploading: tuple[str, ...] = ()
    buddy_port: int = 0
    copies: tuple[HeldImages, ...] = ()
    instance: Instance | None = None
    zone: str = ""
    placement_group: str = ""

    @property
    def agent_id(self) -> str:
        """Of this one life of the agent."""
        return f"{self.attempt}-{self.seat}-{self.incarnation}"

    @property
    def address(self) -> Address:
        """At which it takes copies, and lends what it has."""
        return self.host, self.buddy_port


@dataclass(frozen=True)
class Order:
    """Run one generation.

    seats, incarnations: of the agents that do, by node rank. generation_id is in every key that the generation writes,
    so that an older one can never overwrite. resume_step: None for the initial weights. resume_images: all ranks have
    these in their nodes' memory, and need not read the store. ledger: of the whole run until now. begins: see
    `GenerationBook`. buddies: by node rank, who takes copies of its snapshots, if anybody does. copies: who has the
    images of resume_images of which ranks whose own nodes have not; of all ranks, where another world's took it.
    """

    world: World
    seats: tuple[int, ...]
    incarnations: tuple[int, ...]
    generation: int
    generation_id: str
    master_host: str
    master_port: int
    resume_step: int | None = None
    resume_images: HeldImages | None = None
    ledger: Ledger = field(default_factory=Ledger)
    left_out: LeftOut = field(default_factory=LeftOut)
    begins: Cause = "load"
    buddies: tuple[Address | None, ...] = ()
    copies: dict[Address, Sequence[int]] = field(default_factory=dict)

    @property
    def reshapes(self) -> bool:
        """Whether its ranks begin with what those of another world left in memory."""
        return self.resume_images is not None and self.resume_images.world != self.world

    def is_for(self, agent: AgentInfo) -> bool:
        """And not for one that had its seat before, or has it since."""
        return agent.seat in self.seats and self.incarnations[self.node_rank(agent)] == agent.incarnation

    def node_rank(self, agent: AgentInfo) -> int:
        """Of an agent that runs it."""
        return self.seats.index(agent.seat)


@dataclass(frozen=True)
class StandBy:
    """Others run this generation: be ready for a later one, and join again. lends: what they may read in its memory.
    resume_step: as of the order.
    """

    generation: int
    lends: HeldImages | None = None
    resume_step: int | None = None


@dataclass(frozen=True)
class GoHome:
    """The run has ended, or goes on elsewhere. ledger: of the whole run."""

    ledger: Ledger


@dataclass(frozen=True)
class Verdict:
    """The coordinator's answer to `watch`. stop: save at the next step and end; over: kill the ranks and join again.

    look: the run hangs: tell what your ranks do (`StacksTaken`), and watch again.
    """

    kind: Literal["stop", "look", "over"]
    cause: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of a rank whose loop ended as it should: its last step, and why there, if the run finished before its last."""

    step: int
    reason: Literal["finished", "stopped"]
    why: str | None = None


@dataclass(frozen=True)
class RankExit:
    """How one rank ended.

    exit_code: negative is the signal that killed it. cause: None when it ended as it should. retry: False where the
    same would happen again. error: class of the exception that ended it, if one did. outcome: of a rank that ended as
    it should. fault: a known one that ended it; see node/diagnosis.py. undo: the step that it is to leave out.
    """

    rank: int
    exit_code: int
    cause: str | None
    retry: bool
    error: str | None = None
    outcome: Outcome | None = None
    last_lines: tuple[str, ...] = ()
    fault: Fault | None = None
    undo: int | None = None


@dataclass(frozen=True)
class NodeEnded:
    """How the ranks of one node ended.

    exits: of those that did so by themselves. booked: of the generation, by the agent that has rank 0. fault: of this
    node, though none of its ranks died of it: they hung, or trained on. step: the newest that any of its ranks has done
    in this generation, which `Progressed` may not have told.
    """

    exits: tuple[RankExit, ...] = ()
    booked: Ledger | None = None
    fault: Fault | None = None
    step: int = 0


# ---- what an agent tells -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """A line for the user's terminal. what, where: of the incident that it tells of, which the run gets on with."""

    text: str
    what: What | None = None
    where: str = ""


@dataclass(frozen=True)
class StepLeftOut:
    """The run did not learn from this step. why: see `train/guard.py`, Verdict, and its samples."""

    step: int
    why: str


@dataclass(frozen=True)
class Progressed:
    """Rank 0's numbers at a step, and what its agent has booked of the generation so far."""

    generation_id: str
    step: int
    metrics: dict[str, float]
    ledger: Ledger


@dataclass(frozen=True)
class Evaluates:
    """How far rank 0's evaluation has come: batches of them all."""

    done: int
    total: int


@dataclass(frozen=True)
class RanksSeen:
    """Where a node's ranks are, told now and then. device_seconds: after which its devices tell of a hang; 0: never."""

    generation: int
    positions: dict[int, RankPosition]
    device_seconds: float = 0.0


@dataclass(frozen=True)
class RankTimes:
    """Of one rank's last steps up to `step`, in seconds: see `train/link.py`, StepTimes."""

    step: int
    median_seconds: float
    p90_seconds: float
    most_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class TimesSeen:
    """How long steps take the ranks of a node."""

    generation: int
    node_rank: int
    times: dict[int, RankTimes]


@dataclass(frozen=True)
class Look:
    """What one rank of a run that hangs was doing. stacks: Python's, of all threads, or why there are none.

    collectives: torch's record of its last ones, as JSON; "" without.
    """

    stacks: str
    collectives: str = ""


@dataclass(frozen=True)
class StacksTaken:
    """The answer to the verdict "look", of one node's ranks."""

    generation: int
    node_rank: int
    looks: dict[int, Look]


@dataclass(frozen=True)
class ShardSaved:
    """One rank's shard is in the store, verified. entry: a `ShardEntry` as JSON.

    generation and world are its writer's, whichever coordinator lives by now. parent_step: that it started from.
    """

    step: int
    rank: int
    entry: str
    upload_seconds: float
    parent_step: int | None
    world: World


@dataclass(frozen=True)
class ShardFailed:
    """A shard could not be uploaded, and without it the step has no checkpoint; training goes on."""

    step: int
    rank: int
    cause: str


@dataclass(frozen=True)
class Uploaded:
    """An agent uploads nothing more of these generations, which are over: its node could go now."""

    agent_id: str
    generation_ids: tuple[str, ...]


@dataclass(frozen=True)
class DevicesSeen:
    """One node's accelerators."""

    node_rank: int
    sample: DeviceSample


@dataclass(frozen=True)
class NodeLeaves:
    """Somebody who must know has said that this node will be taken away. why: None: or not any more."""

    node_id: str
    why: str | None


@dataclass(frozen=True)
class MaySend:
    """An agent has points for MLflow, and may have been cut off for long. All three: as in AgentInfo."""

    attempt: str
    seat: int
    incarnation: int


@dataclass(frozen=True)
class WentHome:
    """An agent that was told to go home has done all that it had to. All three: as in AgentInfo."""

    attempt: str
    seat: int
    incarnation: int


@dataclass(frozen=True)
class CannotGoOn:
    """An agent cannot do its part, and no other try could."""

    cause: str


AgentEvent = (
    Said
    | StepLeftOut
    | Progressed
    | Evaluates
    | RanksSeen
    | TimesSeen
    | StacksTaken
    | ShardSaved
    | ShardFailed
    | Uploaded
    | DevicesSeen
    | PointsKept
    | TakesRank0
    | MaySend
    | NodeLeaves
    | WentHome
    | CannotGoOn
)


@dataclass(frozen=True)
class News:
    """The answer to every event, for the run's page. metrics: of all nodes, to `DevicesSeen` and node 0's `TimesSeen`.
    artifacts: path → text, to node 0's `TimesSeen` and `StacksTaken`. points: to `TakesRank0`, and late ones to
    `PointsKept`, as wants_all_points. displaced: to `MaySend`.
    """

    ledger: Ledger
    metrics: dict[str, float]
    artifacts: dict[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    displaced: bool = False
    wants_all_points: bool = False


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was committed. number counts from 1 in each life of the coordinator, which has a name.

    metrics: checkpoint/…, bytes and seconds. checkpoints: JSON of those that the run has since then, for its page.
    """

    life: str
    number: int
    step: int
    metrics: dict[str, float]
    checkpoints: str


class Coordinator(Protocol):
    """The run's coordinator as an agent reaches it: a Ray actor in production, an asyncio loop in tests.

    No method blocks. Calls may overtake each other, and are made again if the coordinator dies before it answers.
    """

    def join(self, agent: AgentInfo) -> "Future[Order | StandBy | GoHome]":
        """No rank of this agent's runs; answered when there is a crew, with it or without, or the run has ended."""
        ...

    def watch(self, agent: AgentInfo, order: Order, *, stop_known: bool) -> "Future[Verdict]":
        """This agent runs the order; answered when it must act."""
        ...

    def exited(self, agent: AgentInfo, order: Order, ended: NodeEnded) -> "Future[None]":
        """All ranks of this agent have ended."""
        ...

    def commits(self, sent: Commit | None) -> "Future[list[Commit] | None]":
        """Those that no agent has sent to MLflow; waits for one. None: the run, or this attempt, has ended.

        sent: the last that the caller has sent.
        """
        ...

    def tell(self, event: AgentEvent) -> "Future[News]":
        """Something happened on this agent's node."""
        ...


# ---- what the driver sees ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A line for the user's terminal."""

    number: int
    unix: float
    text: str


@dataclass(frozen=True)
class NodeFault:
    """A verdict that names a node, which somebody has to see to. node_id, instance: as in AgentInfo."""

    generation: int
    node_rank: int
    host: str
    node_id: str
    fault: Fault
    instance: Instance | None = None

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
    """What the driver shows and records.

    running: ranks have been ordered and have not ended. metrics: the last value of every one. agents: of the current
    generation, by node rank. cause: of a failure. evaluation: batches done and in all, while one goes on. node_faults:
    all of this coordinator's life, oldest first.
    incidents: the same. ledger: what this life of the coordinator has booked. waits_for_seats: Ray Train is to replace
    an agent, and has not yet. all_are_home: no agent that lives has anything left to do. has_spares: for the nodes that
    verdicts named there are others. busy_nodes: ids of those whose ranks are about to go on elsewhere, or that upload.
    """

    generation: int
    running: bool
    resume_step: int | None
    step: int
    metrics: dict[str, float]
    committed_step: int | None
    committed_uri: str | None
    agents: Sequence[AgentInfo]
    ended: EndKind | None
    cause: str | None
    events: Sequence[Event] = ()
    evaluation: tuple[int, int] | None = None
    node_faults: Sequence[NodeFault] = ()
    incidents: Sequence[Incident] = ()
    ledger: LifeLedger = field(default_factory=LifeLedger)
    waits_for_seats: bool = False
    all_are_home: bool = False
    has_spares: bool = False
    busy_nodes: frozenset[str] = frozenset()
