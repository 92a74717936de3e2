"""Supervised fine-tuning: of a conversation those tokens are predicted that the records say, and all count alike."""

import math
from typing import TYPE_CHECKING

from raynium.tasks.base import Sums, loss_of
from raynium.tasks.pretraining import Pretraining

if TYPE_CHECKING:
    from raynium.data.evaluation import EvaluationSet

# Beyond it a perplexity says no more, and a float ends.
MOST_NATS = 700.0


class Sft(Pretraining):
    """The same cross-entropy over fewer labels; what is held out are records, whose bytes say nothing."""

    def evaluation(self, sums: Sums, held_out: "EvaluationSet") -> dict[str, float]:
        """eval/loss is nats per label over all held-out records, eval/perplexity its exponential."""
        loss = loss_of(self, sums)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, MOST_NATS))}
