"""When failures are too many, and how long is waited after one. Pure: only failures since the last progress count."""

import re
import signal

from raynium.config.fault import FaultSection
from raynium.errors import StoreError
from raynium.run.protocol import RankExit

# After the second failure in a row without a new step between, and twice as long after each further one.
PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# Signals that a program gets for what it does itself, and would get again.
OWN_SIGNALS = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}


class Patience:
    """Of one coordinator's life. A run of months may lose any number of nodes, as long as it gets on in between."""

    def __init__(self, fault: FaultSection):
        self._fault = fault
        self._restarts = 0
        self._nodes = 0
        # The newest step that no restart has to take again.
        self._kept_step = -1
        # Of the failures that came at no newer step than the one before: how many, and the newest step of all.
        self._in_place = 0
        self._newest_step = -1
        # Of the last failure that may come again as it was.
        self._last: tuple[int, str] | None = None

    def keeps(self, step: int) -> None:
        """A restart need not take this step again: a checkpoint of it is committed, or ranks go on from a snapshot."""
        if step > self._kept_step:
            self._kept_step = step
            self._restarts = self._nodes = 0

    def restart(self, *, step: int) -> str | None:
        """A generation failed on nodes that live, when `step` was its last. Why that was one too many; None: go on."""
        self._restarts += 1
        self._in_place = self._in_place + 1 if step <= self._newest_step else 0
        self._newest_step = max(step, self._newest_step)
        return _too_many(self._restarts, "failure", "max_restarts", self._fault.max_restarts_without_progress)

    def repeats(self, exit: RankExit, *, step: int) -> str | None:
        """Why another try is no use, since this failure has come before, at the same step; None: it has not.

        What kills ranks from outside, a peer, a store or a device may be better the next time: those are counted only.
        """
        key = (step, re.sub(r"\d+", "0", exit.cause or "")) if comes_by_itself(exit) else None
        before, self._last = self._last, key
        if key is None or key != before:
            return None
        return (
            f"That is the same failure as before, at the same place (after step {step}): another try would end there "
            "too. Correct the cause, and start the run again to go on from its newest checkpoint"
        )

    def pause_seconds(self) -> float:
        """How long the next generation waits: not at all while the run gets on."""
        return min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** min(self._in_place - 1, 30)) if self._in_place else 0.0

    def node_failure(self) -> str | None:
        """A node or its agent was lost, whether or not ranks ran. As `restart`."""
        self._nodes += 1
        limit = self._fault.max_node_failures_without_progress
        return _too_many(self._nodes, "loss of a node agent", "max_node_failures", limit)


def comes_by_itself(exit: RankExit) -> bool:
    """Whether the rank's own program ended it, which has nothing new to compute in another try."""
    if exit.fault is not None:
        return exit.fault.guilty == "job"
    if exit.error is not None:
        # torch's errors of process groups begin with Dist.
        return exit.error != StoreError.__name__ and not exit.error.startswith("Dist")
    return -exit.exit_code in OWN_SIGNALS


def _too_many(count: int, what: str, field: str, limit: int) -> str | None:
    if count <= limit:
        return None
    return (
        f"That is {what} number {count} without progress (fault.{field}_without_progress={limit}): no newer checkpoint "
        "was committed between them, and no newer snapshot gone on from. Start the run again to go on from its newest "
        "checkpoint, and give a higher limit if such failures are to be lived with"
    )
