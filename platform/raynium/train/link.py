"""A rank's one line to the outside: the node agent, or nothing when it was started by torchrun.

Messages travel as JSON, both ways: the fields of one of the classes below, and its name as "kind".
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Literal, NoReturn, Protocol, get_args

from raynium.config.images import IMAGE_SLOTS

# Steps of which a rank tells how long they took, at once.
STEPS_TIMED = 20

# An evaluation's progress is not told more often.
EVALUATION_SECONDS = 1.0

# The rank's exit code when its agent is gone; EX_UNAVAILABLE of sysexits.h.
AGENT_LOST_EXIT_CODE = 69


# ---- rank → agent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Heartbeat: what the rank does from now on, and of which step. "fetch" of a step: the one before it is done."""

    name: str
    step: int


@dataclass(frozen=True)
class Stepped:
    """Rank 0 only: one finished step, or what its save or its evaluation cost."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class BadStep:
    """Rank 0 only: see `Link.bad_step`."""

    step: int
    why: str


@dataclass(frozen=True)
class Artifact:
    """Rank 0 only: a text for the run's page."""

    path: str
    text: str


@dataclass(frozen=True)
class StepTimes:
    """Of this rank's last STEPS_TIMED steps, up to this one, in seconds: what it needed itself, its data included, and
    without waiting for others: the median, 90th percentile and most; and the median of whole steps."""

    step: int
    median_seconds: float
    p90_seconds: float
    most_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Evaluating:
    """Batches that this rank has evaluated, of them all."""

    done: int
    total: int


@dataclass(frozen=True)
class ImageWritten:
    """A snapshot lies complete in shared memory. info, replicas, upload: see `Link.image`."""

    slot: int
    info: str
    replicas: str
    upload: bool


@dataclass(frozen=True)
class Compiled:
    """See `Link.compiled`."""

    step: int
    graphs: int
    seconds: float
    surprises: list[str]


@dataclass(frozen=True)
class Collectives:
    """The answer to `TellCollectives`: torch's record of this rank's last ones, as JSON; "" if it keeps none."""

    record: str


@dataclass(frozen=True)
class Ended:
    """The loop ended as it should; see `train/loop.py`, Outcome."""

    step: int
    reason: Literal["finished", "stopped"]
    why: str | None = None


@dataclass(frozen=True)
class Failed:
    """An exception of class `error` ended the rank. retry: False where the same would happen again. undo: the step that
    is to be left out then.
    """

    error: str
    cause: str
    retry: bool
    undo: int | None = None


# ---- agent → rank ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """Save at the next step, then end."""


@dataclass(frozen=True)
class ImageFree:
    """This image may be written."""

    slot: int


@dataclass(frozen=True)
class TellCollectives:
    """The run hangs: which collectives did this rank come to?"""


RankMessage = (
    Phase
    | Stepped
    | BadStep
    | Artifact
    | StepTimes
    | Evaluating
    | ImageWritten
    | Compiled
    | Collectives
    | Ended
    | Failed
)
AgentMessage = Stop | ImageFree | TellCollectives
_KINDS = {kind.__name__: kind for kind in (*get_args(RankMessage), *get_args(AgentMessage))}


def to_bytes(message: RankMessage | AgentMessage) -> bytes:
    return json.dumps({"kind": type(message).__name__} | asdict(message)).encode()


def from_bytes(data: bytes) -> RankMessage | AgentMessage:
    """Of the other end, which runs the same code."""
    fields = json.loads(data)
    return _KINDS[fields.pop("kind")](**fields)


def step_times(step: int, times: Sequence[tuple[float, float]]) -> StepTimes:
    """Of (own seconds, seconds of the whole step)."""
    own, whole = (sorted(each) for each in zip(*times, strict=True))
    middle, p90 = (len(own) - 1) // 2, (len(own) - 1) * 9 // 10
    return StepTimes(step, own[middle], own[p90], own[-1], whole[middle])


class Link(Protocol):
    """What a rank tells, and may be told. No method waits for the network, except `wait_free_image`."""

    def phase(self, name: str, step: int) -> None:
        """Heartbeat: what this rank does now."""
        ...

    def compiling(self, started: bool) -> None:
        """Heartbeat: a compilation begins; or it has ended, and the phase that it fell into goes on."""
        ...

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One finished step."""
        ...

    def bad_step(self, step: int, why: str) -> None:
        """A step that nothing was learned from; why: with the names of its samples."""
        ...

    def artifact(self, path: str, text: str) -> None:
        """A text for the run's page; of rank 0's alone, so others may give any."""
        ...

    def took(self, step: int, *, own_seconds: float, step_seconds: float) -> None:
        """Of a finished step: see `StepTimes`."""
        ...

    def evaluating(self, done: int, total: int) -> None:
        """Batches of an evaluation that are done, of them all; as often as the caller likes."""
        ...

    def compiled(self, step: int, *, graphs: int, seconds: float, surprises: list[str]) -> None:
        """Graphs that this rank compiled in this step or its evaluation.

        surprises: a sentence for each that should have been there already; none while every shape is still new.
        """
        ...

    def stop_requested(self) -> bool:
        """True once somebody asked the run to stop."""
        ...

    def has_free_image(self) -> bool:
        """Whether `wait_free_image` would return at once."""
        ...

    def wait_free_image(self) -> int:
        """Blocks until one of this rank's images may be written; its slot, from 0 on."""
        ...

    def image(self, slot: int, info: str, replicas: str, *, upload: bool) -> None:
        """Hands over a complete image: the file to upload, and what else a restart from memory needs.

        Both are a checkpoint.manifest.ImageInfo as JSON. upload: else it is for a restart only.
        """
        ...


class AgentLink:
    """The link of a rank that a node agent forked. Sends from a thread of its own, so that training never waits."""

    def __init__(self, connection: Connection, *, reports_steps: bool, collectives: Callable[[], str] = lambda: ""):
        """collectives: this process's record of them, asked for when the run hangs, on a thread of the link."""
        self._connection = connection
        self._collectives = collectives
        # Rank 0's numbers are everybody's: the others stay silent.
        self._reports_steps = reports_steps
        self._told_evaluation = 0.0
        self._times: list[tuple[float, float]] = []
        # Name and step of the last one, compilations apart.
        self._phase = ("start", 0)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        # The agent says which, since older uploads may outlive a generation.
        # In the order in which they are to be written.
        self._free_images: dict[int, None] = {}
        self._image_freed = threading.Condition()
        self._sender = threading.Thread(target=self._send_all, name="agent-link-send", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive_all, name="agent-link-receive", daemon=True).start()

    def phase(self, name: str, step: int) -> None:
        self._phase = name, step
        self._post(Phase(name, step))

    def compiling(self, started: bool) -> None:
        name, step = self._phase
        self._post(Phase("compile" if started else name, step))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if self._reports_steps:
            # Which says it of a rank 0.
            self._phase = "fetch", step + 1
            self._post(Stepped(step, metrics))
        else:
            self.phase("fetch", step + 1)

    def bad_step(self, step: int, why: str) -> None:
        if self._reports_steps:
            self._post(BadStep(step, why))

    def artifact(self, path: str, text: str) -> None:
        if self._reports_steps:
            self._post(Artifact(path, text))

    def took(self, step: int, *, own_seconds: float, step_seconds: float) -> None:
        self._times.append((own_seconds, step_seconds))
        # All ranks tell of the same steps, whichever they began with.
        if step % STEPS_TIMED == 0:
            self._post(step_times(step, self._times))
            self._times = []

    def evaluating(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_evaluation >= EVALUATION_SECONDS:
            self._told_evaluation = now
            self._post(Evaluating(done, total))

    def compiled(self, step: int, *, graphs: int, seconds: float, surprises: list[str]) -> None:
        self._post(Compiled(step, graphs, seconds, surprises))

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def has_free_image(self) -> bool:
        return bool(self._free_images)

    def wait_free_image(self) -> int:
        with self._image_freed:
            if not self._free_images:
                self.phase("upload", self._phase[1])
            self._image_freed.wait_for(self.has_free_image)
            return next(iter(self._free_images))

    def image(self, slot: int, info: str, replicas: str, *, upload: bool) -> None:
        with self._image_freed:
            del self._free_images[slot]
        self._post(ImageWritten(slot, info, replicas, upload))

    def outcome(self, step: int, reason: Literal["finished", "stopped"], why: str | None = None) -> None:
        """The last message of a rank that ended as it should."""
        self._post(Ended(step, reason, why))

    def failed(self, error: Exception, *, retry: bool, undo: int | None = None) -> None:
        """The last message of a rank that an exception ended. retry, undo: as of a `Failed`."""
        name = type(error).__name__
        self._post(Failed(name, f"{name}: {error}", retry, undo))

    def close(self) -> None:
        """Returns when everything posted has been handed to the kernel."""
        self._outbox.put(None)
        self._sender.join()

    def _post(self, message: RankMessage) -> None:
        self._outbox.put(to_bytes(message))

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(message)
            except OSError:
                _end_without_agent()

    def _receive_all(self) -> None:
        while True:
            try:
                message = from_bytes(self._connection.recv_bytes())
            except (EOFError, OSError):
                _end_without_agent()
            match message:
                case Stop():
                    self._stop.set()
                case ImageFree(slot):
                    with self._image_freed:
                        self._free_images[slot] = None
                        self._image_freed.notify_all()
                case TellCollectives():
                    self._post(Collectives(self._collectives()))


def _end_without_agent() -> NoReturn:
    """The agent died. Nobody can restart, stop or hear this rank: free its cores for the next attempt."""
    os._exit(AGENT_LOST_EXIT_CODE)


class MemoryLink:
    """The fake: remembers what it was told. `stop_at` asks for a stop once that step has been reported."""

    def __init__(self, *, stop_at: int | None = None):
        self.steps: dict[int, dict[str, float]] = {}
        self.phases: list[tuple[str, int]] = []
        self.bad_steps: list[tuple[int, str]] = []
        self.artifacts: dict[str, str] = {}
        self.evaluations: list[tuple[int, int]] = []
        self.images: list[str] = []
        self.times: list[tuple[int, float, float]] = []
        # Step, graphs, surprises.
        self.compiles: list[tuple[int, int, list[str]]] = []
        self._stop_at = stop_at

    def phase(self, name: str, step: int) -> None:
        self.phases.append((name, step))

    def compiling(self, started: bool) -> None:
        before = [each for each in self.phases if each[0] != "compile"] or [("start", 0)]
        self.phases.append(("compile", before[-1][1]) if started else before[-1])

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps[step] = self.steps.get(step, {}) | metrics

    def bad_step(self, step: int, why: str) -> None:
        self.bad_steps.append((step, why))

    def artifact(self, path: str, text: str) -> None:
        self.artifacts[path] = text

    def took(self, step: int, *, own_seconds: float, step_seconds: float) -> None:
        self.times.append((step, own_seconds, step_seconds))

    def evaluating(self, done: int, total: int) -> None:
        self.evaluations.append((done, total))

    def compiled(self, step: int, *, graphs: int, seconds: float, surprises: list[str]) -> None:
        self.compiles.append((step, graphs, surprises))

    def stop_requested(self) -> bool:
        return self._stop_at is not None and self._stop_at in self.steps

    def has_free_image(self) -> bool:
        return True

    def wait_free_image(self) -> int:
        return len(self.images) % IMAGE_SLOTS

    def image(self, slot: int, info: str, replicas: str, *, upload: bool) -> None:
        self.images.append(info)
