"""The seam between the training loop and whatever computes a step. B, T as in `data/batch.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from raynium.checkpoint.state import Chunk
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.tasks.base import Sums

# What `Engine.step` is given where it is audited: takes the checksum of a rank's own gradients.
Audit = Callable[[int], None]


class Votes(NamedTuple):
    """What any one rank may wish for and then all do, since they must stay together.

    stop: end after this step. skip_save: leave out the save that is due after this step. leave_out: do not learn from
    this step.
    """

    stop: bool = False
    skip_save: bool = False
    leave_out: bool = False


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on every rank.

    loss: the task's objective, divided by what all micro-batches of all ranks counted. grad_norm: global 2-norm of that
    quotient's gradient, before clipping. sums: what the task added up, and its counts. agreed: true where some rank
    said so. updated: False where nothing was learned: parameters, moments and the count of updates are what they were,
    bit for bit, since a number was not finite or a rank voted so. waited_seconds: this rank's own number: how long it
    was in the step's collectives, mostly waiting for others; None: nobody knows.
    """

    loss: float
    grad_norm: float
    sums: Sums
    learning_rate: float
    agreed: Votes
    updated: bool = True
    waited_seconds: float | None = None

    @property
    def tokens(self) -> int:
        """Counted labels, over all ranks."""
        return int(self.sums["tokens"])


class Engine(Protocol):
    """A model and its optimizer on all ranks. Every method but `state`, `frozen_state` and `set_updates` is collective:
    all ranks call it.

    If a rank dies, the others wait in (or fail out of) the step's collectives until the agents end the generation.
    """

    # Which slice of the samples this rank takes; ranks of a tensor group or pipeline share it.
    data_rank: int
    data_size: int

    def step(self, batch: Batch, *, step: int, votes: Votes, audit: Audit | None = None) -> StepResult:
        """One optimizer step; `step` counts from 1. B is micro_steps * micro_batch_size rows of this data rank.

        Whether it updates anything is decided on the device, from numbers that all ranks have: see `StepResult`.
        audit: before anything is updated it is given the checksum of the gradients that this rank computed, and may
        raise. For engines that are `train/audit.py`'s Auditable.
        """
        ...

    def layer_norms(self, batch: Batch, *, step: int) -> dict[str, float]:
        """The gradient's 2-norm in each layer by name, of a step's batch and the parameters of now. Learns nothing.

        For a step that ended the run: it computes the gradient once more. {}: this engine's gradients cannot be had.
        """
        ...

    def evaluate(self, batch: Batch) -> Sums:
        """The task's sums and counts, without learning. B is the same on all ranks; rows without a label fill it up."""
        ...

    def row_log_probs(self, batch: Batch) -> torch.Tensor:
        """What the model as it is gives this data rank's rows: each the sum over its labels, float32 [B], on the CPU.

        B as in `evaluate`. For `sum_over_ranks` alone: only a rank that has the logits returns more than zeros.
        """
        ...

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Of equally long float32 values on the CPU, those of each data rank once. All ranks get the same."""
        ...

    def state(self) -> list[Chunk]:
        """This rank's blocks of everything learned. They alias live memory: read or overwrite them between steps."""
        ...

    def frozen_state(self) -> list[Chunk]:
        """This rank's blocks of what does not learn, under the names of `state`: no checkpoint holds them, and whoever
        builds the engine fills them, before a step."""
        ...

    def set_updates(self, updates: int) -> None:
        """Tells the optimizer how many updates the state just loaded has seen (AdamW's bias correction): as many as
        steps, without those that were left out.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine itself opened."""
        ...


class FakeEngine:
    """An engine without a model or task, for tests of the loop: its losses are a function of all batches it has seen.

    So a resumed run shows the losses of an uninterrupted one only if it got the same state, step and samples.
    """

    def __init__(self, *, data_rank: int = 0, data_size: int = 1):
        self.data_rank = data_rank
        self.data_size = data_size
        # Kept below 2**31, so that the products below cannot overflow.
        self._mixed = torch.zeros(1, dtype=torch.int64)

    def step(self, batch: Batch, *, step: int, votes: Votes, audit: Audit | None = None) -> StepResult:
        assert audit is None, "the fake has no gradients"
        seen = int(batch.tokens_BT.sum())
        if not votes.leave_out:
            self._mixed.mul_(1_103_515_245).add_(seen + step).remainder_(2**31)
        return StepResult(
            loss=self._loss(),
            grad_norm=1.0,
            sums=self._sums(batch),
            learning_rate=1e-3,
            agreed=votes,
            updated=not votes.leave_out,
        )

    def layer_norms(self, batch: Batch, *, step: int) -> dict[str, float]:
        return {"mixed": 1.0}

    def evaluate(self, batch: Batch) -> Sums:
        return self._sums(batch)

    def row_log_probs(self, batch: Batch) -> torch.Tensor:
        counted_B = (batch.labels_BT != IGNORED_LABEL).sum(1)
        return -self._loss() * counted_B.float()

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        assert self.data_size == 1, "the fake has no other rank to ask"
        return values

    def state(self) -> list[Chunk]:
        return [Chunk("model/mixed", (1,), (0,), self._mixed, saved_here=self.data_rank == 0)]

    def frozen_state(self) -> list[Chunk]:
        return []

    def set_updates(self, updates: int) -> None:
        """Nothing to keep: the step reaches the losses through `step()`."""

    def close(self) -> None:
        """Nothing was opened."""

    def _loss(self) -> float:
        return 1.0 + self._mixed.item() / 2**31

    def _sums(self, batch: Batch) -> Sums:
        tokens = self.data_size * int((batch.labels_BT != IGNORED_LABEL).sum())
        return {"nats": self._loss() * tokens, "tokens": tokens}
