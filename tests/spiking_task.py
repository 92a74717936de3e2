"""A task whose loss leaps in one step of the first generation, as a config names it: `spiking_task:Spiking`."""

import torch

from raynium.data.batch import Batch
from raynium.tasks.base import Scored
from raynium.tasks.pretraining import Pretraining

SPIKE_AT, MICRO_BATCHES = 60, 2


class Spiking(Pretraining):
    """Of a process that begins at step 0: one that goes on from a snapshot counts from there, and ends before.

    It evaluates after its last step only.
    """

    # Once for each micro-batch, and not beforehand too.
    slopes = "negative"

    def __init__(self) -> None:
        self._calls = 0

    def score(self, log_probs_BT: torch.Tensor, batch: Batch) -> Scored:
        scored = super().score(log_probs_BT, batch)
        self._calls += 1
        if (self._calls - 1) // MICRO_BATCHES + 1 != SPIKE_AT:
            return scored
        return Scored({name: 100 * term for name, term in scored.terms.items()}, 100 * scored.slope_BT)
