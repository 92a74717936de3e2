"""The goodput ledger: where the wall time of a run went. Every second has one cause; all of them are the wall time.

Each book is kept by the process that sees what it holds, and is handed up:
    GenerationBook    node 0's agent: what rank 0 did, from the order to the last that was heard of it
    CoordinatorBook   the coordinator: generations, and the time before, between and after them
    RunBook           the driver, for the run record: coordinators, and the time before, between and after them
A time `now` is in seconds of the steady clock of the process that keeps the book. No mlflow, no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

Cause = Literal[
    "train", "compile", "evaluate", "save", "load", "repeat", "notice", "wait", "restart", "restore", "start", "finish",
    "down", "other",
]  # fmt: skip
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True)
class Ledger:
    """Seconds of wall time by cause; `tracking/metrics.py` says what each means.

    What failures cost is `repeat`, `notice`, `wait`, `restart` and `restore`.

    step: the last one that is in `train`. One that is not later is repeated.
    """

    train: float = 0.0
    compile: float = 0.0
    evaluate: float = 0.0
    save: float = 0.0
    load: float = 0.0
    repeat: float = 0.0
    notice: float = 0.0
    wait: float = 0.0
    restart: float = 0.0
    restore: float = 0.0
    start: float = 0.0
    finish: float = 0.0
    down: float = 0.0
    other: float = 0.0
    step: int = 0

    def seconds(self) -> dict[Cause, float]:
        return {cause: getattr(self, cause) for cause in CAUSES}

    @property
    def total(self) -> float:
        """Seconds of wall time."""
        return sum(self.seconds().values())

    @property
    def goodput(self) -> float:
        """The fraction of the wall time in which the run got on: 0 to 1."""
        return self.train / self.total if self.total else 0.0

    def __add__(self, other: "Ledger") -> "Ledger":
        theirs = other.seconds()
        sums = {cause: seconds + theirs[cause] for cause, seconds in self.seconds().items()}
        return Ledger(**sums, step=max(self.step, other.step))

    def metrics(self) -> dict[str, float]:
        """goodput/…, for MLflow."""
        by_cause = {f"goodput/{cause}_seconds": seconds for cause, seconds in self.seconds().items()}
        return {"goodput/ratio": self.goodput, "goodput/wall_seconds": self.total} | by_cause


def filled(parts: Ledger, wall_seconds: float, rest: Cause) -> Ledger:
    """The parts and, as `rest`, what they leave of the wall time.

    Clocks of two machines differ by parts per million: parts that come to more are all shortened alike.
    """
    missing = wall_seconds - parts.total
    if missing < 0:
        shorter = {cause: seconds * wall_seconds / parts.total for cause, seconds in parts.seconds().items()}
        return replace(parts, **shorter)
    return replace(parts, **{rest: getattr(parts, rest) + missing})


class GenerationBook:
    """What rank 0 did in one generation, from its messages (`train/link.py`)."""

    def __init__(self, *, trained_step: int, now: float, begins: Cause = "load"):
        """trained_step: the last step that any generation of the run is known to have taken; now: of the order.

        begins: what the time until its first step is; of a generation that takes the place of a failed one `restore`.
        """
        self._began = self._heard = now
        self._begins: Cause = begins
        # Measured by rank 0 itself; compilations inside the step or evaluation it reports next; until its first step.
        self._measured = Ledger(step=trained_step)
        self._compile_seconds = 0.0
        self._begin_seconds: float | None = None

    def compiled(self, seconds: float) -> None:
        """A message that precedes the one of its step."""
        self._compile_seconds += seconds

    def step(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        """A step message: of a step and its evaluation, or of the save after it."""
        self._heard = now
        if "time/step_seconds" in metrics:
            step_seconds, evaluate_seconds = metrics["time/step_seconds"], metrics.get("time/eval_seconds", 0.0)
            in_step = min(self._compile_seconds, step_seconds)
            in_evaluation = min(self._compile_seconds - in_step, evaluate_seconds)
            self._compile_seconds = 0.0
            is_new = step > self._measured.step
            self._measured += Ledger(
                train=step_seconds - in_step if is_new else 0.0,
                repeat=0.0 if is_new else step_seconds - in_step,
                compile=in_step + in_evaluation,
                evaluate=evaluate_seconds - in_evaluation,
                step=step,
            )
        self._measured += Ledger(save=sum(metrics.get(f"{of}/stall_seconds", 0.0) for of in ("checkpoint", "snapshot")))
        if self._measured.total:
            # The messages of two steps may be read at once: then the first one came late, and the second one shows it.
            unexplained = max(0.0, now - self._began - self._measured.total)
            known = self._begin_seconds
            self._begin_seconds = unexplained if known is None else min(known, unexplained)

    def ledger(self) -> Ledger:
        """From the order to the last message; what came after that, only the coordinator can name."""
        wall_seconds = self._heard - self._began
        if self._begin_seconds is None:
            return filled(self._measured, wall_seconds, self._begins)
        begin = replace(Ledger(), **{self._begins: self._begin_seconds})
        return filled(self._measured + begin, wall_seconds, "other")


@dataclass(frozen=True)
class LifeLedger:
    """One life of the coordinator: the generation that it ordered or found last, and all that was before that.

    continued: id of a generation that a coordinator before it ordered, and all of which this ledger holds.
    """

    life: str = ""
    closed: Ledger = field(default_factory=Ledger)
    generation_id: str = ""
    generation: Ledger = field(default_factory=Ledger)
    continued: str = ""

    @property
    def booked(self) -> Ledger:
        return self.closed + self.generation


@dataclass(frozen=True)
class Before:
    """All of a run that was before a life of its coordinator.

    dead: the life before it, whose generation may go on; then it counts in the new life, and not here.
    silent_seconds: after that one's last word, in which no rank ran if its generation does not go on.
    """

    settled: Ledger = field(default_factory=Ledger)
    dead: LifeLedger = field(default_factory=LifeLedger)
    silent_seconds: float = 0.0

    def without(self, life: LifeLedger) -> Ledger:
        if life.continued and life.continued == self.dead.generation_id:
            return self.settled + self.dead.closed + Ledger(step=self.dead.booked.step)
        return self.settled + self.dead.booked + Ledger(restart=self.silent_seconds)

    def plus(self, life: LifeLedger) -> Ledger:
        return self.without(life) + life.booked


class CoordinatorBook:
    """One life of the coordinator. It begins with the time until the first generation is ordered: `start`."""

    def __init__(self, *, life: str, now: float):
        """life: a name of its own."""
        self._life = life
        self._before, self._before_number = Before(), -1
        self._closed = Ledger()
        self._since = now
        # Of the time since then that the generation's agent does not explain; and what it is from a later time on.
        self._rest: Cause = "start"
        self._later: list[tuple[float, Cause]] = []
        self._generation_id = self._continued = ""
        self._generation = Ledger()
        self._found_running = self._has_ended = False

    def ran_before(self, number: int, before: Before) -> None:
        """All of the run that was before this life, from the driver, which counts such words: the newest is true."""
        if number > self._before_number:
            self._before_number, self._before = number, before

    def ordered(self, generation_id: str, now: float) -> Cause:
        """A generation was ordered; its agent explains the time from here on. What that is until its first step."""
        begins: Cause = "load" if self._rest == "start" else "restore"
        self._closed = self.ledger(now).booked
        self._since, self._rest, self._later = now, begins, []
        self._generation_id, self._generation = generation_id, Ledger()
        self._found_running = False
        return begins

    def found_running(self, generation_id: str, now: float) -> None:
        """A generation that a coordinator before this one has ordered goes on."""
        self.ordered(generation_id, now)
        self._rest, self._found_running = "other", True

    def account(self, generation_id: str, generation: Ledger, now: float) -> None:
        """What the agent has booked of a generation so far; also once that is over."""
        if generation_id != self._generation_id:
            return
        if self._found_running:
            # The agent's word covers the time since the order, and so all of this life.
            self._closed, self._since = Ledger(), now - generation.total
            self._continued, self._found_running = generation_id, False
        # Calls may overtake each other.
        if generation.total >= self._generation.total:
            self._generation = generation
        if self._rest in ("load", "restore"):
            self._rest = "other"

    def failed(self, now: float) -> None:
        """It is known that the generation is over, and another will follow."""
        if not self._has_ended:
            self._rest, self._later = "notice", [(now, "restart")]

    def agents_lost(self) -> None:
        """The generation's agents are gone, nobody knows since when, and all that time others were waited for."""
        if not self._has_ended:
            self._rest, self._later = "wait", []

    def agents_missing(self, now: float, *, missing: bool) -> None:
        """Whether agents are waited for, of nodes that are lost or not as far as others yet; after a failure."""
        if self._later and not self._has_ended:
            self._later.append((now, "wait" if missing else "restart"))

    def ended(self) -> None:
        """The run has ended. What is left of a generation that did not fail was the upload of its last checkpoint."""
        self._has_ended = True
        if self._rest in ("load", "restore", "other"):
            self._rest = "finish"

    def ledger(self, now: float) -> LifeLedger:
        """Of the time since this coordinator began, or since the order of a generation that it found running."""
        explained = self._since + self._generation.total
        later = Ledger()
        for (began, cause), (ended, _) in pairwise([*self._later, (now, self._rest)]):
            # What the agent explains, also after the generation was over, it has measured.
            later += replace(Ledger(), **{cause: max(0.0, ended - max(began, explained))})
        generation = filled(self._generation + later, now - self._since, self._rest)
        return LifeLedger(self._life, self._closed, self._generation_id, generation, self._continued)

    def whole_run(self, now: float) -> Ledger:
        return self._before.plus(self.ledger(now))


class RunBook:
    """The whole run, as the driver that has it now keeps it."""

    def __init__(self, before: Ledger, *, now: float):
        """before: everything until this driver claimed the run, which is now."""
        self._began = now
        self._claimed = before
        self._before = Before()
        # The coordinator that lives, when it was last asked.
        self._newest = LifeLedger()
        # Seconds from the claim to the first coordinator's birth.
        self._until_first: float | None = None
        self._finishing_since: float | None = None

    def heard(self, newest: LifeLedger, *, now: float) -> None:
        """What the coordinator's book holds now."""
        if self._until_first is None:
            self._until_first = max(0.0, now - self._began - newest.booked.total)
        # Ray started it again, without memory.
        if self._newest.life not in ("", newest.life):
            before = Before(self._before.without(self._newest), self._newest)
            known = self._until_first + before.plus(newest).total
            self._before = replace(before, silent_seconds=max(0.0, now - self._began - known))
        self._newest = newest

    def finishing(self, *, now: float) -> None:
        """No generation will follow: what is left are results, and the end of all processes."""
        self._finishing_since = now

    def before_coordinator(self) -> Before:
        """For the coordinator that lives."""
        start = self._claimed + Ledger(start=self._until_first or 0.0)
        return replace(self._before, settled=start + self._before.settled)

    def ledger(self, now: float) -> Ledger:
        """Since the run was first claimed."""
        if self._until_first is None:
            return self._claimed + Ledger(start=now - self._began)
        parts = Ledger(start=self._until_first) + self._before.plus(self._newest)
        if self._finishing_since is not None:
            # Answers are heard milliseconds after they were given: what that makes too much is no cause of the run's.
            unexplained = max(0.0, now - self._began - parts.total)
            parts += Ledger(finish=min(now - self._finishing_since, unexplained))
        return self._claimed + filled(parts, now - self._began, "other")
