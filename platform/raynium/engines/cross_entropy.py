"""Cross entropy that turns the logits into their own gradient, in place.

Logits are the largest activation of a language model. F.cross_entropy makes two more tensors of their size (log
probabilities, gradient), in float32; this makes none, and on CPU takes a third of the time. With the
vocabulary split over tensor-parallel ranks the ranks exchange two numbers per token and never gather the logits.

Shapes: N tokens (B * T), V the vocabulary's part on this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from raynium.data.batch import IGNORED_LABEL

# Rows of logits worked on at once: what fits a CPU core's cache, and bounds the float32 copy of bfloat16 logits.
ROWS_AT_ONCE = 512


@torch.no_grad()
def summed_nats(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    vocabulary_group: dist.ProcessGroup | None,
    want_gradient: bool,
    sum_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sum over counted labels of -log softmax(logits)[label]; a `sum_dtype` scalar on the logits' device.

    logits_NV: any float dtype; arithmetic is float32 or wider. With `want_gradient` it ends up as the sum's gradient.
    labels_N: int64, IGNORED_LABEL where not counted; ids are of the whole vocabulary.
    vocabulary_group: the ranks that hold the other parts of the vocabulary, in order; all of them call this and get
    the same sum. None: the vocabulary is whole.
    """
    counted_N = labels_N != IGNORED_LABEL
    begin = 0 if vocabulary_group is None else vocabulary_group.rank() * logits_NV.shape[1]
    columns_N = labels_N - begin
    here_N = counted_N & (columns_N >= 0) & (columns_N < logits_NV.shape[1])  # labels whose logit is on this rank
    columns_N = columns_N.where(here_N, 0)

    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    chunks = list(zip(logits_NV.split(ROWS_AT_ONCE), columns_N.split(ROWS_AT_ONCE), strict=True))
    log_norm_N = torch.cat([chunk_NV.to(wide).logsumexp(1) for chunk_NV, _ in chunks])
    label_logit_N = torch.cat([chunk_NV.gather(1, columns[:, None])[:, 0] for chunk_NV, columns in chunks]).to(wide)
    label_logit_N = label_logit_N.where(here_N, 0)
    if vocabulary_group is not None:
        log_norm_N, label_logit_N = _combine(log_norm_N, label_logit_N, vocabulary_group)
    nats = (log_norm_N - label_logit_N).where(counted_N, 0).sum(dtype=sum_dtype)

    if want_gradient:
        # softmax(logits) - one_hot(label); a norm of infinity makes it 0 in rows that are not counted
        log_norm_N = log_norm_N.where(counted_N, torch.inf)
        one_hot_N = -here_N.to(wide)
        for (chunk_NV, columns), log_norm, one_hot in zip(
            chunks,
            log_norm_N.split(ROWS_AT_ONCE),
            one_hot_N.split(ROWS_AT_ONCE),
            strict=True,
        ):
            in_place = chunk_NV if chunk_NV.dtype == wide else chunk_NV.to(wide)
            in_place.sub_(log_norm[:, None]).exp_()
            in_place.scatter_add_(1, columns[:, None], one_hot[:, None])
            if in_place is not chunk_NV:
                chunk_NV.copy_(in_place)
    return nats


def _combine(log_norm_N: Tensor, label_logit_N: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over the vocabulary's parts: log of the summed norms, and the one label logit that is not 0. One collective."""
    mine_2N = torch.stack((log_norm_N, label_logit_N))
    parts = [torch.empty_like(mine_2N) for _ in range(group.size())]
    dist.all_gather(parts, mine_2N, group=group)
    parts_P2N = torch.stack(parts)
    return parts_P2N[:, 0].logsumexp(0), parts_P2N[:, 1].sum(0)
