"""Pretraining: every token of a text is predicted from those before it, and all count alike."""

from typing import TYPE_CHECKING, Literal

from raynium.data.batch import Batch
from raynium.data.evaluation import bits_per_byte
from raynium.tasks.base import Column, Scored, Sums, loss_of

if TYPE_CHECKING:
    from torch import Tensor

    from raynium.data.evaluation import EvaluationSet


class Pretraining:
    """Cross-entropy, the mean over all tokens of a step, in nats. See `tasks/base.py`, Task."""

    columns: tuple[Column, ...] = ()
    rows_per_sample = 1
    sums: tuple[str, ...] = ("nats",)
    objective = "nats"
    divisor = "tokens"
    slopes: Literal["fixed", "negative", "signed"] = "fixed"

    def counts(self, batch: Batch) -> Sums:
        return {}

    def score(self, log_probs_BT: "Tensor", batch: Batch) -> Scored:
        return Scored({"nats": -log_probs_BT}, slope_BT=-log_probs_BT.new_ones(log_probs_BT.shape))

    def training(self, sums: Sums) -> dict[str, float]:
        return {}

    def evaluation(self, sums: Sums, held_out: "EvaluationSet") -> dict[str, float]:
        """eval/loss is nats per token over all held-out tokens, eval/bits_per_byte over their UTF-8 bytes."""
        return {
            "eval/loss": loss_of(self, sums),
            "eval/bits_per_byte": bits_per_byte(sums["nats"], held_out.num_bytes),
        }
