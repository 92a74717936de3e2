"""Supervised fine-tuning: of a conversation those tokens are predicted that the records say, and all count alike."""

import math
from typing import TYPE_CHECKING, Literal

from raynium.data.batch import Batch
from raynium.tasks.base import Column, Scored, Sums, loss_of

if TYPE_CHECKING:
    from torch import Tensor

    from raynium.data.evaluation import EvaluationSet

# Beyond it a perplexity says no more, and a float ends.
MOST_NATS = 700.0


class Sft:
    """Cross-entropy, the mean over all labels of a step, in nats. See `tasks/base.py`, Task."""

    columns: tuple[Column, ...] = ()
    rows_per_sample = 1
    sums: tuple[str, ...] = ("nats",)
    objective = "nats"
    divisor = "tokens"
    slopes: Literal["negative", "signed"] = "negative"

    def counts(self, batch: Batch) -> Sums:
        return {}

    def score(self, log_probs_BT: "Tensor", batch: Batch) -> Scored:
        return Scored({"nats": -log_probs_BT}, slope_BT=-log_probs_BT.new_ones(log_probs_BT.shape))

    def training(self, sums: Sums) -> dict[str, float]:
        return {}

    def evaluation(self, sums: Sums, held_out: "EvaluationSet") -> dict[str, float]:
        """eval/loss is nats per label over all held-out records, eval/perplexity its exponential."""
        loss = loss_of(self, sums)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, MOST_NATS))}
