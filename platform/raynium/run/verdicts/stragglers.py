"""Which rank the others wait for, step after step. Pure, without a clock.

A step takes all ranks equally long, since each collective waits for the last. What tells them apart is what a rank
needs itself: the step without the time that it was in collectives. Ranks tell of the same steps, so they are compared
round by round; one that is slow in several rounds in a row is named.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from raynium.run.protocol import RankTimes

# More than the middle one of the ranks needs, as a share of the step: so much shorter would steps be without it.
SHARE_OF_STEP = 0.2
ROUNDS_IN_A_ROW = 3
ARTIFACT = "step_times.json"


@dataclass(frozen=True)
class Straggler:
    """own_seconds and usual_seconds: of a step, this rank's and the median of all."""

    rank: int
    own_seconds: float
    usual_seconds: float
    step_seconds: float

    def __str__(self) -> str:
        share = (self.own_seconds - self.usual_seconds) / self.step_seconds
        return (
            f"it needs {1000 * self.own_seconds:.1f} ms of a step of {1000 * self.step_seconds:.1f} ms and the middle "
            f"rank {1000 * self.usual_seconds:.1f} ms, so that the others wait for it {share:.0%} of the time"
        )


class Stragglers:
    """Of one generation. metrics and artifacts: of the newest round."""

    def __init__(self, *, world_size: int, ranks_per_node: int):
        self.metrics: dict[str, float] = {}
        self.artifacts: dict[str, str] = {}
        self._world_size, self._ranks_per_node = world_size, ranks_per_node
        self._times: dict[int, RankTimes] = {}
        # Rounds in a row, up to now, in which a rank was slow.
        self._slow: dict[int, int] = {}

    def seen(self, times: Mapping[int, RankTimes]) -> list[Straggler]:
        """The times of one node's ranks. Those that have just been slow for long enough, once they are."""
        self._times |= times
        step = max(each.step for each in self._times.values())
        if len(self._times) < self._world_size or any(each.step < step for each in self._times.values()):
            return []
        medians = sorted(each.median_seconds for each in self._times.values())
        usual = medians[(len(medians) - 1) // 2]
        self.metrics = {
            "time/slowest_rank_seconds": medians[-1],
            "time/median_rank_seconds": usual,
            "time/rank_spread_seconds": medians[-1] - medians[0],
        }
        ranks = {
            rank: {"node": rank // self._ranks_per_node} | asdict(each) for rank, each in sorted(self._times.items())
        }
        self.artifacts = {ARTIFACT: json.dumps({"step": step, "ranks": ranks}, indent=1)}
        found = {
            rank: Straggler(rank, each.median_seconds, usual, each.step_seconds)
            for rank, each in sorted(self._times.items())
            if each.median_seconds - usual > SHARE_OF_STEP * each.step_seconds
        }
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in found}
        return [each for rank, each in found.items() if self._slow[rank] == ROUNDS_IN_A_ROW]
