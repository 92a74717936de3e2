"""Log-probabilities of labels, and logits that become their own gradient, in place.

Logits are the largest activation of a language model. F.cross_entropy makes two more tensors of their size (log
probabilities, gradient), in float32; this makes none, and on CPU takes a third of the time. With the
vocabulary split over tensor-parallel ranks the ranks exchange two numbers per token and never gather the logits.

Shapes: N tokens (B * T), V the vocabulary's part on this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from raynium.data.batch import IGNORED_LABEL

# Rows of logits worked on at once: what fits a CPU core's cache, and bounds the float32 copy of bfloat16 logits.
ROWS_AT_ONCE = 512


class LabelLogProbs(NamedTuple):
    """Of N labels, in float32 or wider, and what the gradient needs of the way there.

    log_probs_N: log softmax(logits)[label]; 0 where no label counts. log_norm_N: log of the sum of exp(logits), over
    the whole vocabulary. columns_N: where the label's logit is on this rank; 0 where it is on another, or no label
    counts. here_N: whether it is on this rank.
    """

    log_probs_N: Tensor
    log_norm_N: Tensor
    columns_N: Tensor
    here_N: Tensor
    counted_N: Tensor


@torch.no_grad()
def label_log_probs(
    logits_NV: Tensor, labels_N: Tensor, *, vocabulary_group: dist.ProcessGroup | None
) -> LabelLogProbs:
    """The logits stay as they are: any float dtype; arithmetic is float32 or wider.

    labels_N: int64, IGNORED_LABEL where not counted; ids are of the whole vocabulary.
    vocabulary_group: the ranks that hold the other parts of the vocabulary, in order; all of them call this and get
    the same log-probabilities. None: the vocabulary is whole.
    """
    counted_N = labels_N != IGNORED_LABEL
    begin = 0 if vocabulary_group is None else vocabulary_group.rank() * logits_NV.shape[1]
    columns_N = labels_N - begin
    here_N = counted_N & (columns_N >= 0) & (columns_N < logits_NV.shape[1])
    columns_N = columns_N.where(here_N, 0)

    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    chunks = list(zip(logits_NV.split(ROWS_AT_ONCE), columns_N.split(ROWS_AT_ONCE), strict=True))
    log_norm_N = torch.cat([chunk_NV.to(wide).logsumexp(1) for chunk_NV, _ in chunks])
    label_logit_N = torch.cat([chunk_NV.gather(1, columns[:, None])[:, 0] for chunk_NV, columns in chunks]).to(wide)
    label_logit_N = label_logit_N.where(here_N, 0)
    if vocabulary_group is not None:
        log_norm_N, label_logit_N = _combine(log_norm_N, label_logit_N, vocabulary_group)
    log_probs_N = (label_logit_N - log_norm_N).where(counted_N, 0)
    return LabelLogProbs(log_probs_N, log_norm_N, columns_N, here_N, counted_N)


@torch.no_grad()
def turn_into_gradient(logits_NV: Tensor, found: LabelLogProbs, slope_N: Tensor, *, signed: bool) -> None:
    """Overwrites the logits with the gradient of a function that has these slopes in the log-probabilities `found`.

    That is weight * (softmax(logits) - one_hot(label)) with weight = -slope, and 0 where no label counts.
    signed: some slope may be positive; without, such a row becomes NaN.
    """
    weight_N = -slope_N.to(found.log_norm_N.dtype).where(found.counted_N, 0)
    # weight * exp(logit - norm) is exp(logit - (norm - log weight)), which costs no pass over the logits. A weight of 0
    # makes the norm infinite, and the row 0.
    log_norm_N = found.log_norm_N - (weight_N.abs() if signed else weight_N).log()
    one_hot_N = -(found.here_N * weight_N)
    rows = (log_norm_N, weight_N.sign(), one_hot_N, found.columns_N)
    for chunk_NV, log_norm, sign, one_hot, columns in zip(
        logits_NV.split(ROWS_AT_ONCE), *(row.split(ROWS_AT_ONCE) for row in rows), strict=True
    ):
        in_place = chunk_NV if chunk_NV.dtype == log_norm.dtype else chunk_NV.to(log_norm.dtype)
        in_place.sub_(log_norm[:, None]).exp_()
        if signed:
            in_place.mul_(sign[:, None])
        in_place.scatter_add_(1, columns[:, None], one_hot[:, None])
        if in_place is not chunk_NV:
            chunk_NV.copy_(in_place)


def _combine(log_norm_N: Tensor, label_logit_N: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over the vocabulary's parts: log of the summed norms, and the one label logit that is not 0. One collective."""
    mine_2N = torch.stack((log_norm_N, label_logit_N))
    parts = [torch.empty_like(mine_2N) for _ in range(group.size())]
    dist.all_gather(parts, mine_2N, group=group)
    parts_P2N = torch.stack(parts)
    return parts_P2N[:, 0].logsumexp(0), parts_P2N[:, 1].sum(0)
