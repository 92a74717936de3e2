"""The decoder with neuronx-distributed's parallel layers in place of its matrices.

Shapes as in `models/decoder.py`, but hidden states have tokens first, hidden_TBD, since NxD's layers gather and scatter
along the first dim. With tensor parallelism (size P) they hold T / P tokens between the matrices.
"""

# The library is not on the public package index: no type checker finds it.
# pyright: reportMissingImports=false

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raynium.config.schema import ModelSection
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.models.attention import Places, attend
from raynium.models.decoder import Attention, Decoder
from raynium.models.nxd_layout import kv_copies
from raynium.models.plan import tensor_parallel_plan
from raynium.tasks.base import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

# The dim of TBD that sequence parallelism divides.
_TOKENS = 0


def parallel_decoder(config: ModelSection, *, tensor_size: int, dtype: torch.dtype) -> Decoder:
    """A decoder whose matrices follow the tensor-parallel plan. Every rank calls it, on the meta device.

    NxD's parallel state must be initialised. Names of parameters are those that `nxd_layout.pieces` calls `stored`.
    The model takes tokens_BT and returns this rank's part of the vocabulary, logits_TBV.
    """
    model = Decoder(config).to(dtype)
    model.embedding = _embedding(config, dtype=dtype)
    for block in _blocks(model):
        block.attention = NxdAttention(block.attention, config, tensor_size=tensor_size, dtype=dtype)
        block.ffn = NxdSwiGLU(config, tensor_size=tensor_size, dtype=dtype)
    model.head = _column(config.hidden_size, config.vocab_size, tensor_size=tensor_size, dtype=dtype)
    model.tie()
    if tensor_size > 1:
        _mark_whole_parameters(model, config)
    return model


class NxdAttention(nn.Module):
    """`Attention` on this rank's heads. One gather serves q, k and v; more ranks than key/value heads share heads."""

    def __init__(self, plain: Attention, config: ModelSection, *, tensor_size: int, dtype: torch.dtype):
        super().__init__()
        from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear

        width = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        # Not fused: NxD's fused weight loses its tensor-parallel mark, and with it its place in the gradient norm.
        self.qkv = GQAQKVColumnParallelLinear(
            config.hidden_size,
            [width, config.num_kv_heads * config.head_dim],
            bias=False,
            gather_output=False,
            dtype=dtype,
            sequence_parallel_enabled=tensor_size > 1,
            kv_size_multiplier=kv_copies(config, tensor_size),
            fuse_qkv=False,
        )
        if config.traits.qkv_biases:
            # The layer adds those it has, but cannot make them itself (0.18.0): it marks them by an argument that the
            # marking does not have.
            for each in "qkv":
                rows = len(getattr(self.qkv, f"weight_{each}"))
                setattr(self.qkv, f"bias_{each}", nn.Parameter(torch.empty(rows, dtype=dtype)))
        _mark_tensor_parallel(self.qkv, tensor_size)
        self.o = _row(width, config.hidden_size, tensor_size=tensor_size, dtype=dtype)
        self.q_norm, self.k_norm = plain.q_norm, plain.k_norm

    def forward(self, hidden_TBD: Tensor, *, places: Places) -> Tensor:
        projected_TBX = self.qkv(hidden_TBD)
        for each in projected_TBX:
            if each.requires_grad:
                # NxD's layer views its gradients as rows.
                each.register_hook(torch.Tensor.contiguous)
        q_BTHK, k_BTGK, v_BTGK = (each.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for each in projected_TBX)
        mixed_BHTK = attend(self.q_norm(q_BTHK), self.k_norm(k_BTGK), v_BTGK, places)
        return self.o(mixed_BHTK.permute(2, 0, 1, 3).flatten(2).contiguous())


class NxdSwiGLU(nn.Module):
    """`SwiGLU` with gate and up in one matrix, so that the hidden states are gathered once."""

    def __init__(self, config: ModelSection, *, tensor_size: int, dtype: torch.dtype):
        super().__init__()
        # stride 2: a rank's rows are its part of gate, then its part of up.
        self.gate_up = _column(config.hidden_size, 2 * config.ffn_size, tensor_size=tensor_size, dtype=dtype, stride=2)
        self.down = _row(config.ffn_size, config.hidden_size, tensor_size=tensor_size, dtype=dtype)

    def forward(self, hidden_TBD: Tensor) -> Tensor:
        gate_TBF, up_TBF = self.gate_up(hidden_TBD).chunk(2, dim=-1)
        return self.down(F.silu(gate_TBF) * up_TBF)


class TaskLoss(nn.Module):
    """A micro-batch's logits to the scalar whose gradient is the task's, times a scale; the task's sums on the way.

    A module because NxD's tracer looks no further into one; it has no parameters and nothing to save.
    """

    def __init__(self, task: Task):
        super().__init__()
        self._task = task
        self._to_skip = 0
        # One for each micro-batch: added up at once they would be part of its graph.
        self._sums: list[Tensor] = []
        self._rows: list[Tensor] | None = None

    def begin(self, scale: Tensor, *, dry_runs: int = 0, keep_rows: bool = False) -> None:
        """Before the micro-batches of a step or evaluation call. scale: a scalar on the device.

        dry_runs: forward passes that come first and do not count. Nothing of them is kept, not even on the device.
        keep_rows: for `rows`.
        """
        self._scale = scale
        self._to_skip = dry_runs
        self._sums = []
        self._rows = [] if keep_rows else None

    def forward(self, logits_TBV: Tensor, tokens_BT: Tensor, labels_BT: Tensor, *others: Tensor) -> Tensor:
        """others: the task's columns, in its order. The ranks of a tensor group get the same, each from its logits.

        Which documents rows hold is the model's matter: no task gets to see it here.
        """
        names = (column.name for column in self._task.columns)
        batch = Batch(tokens_BT, labels_BT, dict(zip(names, others, strict=True)))
        log_probs_BT = _label_log_probs(logits_TBV, labels_BT)
        scored = self._task.score(log_probs_BT.detach(), batch)
        if self._to_skip == 0:
            sums = [scored.terms[name].sum(dtype=torch.float32) for name in self._task.sums]
            self._sums.append(torch.stack(sums))
            if self._rows is not None:
                self._rows.append(log_probs_BT.detach().sum(1))
        self._to_skip = max(0, self._to_skip - 1)
        return (scored.slope_BT * log_probs_BT).sum() * self._scale

    def sums(self) -> Tensor:
        """float32, one for each of the task's names, since `begin`; zeros on a stage that has no logits."""
        return torch.stack([torch.zeros(len(self._task.sums), device=self._scale.device), *self._sums]).sum(0)

    def rows(self, number: int) -> Tensor:
        """float32 [number], the log-probabilities of each row's labels added up, since `begin(keep_rows=True)`; zeros
        on a stage that has no logits.
        """
        return torch.cat(self._rows) if self._rows else torch.zeros(number, device=self._scale.device)


def _label_log_probs(logits_TBV: Tensor, labels_BT: Tensor) -> Tensor:
    """float32, 0 where no label counts; the same on the ranks of a tensor group."""
    from neuronx_distributed.parallel_layers import parallel_cross_entropy

    labels_TB = labels_BT.transpose(0, 1).contiguous()
    # Labels outside the vocabulary have no logit to NxD, only the norm of their row, which is left out here.
    nats_TB = parallel_cross_entropy(logits_TBV.float(), labels_TB)
    return -(nats_TB * (labels_TB != IGNORED_LABEL)).transpose(0, 1)


def _blocks(model: Any) -> "Iterator[Any]":
    """The blocks, of which the typed parts are about to be replaced."""
    return iter(model.blocks)


def _embedding(config: ModelSection, *, dtype: torch.dtype) -> Any:
    from neuronx_distributed.parallel_layers import ParallelEmbedding

    # Sequence parallel on one rank, too: that is what turns BTD to TBD.
    return ParallelEmbedding(config.vocab_size, config.hidden_size, dtype=dtype, sequence_parallel_enabled=True)


def _column(in_size: int, out_size: int, *, tensor_size: int, dtype: torch.dtype, stride: int = 1) -> Any:
    from neuronx_distributed.parallel_layers import ColumnParallelLinear

    split = tensor_size > 1
    return ColumnParallelLinear(
        in_size,
        out_size,
        bias=False,
        gather_output=False,
        dtype=dtype,
        stride=stride,
        sequence_parallel_enabled=split,
        sequence_dimension=_TOKENS if split else None,
    )


def _row(in_size: int, out_size: int, *, tensor_size: int, dtype: torch.dtype) -> Any:
    from neuronx_distributed.parallel_layers import RowParallelLinear

    split = tensor_size > 1
    return RowParallelLinear(
        in_size,
        out_size,
        bias=False,
        input_is_parallel=True,
        dtype=dtype,
        sequence_parallel_enabled=split,
        sequence_dimension=_TOKENS if split else None,
    )


def _mark_tensor_parallel(qkv: Any, tensor_size: int) -> None:
    """On the meta device NxD's layer leaves this out, and the gradient norm would count a part of the weights."""
    from neuronx_distributed.parallel_layers import set_tensor_model_parallel_attributes

    for parameter in qkv.parameters():
        set_tensor_model_parallel_attributes(parameter, True, 0, 1, num_partitions=tensor_size)


def _mark_whole_parameters(model: Decoder, config: ModelSection) -> None:
    """Parameters that are whole on every rank, which uses them on its tokens or heads: NxD sums their gradients."""
    for rule in tensor_parallel_plan(config):
        if rule.split in ("sequence", "heads"):
            for index in range(config.num_layers if "*" in rule.module else 1):
                weight = model.get_parameter(f"{rule.module.replace('*', str(index))}.weight")
                vars(weight)["sequence_parallel_enabled"] = True


def mark_copies(model: nn.Module, *, is_copy: bool) -> None:
    """Copies of key/value heads do not count again in the gradient norm (NxD's mark `shared`)."""
    if is_copy:
        for block in _blocks(model):
            block.attention.qkv.weight_k.shared = block.attention.qkv.weight_v.shared = True
