"""The end of a run whose evaluations have stopped to get better (evaluate.patience). The same on every rank."""

import math
from collections.abc import Mapping
from typing import Self

import torch

from raynium.checkpoint.state import PATIENCE_NAME, Chunk
from raynium.config.judged import Best, best_value_of
from raynium.config.schema import Config


class Patience:
    """Counts evaluations in a row that did not better checkpoint.best_metric.

    What it has seen is part of the training state: saved and restored with the weights, it is that of the step which a
    generation goes on from, and evaluations that are made again count once.
    """

    def __init__(self, metric: str = "eval/loss", *, best_is: Best = "lowest", most: int | None = None):
        """most: so many end the run. None: it has no patience to lose."""
        self._metric = metric
        self._sign = -1.0 if best_is == "highest" else 1.0
        self._most = most
        # The best value, the step it was of, the last evaluation's step, and how many came since the best. float64.
        self._seen = torch.tensor([math.nan, -1.0, -1.0, 0.0], dtype=torch.float64)

    @classmethod
    def of(cls, config: Config) -> Self:
        """What the run's config says."""
        best_is = best_value_of(config.checkpoint) or "lowest"
        return cls(config.checkpoint.best_metric, best_is=best_is, most=config.evaluate.patience)

    def judge(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Why the run ends after this evaluation; None: it goes on. All ranks are given the same numbers."""
        best, best_step, last, since = self._seen.tolist()
        if self._most is None or step <= last:
            return None
        value = metrics[self._metric]
        if not math.isnan(value) and (math.isnan(best) or self._sign * value < self._sign * best):
            seen = [value, step, step, 0.0]
        else:
            seen = [best, best_step, step, since + 1]
        self._seen.copy_(torch.tensor(seen, dtype=torch.float64))
        return self.is_over()

    def is_over(self) -> str | None:
        """Why the run need not go on; None: it has to."""
        best, best_step, last, since = self._seen.tolist()
        if self._most is None or since < self._most:
            return None
        return (
            f"ended early at step {last:,.0f}: {self._metric} has not improved in {since:.0f} evaluations; its best "
            f"was {best:.6g} at step {best_step:,.0f} (evaluate.patience)"
        )

    def chunks(self, *, saved_here: bool) -> list[Chunk]:
        """What checkpoints hold of it; nothing of a run that has no patience."""
        if self._most is None:
            return []
        return [Chunk.whole(f"{PATIENCE_NAME}{self._metric}", self._seen, saved_here=saved_here)]
