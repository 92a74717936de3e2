"""What a node's ranks say, and where it belongs: metrics to the tracker, the ledger and lines to the coordinator."""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict

from raynium.config.schema import Config
from raynium.errors import TrackingError
from raynium.node.recovery_clock import RecoveryClock
from raynium.run.positions import RankPosition
from raynium.run.protocol import (
    Coordinator,
    Evaluates,
    News,
    Order,
    Progressed,
    RanksSeen,
    RankTimes,
    Said,
    StepLeftOut,
    TimesSeen,
)
from raynium.tracking.ledger import GenerationBook, Ledger
from raynium.tracking.tracker import Tracker
from raynium.train.link import Artifact, BadStep, Compiled, Evaluating, Phase, RankMessage, Stepped, StepTimes

logger = logging.getLogger(__name__)

# On the user's terminal, of one node: a run that compiles at every step would fill it.
COMPILES_TOLD = 20
# The driver's display and MLflow are not fed faster than this.
REPORT_SECONDS = 0.5
LEDGER_SECONDS = 10.0
# Nor is an artifact of the ranks' step times.
TIMES_SECONDS = 10.0
# Where the ranks are is told so often, and where fault.hang_seconds is short, so often within it.
POSITIONS_SECONDS = 5.0
POSITIONS_IN_A_LIMIT = 20


class Reports:
    """Of one node, over the life of its agent. Only one that has rank 0 has a tracker."""

    def __init__(
        self,
        config: Config,
        coordinator: Coordinator,
        *,
        peak_flops_per_rank: Callable[[], float | None],
        halted: Callable[[int], bool],
        device_seconds: float = 0.0,
    ):
        """peak_flops_per_rank: of the config's dtype. halted: whether a rank's process is stopped by a signal.

        device_seconds: as in RanksSeen.
        """
        limit = config.fault.hang_seconds
        # How often `tell_positions` tells something.
        self.positions_seconds = min(POSITIONS_SECONDS, (limit or math.inf) / POSITIONS_IN_A_LIMIT)
        self._device_seconds = device_seconds
        self._total_steps = config.train.num_steps
        self._coordinator = coordinator
        self._tracker: Tracker | None = None
        self._peak_flops_per_rank = peak_flops_per_rank
        self._halted = halted
        self.recovery = RecoveryClock()
        self._order: Order | None = None
        self._book = GenerationBook(trained_step=0, now=0.0)
        # As the coordinator knows, unless it was started again.
        self._trained_step = 0
        self._positions: dict[int, RankPosition] = {}
        # Rank → how long it has said nothing, as far as this process looked: it may have been stopped with them.
        self._still: dict[int, float] = {}
        # The same since a signal stopped it, of those that are stopped.
        self._halted_for: dict[int, float] = {}
        self._looked = 0.0
        # Since when all ranks of this node have a step behind them.
        self._stepping_since = math.inf
        self._times: dict[int, RankTimes] = {}
        self._last_times = -math.inf
        self._compiles_told: set[tuple[int, int, str]] = set()
        # A steady clock may begin at 0 when the machine starts.
        self._last_report = self._last_ledger = -math.inf
        # Of all nodes and of the run, until a step takes them along.
        self._device_metrics: dict[str, float] = {}
        self._goodput_metrics: dict[str, float] = {}

    def begin_generation(self, order: Order, ranks: range, tracker: Tracker | None) -> None:
        now = time.monotonic()
        self._tracker = tracker if 0 in ranks else None
        self._order = order
        trained_step = max(self._trained_step, order.ledger.step)
        self._book = GenerationBook(trained_step=trained_step, now=now, begins=order.begins)
        self._positions = {rank: RankPosition(order.resume_step or 0, "start") for rank in ranks}
        self._still, self._halted_for = dict.fromkeys(ranks, 0.0), {}
        self._looked = now
        self._stepping_since = math.inf
        self._times = {}
        # Its first step ends what the one before it cost, and is told at once.
        self._last_report = -math.inf

    def take(self, rank: int, message: RankMessage) -> None:
        """A message of one of this node's ranks; images are somebody else's."""
        self._still[rank] = 0.0
        match message:
            case Stepped(step, metrics):
                self._positions[rank] = RankPosition(step + 1, "fetch")
                self._book.step(step, metrics, time.monotonic())
                self._step(step, metrics)
                if (recovered := self.recovery.stepped(time.monotonic())) is not None:
                    self._coordinator.tell(Said(recovered))
            case Phase(name, step):
                self._positions[rank] = RankPosition(step, name)
                if rank == 0:
                    self.recovery.begins(name, time.monotonic())
            case BadStep(step, why):
                logger.warning("step %d: %s", step, why)
                self._coordinator.tell(StepLeftOut(step, why))
            case Artifact(path, text):
                self.keep_artifacts({path: text})
            case Evaluating(done, total):
                if rank == 0:
                    self._coordinator.tell(Evaluates(done, total))
            case StepTimes():
                self._times[rank] = RankTimes(**asdict(message))
                self._tell_times(message.step)
            case Compiled():
                self._compiled(rank, message)
            case _:
                pass
        assert self._order is not None
        first = (self._order.resume_step or 0) + 1
        if self._stepping_since == math.inf and all(each.step > first for each in self._positions.values()):
            self._stepping_since = time.monotonic()

    def stepping_seconds(self) -> float:
        """How long all ranks of this node have had a step of this generation behind them; negative before."""
        return time.monotonic() - self._stepping_since

    def _tell_times(self, step: int) -> None:
        """Once all ranks of this node have told of the steps up to this one."""
        assert self._order is not None
        if self._times.keys() == self._positions.keys() and all(each.step == step for each in self._times.values()):
            seen = TimesSeen(self._order.generation, min(self._times) // self._order.world.ranks_per_node, self._times)
            self._times = {}
            answer = self._coordinator.tell(seen)
            if self._tracker is not None:
                answer.add_done_callback(self._keep_times)

    def _keep_times(self, answer: "Future[News]") -> None:
        self.keep_news(answer)
        if answer.cancelled() or answer.exception() is not None:
            return
        artifacts, now = answer.result().artifacts, time.monotonic()
        if artifacts and now - self._last_times >= TIMES_SECONDS:
            self._last_times = now
            self.keep_artifacts(artifacts)

    def tell_positions(self) -> None:
        """Tells the coordinator, now and then, where the ranks are and how long they have been still."""
        now = time.monotonic()
        if now - self._looked < self.positions_seconds or self._order is None:
            return
        # Of a pause in which this process did not run either, which shows as one long look, no more counts than of two.
        seconds, self._looked = min(now - self._looked, 2 * self.positions_seconds), now
        self._still = {rank: still + seconds for rank, still in self._still.items()}
        # Seen for the first time it was stopped at some moment since the last look.
        self._halted_for = {
            rank: min(self._halted_for.get(rank, 0.0) + seconds, self._still[rank])
            for rank in self._positions
            if self._halted(rank)
        }
        positions = {
            rank: RankPosition(
                each.step, each.phase, rank in self._halted_for, self._halted_for.get(rank, self._still[rank])
            )
            for rank, each in self._positions.items()
        }
        self._coordinator.tell(RanksSeen(self._order.generation, positions, self._device_seconds))

    def keep_artifacts(self, artifacts: Mapping[str, str]) -> None:
        """Path → text, into MLflow. What does not fit on a full disk is said in the log."""
        for path, text in artifacts.items():
            try:
                assert self._tracker is not None, "they come to node 0"
                self._tracker.artifact(path, text)
            except TrackingError as error:
                logger.warning("%s does not reach MLflow: %s", path, error)

    def newest_step(self) -> int:
        """That any of this node's ranks has done, or goes on from."""
        return max(each.done for each in self._positions.values())

    def end_generation(self) -> Ledger | None:
        """All is read that the ranks left. What rank 0's agent has booked of the generation."""
        if self._tracker is None:
            return None
        ledger = self._book.ledger()
        self._trained_step = ledger.step
        return ledger

    def keep_news(self, answer: "Future[News]") -> None:
        """Of an event's answer; without a coordinator there are none."""
        if answer.cancelled() or answer.exception() is not None:
            return
        news, now = answer.result(), time.monotonic()
        self._device_metrics |= news.metrics
        if now - self._last_ledger >= LEDGER_SECONDS:
            self._last_ledger = now
            self._goodput_metrics = news.ledger.metrics()

    def _step(self, step: int, metrics: dict[str, float]) -> None:
        assert self._order is not None and self._tracker is not None, "only rank 0 tells its steps"
        if "checkpoint/skipped_saves" in metrics:
            why = "earlier ones are still being uploaded (checkpoint.if_busy=skip), or shared memory is short"
            # The first since the start stands for all of them.
            what = "checkpoint" if metrics["checkpoint/skipped_saves"] == 1 else None
            self._coordinator.tell(Said(f"step {step}: no checkpoint, because {why}", what))
        metrics = metrics | {"run/generation": float(self._order.generation)}
        metrics |= self._take_device_metrics(self._order, metrics.get("throughput/mfu_with_attention"))
        self._show(step, metrics)
        # MLflow keeps one value of each step, the first: the last step's goodput is the one with the run's end.
        if step < self._total_steps:
            metrics |= self._goodput_metrics
            self._goodput_metrics = {}
        self._tracker.append(metrics, step=step, unix_ms=int(time.time() * 1000))

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """Feeds the driver's display: every evaluation, the last step, and else not more often than it can show."""
        now = time.monotonic()
        evaluated = any(name.startswith("eval/") for name in metrics)
        if evaluated or step == self._total_steps or now - self._last_report >= REPORT_SECONDS:
            self._last_report = now
            assert self._order is not None
            answer = self._coordinator.tell(Progressed(self._order.generation_id, step, metrics, self._book.ledger()))
            answer.add_done_callback(self.keep_news)

    def _take_device_metrics(self, order: Order, mfu: float | None) -> dict[str, float]:
        """Those that no step has reported yet. mfu: of this step, with attention; None: not known."""
        taken, self._device_metrics = self._device_metrics, {}
        counted = taken.get("device/flops_per_second")
        if mfu and counted is not None:
            peak_flops = self._peak_flops_per_rank()
            assert peak_flops is not None, "the rank that reports an MFU had one"
            taken["device/flops_to_estimate_ratio"] = counted / (mfu * peak_flops * order.world.size)
        return taken

    def _compiled(self, rank: int, message: Compiled) -> None:
        """What should not have been compiled is told to the user, once for all ranks of this node."""
        assert self._order is not None
        if rank == 0:
            self._book.compiled(message.seconds)
        if rank == min(self._positions):
            text = "step %d, rank %d: %d graph(s) compiled in %.1f s"
            logger.info(text, message.step, rank, message.graphs, message.seconds)
        for surprise in message.surprises:
            said = f"step {message.step}, rank {rank}: {surprise}"
            logger.warning(said)
            # Ranks differ in the seconds only.
            told = self._order.generation, message.step, re.sub(r"\([\d.]+ s\)", "", surprise)
            if told not in self._compiles_told and len(self._compiles_told) < COMPILES_TOLD:
                self._compiles_told.add(told)
                more = " (more are in the log only)" if len(self._compiles_told) == COMPILES_TOLD else ""
                self._coordinator.tell(Said(said + more))
