"""The output head, in pieces of rows: the logits of a large vocabulary are never whole in memory.

The model calls it in place of its head, and what comes back is one number, whose backward gives what was found on the
way forward: the gradients of the hidden states and of the head's weight. Where a task knows its slopes beforehand
("fixed"), each piece's logits are made once. Where they depend on the log-probabilities of whole rows, they are made
twice, unless one piece holds them all. Tokens whose label does not count have no logits, where shapes may change.

Shapes: C tokens whose labels count (of B * T), c those of a piece, D hidden_size, V the vocabulary's part on this rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.log_probs import LabelLogProbs, label_log_probs, turn_into_gradient
from raynium.models.pieces import tokens_of_a_piece
from raynium.tasks.base import Scored, Task

# Columns of a piece that are widened at once, where a product of bfloat16 cannot be added to float32.
COLUMNS_AT_ONCE = 8192

# What `Decoder.forward` calls: its head, and what would go into it.
Finish = Callable[[nn.Linear, Tensor], Any]


class PiecewiseHead:
    """A task's sums and gradients from hidden states. Collective where there is a vocabulary group."""

    def __init__(self, task: Task, *, vocabulary_group: dist.ProcessGroup | None, sum_dtype: torch.dtype):
        """vocabulary_group: see `label_log_probs`. sum_dtype: of the task's sums."""
        self._task = task
        self._vocabulary_group = vocabulary_group
        self._sum_dtype = sum_dtype

    def learning(self, batch: Batch, places_C: Tensor | None) -> Finish:
        """Gives the objective's sum, a scalar to call `backward` on as it is, and the task's sums [S].

        places_C: of `counted_places`, on the device; None if all tokens of the batch are to have logits.
        """

        def finish(head: nn.Linear, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
            inputs = _on_this_rank(head, hidden_BTD, places_C)
            return _Objective.apply(*inputs, partial(self._gradients, batch, places_C))

        return finish

    def evaluating(self, batch: Batch, places_C: Tensor | None) -> Finish:
        """Gives the task's sums [S]; under `torch.no_grad`."""

        def finish(head: nn.Linear, hidden_BTD: Tensor) -> Tensor:
            return self._sums(self._task.score(self._log_probs(head, hidden_BTD, batch, places_C), batch))

        return finish

    def row_log_probs(self, batch: Batch, places_C: Tensor | None) -> Finish:
        """Gives the sum over the labels of each row [B], float32 or wider; under `torch.no_grad`."""
        return lambda head, hidden_BTD: self._log_probs(head, hidden_BTD, batch, places_C).sum(1)

    def _log_probs(self, head: nn.Linear, hidden_BTD: Tensor, batch: Batch, places_C: Tensor | None) -> Tensor:
        pass_ = _Pass(*_on_this_rank(head, hidden_BTD, places_C), weight_learns=False)
        labels_C = _taken(batch.labels_BT, places_C)
        found = [self._find(pass_.logits(piece), labels_C[piece]).log_probs_N for piece in pass_.pieces]
        return _put_back(torch.cat(found), places_C, batch.labels_BT)

    def _gradients(
        self, batch: Batch, places_C: Tensor | None, hidden_CD: Tensor, weight_VD: Tensor, *, weight_learns: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The task's sums, and the objective's gradients of hidden states and weight, in their dtypes."""
        pass_ = _Pass(hidden_CD, weight_VD, weight_learns=weight_learns)
        labels_C = _taken(batch.labels_BT, places_C)
        slope_C = None
        if self._task.slopes == "fixed":
            unknown_BT = torch.zeros(batch.labels_BT.shape, device=hidden_CD.device)
            slope_C = _taken(self._task.score(unknown_BT, batch).slope_BT, places_C)

        found: list[LabelLogProbs] = []
        for piece in pass_.pieces:
            logits_cV = pass_.logits(piece)
            found.append(self._find(logits_cV, labels_C[piece]))
            if slope_C is not None:
                pass_.add(piece, self._turned(logits_cV, found[-1], slope_C[piece]))
        log_probs_C = torch.cat([each.log_probs_N for each in found])
        scored = self._task.score(_put_back(log_probs_C, places_C, batch.labels_BT), batch)
        assert scored.slope_BT.shape == batch.labels_BT.shape
        if slope_C is None:
            slope_C = _taken(scored.slope_BT, places_C)
            # Backwards, since the last one's logits are still there.
            for piece, of_piece in zip(reversed(pass_.pieces), reversed(found), strict=True):
                logits_cV = pass_.logits(piece)
                pass_.add(piece, self._turned(logits_cV, of_piece, slope_C[piece]))
        return self._sums(scored), *pass_.gradients()

    def _find(self, logits_cV: Tensor, labels_c: Tensor) -> LabelLogProbs:
        return label_log_probs(logits_cV, labels_c, vocabulary_group=self._vocabulary_group)

    def _turned(self, logits_cV: Tensor, found: LabelLogProbs, slope_c: Tensor) -> Tensor:
        turn_into_gradient(logits_cV, found, slope_c, signed=self._task.slopes == "signed")
        return logits_cV

    def _sums(self, scored: Scored) -> Tensor:
        return torch.stack([scored.terms[name].sum(dtype=self._sum_dtype) for name in self._task.sums])


class _Objective(torch.autograd.Function):
    """Of hidden states and weight: a stand-in for the objective, whose gradients are found in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, gradients: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor]:
        sums, *ctx.found = gradients(hidden_CD, weight_VD, weight_learns=ctx.needs_input_grad[1])
        ctx.mark_non_differentiable(sums)
        return hidden_CD.new_zeros(()), sums

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # Not kept here, so that whoever gets them need not copy them.
        (of_hidden, of_weight), ctx.found = ctx.found, None
        return of_hidden, of_weight, None


class _Pass:
    """Through the head with one micro-batch: a piece's logits after the other's, in the same memory.

    The gradient of the weight is summed in float32 or wider, and rounded once: sums of rounded products bias training.
    """

    def __init__(self, hidden_CD: Tensor, weight_VD: Tensor, *, weight_learns: bool):
        self._hidden_CD, self._weight_VD, self._weight_learns = hidden_CD, weight_VD, weight_learns
        tokens, size_V, item = len(hidden_CD), len(weight_VD), weight_VD.element_size()
        self._sum_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        widens = weight_learns and self._sum_dtype != weight_VD.dtype
        sum_bytes = weight_VD.numel() * self._sum_dtype.itemsize if widens else 0
        size = tokens_of_a_piece(tokens, token_bytes=size_V * item, sum_bytes=sum_bytes)
        self.pieces = [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]
        self._logits_cV = hidden_CD.new_empty(size, size_V)
        self._made: slice | None = None
        self._of_hidden_CD: Tensor | None = None
        self._of_weight_VD: Tensor | None = None

    def logits(self, piece: slice) -> Tensor:
        """Until those of another piece are asked for, the same are not made again."""
        logits_cV = self._logits_cV[: piece.stop - piece.start]
        if piece != self._made:
            torch.mm(self._hidden_CD[piece], self._weight_VD.t(), out=logits_cV)
            self._made = piece
        return logits_cV

    def add(self, piece: slice, gradient_cV: Tensor) -> None:
        """What the gradient of a piece's logits is to hidden states and weight. It stands where they stood."""
        self._made = None
        if self._of_hidden_CD is None:
            self._of_hidden_CD = torch.empty_like(self._hidden_CD)
        torch.mm(gradient_cV, self._weight_VD, out=self._of_hidden_CD[piece])
        if not self._weight_learns:
            return
        hidden_cD = self._hidden_CD[piece]
        if len(self.pieces) == 1:
            self._of_weight_VD = gradient_cV.t() @ hidden_cD
            return
        if self._of_weight_VD is None:
            self._of_weight_VD = torch.zeros_like(self._weight_VD, dtype=self._sum_dtype)
        _add_product(self._of_weight_VD, gradient_cV, hidden_cD)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Of hidden states and weight, in their dtypes, once every piece is added."""
        assert self._of_hidden_CD is not None
        return self._of_hidden_CD, None if self._of_weight_VD is None else self._of_weight_VD.to(self._weight_VD.dtype)


def _add_product(sum_VD: Tensor, gradient_cV: Tensor, hidden_cD: Tensor) -> None:
    """sum += gradient.T @ hidden, no product rounded to the inputs' dtype."""
    if hidden_cD.dtype == sum_VD.dtype:
        sum_VD.addmm_(gradient_cV.t(), hidden_cD)
    elif hidden_cD.is_cuda:
        torch.addmm(sum_VD, gradient_cV.t(), hidden_cD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        wide_cD = hidden_cD.to(sum_VD.dtype)
        columns = zip(sum_VD.split(COLUMNS_AT_ONCE), gradient_cV.split(COLUMNS_AT_ONCE, dim=1), strict=True)
        for sum_vD, gradient_cv in columns:
            sum_vD.addmm_(gradient_cv.t().to(sum_VD.dtype), wide_cD)


def _on_this_rank(head: nn.Linear, hidden_BTD: Tensor, places_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden_CD, and this rank's rows of the weight. Their gradients go back as those of a share."""
    # Read once: under SimpleFSDP that gathers it.
    weight_VD = head.weight
    if isinstance(hidden_BTD, DTensor):
        hidden_BTD = hidden_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if isinstance(weight_VD, DTensor):
        weight_VD = weight_VD.to_local()
    hidden_CD = hidden_BTD.flatten(0, 1)
    return hidden_CD if places_C is None else hidden_CD.index_select(0, places_C), weight_VD


def counted_places(labels_BT: Tensor) -> Tensor | None:
    """int64 [C], on the CPU as the labels are: the tokens of a flat micro-batch whose labels count; None if all do.

    At least one, since an operation on nothing is none on some devices: its label then adds nothing.
    """
    counted_N = (labels_BT != IGNORED_LABEL).flatten()
    if counted_N.all():
        return None
    places_C = counted_N.nonzero()[:, 0]
    return places_C if len(places_C) else places_C.new_zeros(1)


def _taken(values_BT: Tensor, places_C: Tensor | None) -> Tensor:
    return values_BT.flatten() if places_C is None else values_BT.flatten().index_select(0, places_C)


def _put_back(log_probs_C: Tensor, places_C: Tensor | None, labels_BT: Tensor) -> Tensor:
    """[B, T], 0 where no label counts."""
    if places_C is None:
        return log_probs_C.view_as(labels_BT)
    return log_probs_C.new_zeros(labels_BT.numel()).index_copy(0, places_C, log_probs_C).view_as(labels_BT)
