"""NxD's optimizer around torch's AdamW, what it trains, and steps of it that are taken back on the device."""

# The library is not on the public package index: no type checker finds it.
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raynium.config.schema import Config
from raynium.engines.optim import decays
from raynium.models.nxd_layout import Piece


class Stored(NamedTuple):
    """One parameter of the NxD model, and the tensor that the optimizer updates for it.

    parameter: of compute dtype. master: float32; under ZeRO-1 this data rank's rows, padded at their end; else the
    parameter itself. first_row: of the parameter, that master begins with. pieces: our parameters in master; their
    `row` counts in the parameter.
    """

    parameter: Tensor
    master: Tensor
    first_row: int
    pieces: tuple[Piece, ...]

    def view(self, tensor: Tensor, piece: Piece) -> Tensor:
        """The piece in a tensor of master's shape."""
        # torch-xla would compile a graph to copy even a slice of everything.
        if len(tensor) == piece.shape[0]:
            return tensor
        begin = piece.row - self.first_row
        return tensor[begin : begin + piece.shape[0]]


class UndoableOptimizer:
    """Takes the optimizer's steps, and where one must not change anything, takes it back in the same graph.

    NxD's optimizer knows no such step: it finds the gradient's norm and updates in one call. So all that a step may
    change is selected afterwards, from before or after; under torch-xla no copy is made for that, since both are
    expressions of one graph. On a CPU, which NxD is for tests on, the copies are real.
    """

    def __init__(self, optimizer: Any, stored: Sequence[Stored], moments: Sequence[dict[str, Tensor]], *, zero1: bool):
        self._optimizer, self._moments = optimizer, moments
        self._changing = [each.master for each in stored]
        self._changing += [state[name] for state in moments for name in ("exp_avg", "exp_avg_sq")]
        if zero1:
            # The step gathers them from the masters.
            self._changing += [each.parameter for each in stored]

    @torch.no_grad()
    def step(self, unwanted: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient's norm, and whether the step was left out, 1 or 0: both [1], on the device, of all ranks.

        unwanted: bool, equal on all ranks. The norm is of all ranks too, so that they agree.
        """
        before = [tensor.detach().clone() for tensor in self._changing]
        self._optimizer.step()
        norm = self._optimizer.grad_norm.reshape(1)
        left_out = unwanted | ~norm.isfinite()
        for tensor, kept in zip(self._changing, before, strict=True):
            tensor.copy_(torch.where(left_out, kept, tensor))
        return norm, left_out.to(norm.dtype)

    def uncount(self) -> None:
        """Of a step that was left out: AdamW keeps its count of updates on the host."""
        for state in self._moments:
            state["step"] -= 1


def nxd_optimizer(nxd_config: dict[str, Any], model: Any, config: Config, *, zero1: bool) -> Any:
    import neuronx_distributed as nxd

    settings = config.optimizer
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if decays(tuple(parameter.shape))]
    others = [parameter for parameter in parameters if not decays(tuple(parameter.shape))]
    # NxD does not hand max_grad_norm to its ZeRO-1 optimizer, which would clip to 1.0 (0.18.0).
    clip = {"max_norm": settings.clip_norm} if zero1 else {}
    return nxd.initialize_parallel_optimizer(
        nxd_config,
        torch.optim.AdamW,
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        **clip,
    )


def base_optimizer(optimizer: Any, *, zero1: bool) -> torch.optim.Optimizer:
    return optimizer.optimizer.base_optimizer if zero1 else optimizer.optimizer


def moments_of(optimizer: torch.optim.Optimizer, stored: Sequence[Stored]) -> list[dict[str, Tensor]]:
    """AdamW's, made here and not in its first step: a checkpoint of step 0 is complete."""
    for each in stored:
        optimizer.state[each.master] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(each.master.detach()),
            "exp_avg_sq": torch.zeros_like(each.master.detach()),
        }
    return [optimizer.state[each.master] for each in stored]
