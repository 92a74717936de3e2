"""A second task, for tests: rows in pairs, each token with a weight of its own, and slopes of both signs.

Of each pair the first row is preferred (DPO, arXiv 2305.18290, against log-probabilities that a column holds), and its
text is learned too, token by token as its weights say.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.evaluation import EvaluationSet
from raynium.tasks.base import Column, Scored, Sums

BETA = 0.2


class PairTask:
    """See `tasks/base.py`, Task."""

    columns: tuple[Column, ...] = (Column("weights", "float32", "token"), Column("reference", "float32", "row"))
    rows_per_sample = 2
    sums: tuple[str, ...] = ("objective", "preferred")
    objective = "objective"
    divisor = "pairs"
    slopes: Literal["negative", "signed"] = "signed"

    def counts(self, batch: Batch) -> Sums:
        return {"pairs": int(_real_pairs(batch.labels_BT).sum())}

    def score(self, log_probs_BT: Tensor, batch: Batch) -> Scored:
        real_S1 = _real_pairs(batch.labels_BT)[:, None]
        gain_S2 = (log_probs_BT.sum(1) - batch.others["reference"]).unflatten(0, (-1, 2))
        margin_S1 = BETA * (gain_S2[:, :1] - gain_S2[:, 1:])
        weights_S2T = batch.others["weights"].unflatten(0, (-1, 2)).clone()
        weights_S2T[:, 1] = 0
        nats_S2T = -log_probs_BT.unflatten(0, (-1, 2)) * weights_S2T
        pull_S1 = BETA * torch.sigmoid(-margin_S1) * real_S1
        slope_S2T = torch.stack((-pull_S1, pull_S1), dim=1) - weights_S2T
        terms = {
            "objective": (nats_S2T.sum((1, 2))[:, None] - F.logsigmoid(margin_S1)) * real_S1,
            "preferred": (margin_S1 > 0) * real_S1,
        }
        return Scored(terms, slope_S2T.flatten(0, 1))

    def training(self, sums: Sums) -> dict[str, float]:
        return {"train/preferred_ratio": sums["preferred"] / sums["pairs"]}

    def evaluation(self, sums: Sums, held_out: EvaluationSet) -> dict[str, float]:
        return {"eval/preferred_ratio": sums["preferred"] / sums["pairs"]}


def _real_pairs(labels_BT: Tensor) -> Tensor:
    return (labels_BT != IGNORED_LABEL).any(1).unflatten(0, (-1, 2)).any(1)


def pair_columns(labels: Tensor) -> dict[str, Tensor]:
    """labels: [STEPS, B, T]."""
    generator = torch.Generator().manual_seed(11)
    weights = torch.rand(labels.shape, generator=generator) * (torch.rand(labels.shape, generator=generator) < 0.7)
    return {"weights": weights, "reference": -70 * torch.rand(labels.shape[:2], generator=generator)}


def plain_sums(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The task's sums of whole batches, as a script of plain torch has them: one pair after the other, in float64."""
    objective, preferred, pairs = torch.zeros((), dtype=torch.float64), 0, 0
    log_probs_BTV = model(rows["tokens"]).log_softmax(-1)
    for chosen in range(0, len(rows["tokens"]), 2):
        log_probs, counted = [], []
        for row in (chosen, chosen + 1):
            where = rows["labels"][row] != IGNORED_LABEL
            labels = rows["labels"][row, where]
            log_probs.append(log_probs_BTV[row, where].gather(1, labels[:, None])[:, 0])
            counted.append(where)
        if not (counted[0].any() or counted[1].any()):
            continue
        gains = [each.sum() - rows["reference"][chosen + i].double() for i, each in enumerate(log_probs)]
        nats = -(log_probs[0] * rows["weights"][chosen, counted[0]].double()).sum()
        objective = objective + nats - F.logsigmoid(BETA * (gains[0] - gains[1]))
        preferred += int(gains[0] > gains[1])
        pairs += 1
    tokens = (rows["labels"] != IGNORED_LABEL).sum()
    return {
        "objective": objective,
        "preferred": torch.tensor(preferred),
        "tokens": tokens,
        "pairs": torch.tensor(pairs),
    }
