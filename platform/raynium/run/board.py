"""What the coordinator shows: lines for the terminal, the newest numbers, and where each rank is."""

import secrets
import time
from collections import deque
from collections.abc import Mapping

from raynium.health.neuron_monitor import DeviceSample
from raynium.health.neuron_monitor import metrics as device_metrics
from raynium.run.positions import RankPosition
from raynium.run.protocol import Event

EVENTS_KEPT = 1000
# An older one is of a node whose monitor ended.
DEVICE_SAMPLE_SECONDS = 60.0
# The first line that says that no step came; each further one after twice as long.
SILENCE_SECONDS = 120.0


class Board:
    """One per life of the coordinator. `now` is in seconds of its steady clock."""

    def __init__(self, *, now: float):
        self.life = secrets.token_hex(4)
        self.step = 0
        self.metrics: dict[str, float] = {}
        # Batches done and in all, while the ranks evaluate.
        self.evaluation: tuple[int, int] | None = None
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._event_count = 0
        # Node rank → when it came, and the newest.
        self._devices: dict[int, tuple[float, DeviceSample]] = {}
        self._positions: dict[int, RankPosition] = {}
        self._moved = now
        self._next_line_after = SILENCE_SECONDS

    def tell(self, text: str) -> None:
        """A line for the user's terminal."""
        self._event_count += 1
        self._events.append(Event(self._event_count, time.time(), text))

    def events(self, *, after: int) -> tuple[Event, ...]:
        return tuple(event for event in self._events if event.number > after)

    def generation_begins(self, step: int, *, now: float) -> None:
        self.step, self.evaluation = step, None
        self._positions.clear()
        self._moves(now)

    def report(self, step: int, metrics: Mapping[str, float], *, now: float) -> None:
        """Rank 0's numbers."""
        self.evaluation = None
        self.reaches(step)
        self.metrics.update(metrics)
        self._moves(now)

    def reaches(self, step: int) -> None:
        """Some rank has done it; rank 0's numbers are told twice a second, and what comes after them not at all."""
        self.step = max(self.step, step)

    def evaluates(self, done: int, total: int, *, now: float) -> None:
        """Rank 0's evaluation gets on."""
        self.evaluation = done, total
        self._moves(now)

    def positions(self, found: Mapping[int, RankPosition]) -> None:
        """Where ranks of a node are, told while no step comes."""
        self._positions.update(found)
        self.reaches(max((each.done for each in found.values()), default=0))

    def check_silence(self, *, now: float) -> None:
        """Ranks run. Tells, now and then, that no step came for a while and which rank is behind."""
        silent = now - self._moved
        if silent < self._next_line_after:
            return
        self._next_line_after *= 2
        minutes, seconds = divmod(round(silent), 60)
        self.tell(f"no step for {minutes}:{seconds:02d}: {_who_is_behind(self._positions)}")

    def sample(self, node_rank: int, sample: DeviceSample, *, now: float) -> dict[str, float]:
        """One node's devices; returns the metrics of all nodes' newest samples."""
        self._devices[node_rank] = now, sample
        return device_metrics(one for came, one in self._devices.values() if now - came <= DEVICE_SAMPLE_SECONDS)

    def forget_devices(self) -> None:
        """The nodes are others now."""
        self._devices.clear()

    def _moves(self, now: float) -> None:
        self._moved, self._next_line_after = now, SILENCE_SECONDS


def _who_is_behind(positions: Mapping[int, RankPosition]) -> str:
    if not positions:
        return "no rank has said where it is"
    last = min(positions.values(), key=lambda each: (*each.progress, not each.halted))
    place = (*last.progress, last.halted)
    behind = [rank for rank, each in sorted(positions.items()) if (*each.progress, each.halted) == place]
    if len(behind) == len(positions) > 1:
        return f"all {len(behind)} ranks are {last}"
    names = ", ".join(map(str, behind[:4])) + (f" and {len(behind) - 4} more" if len(behind) > 4 else "")
    return f"rank{'s' if len(behind) > 1 else ''} {names} {'are' if len(behind) > 1 else 'is'} {last}"
