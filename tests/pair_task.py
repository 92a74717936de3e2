"""Rows in pairs, and what the tasks that learn from them add up, as a script of plain torch has it."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raynium.data.batch import IGNORED_LABEL
from raynium.tasks.base import Task
from raynium.tasks.preferences import Dpo, Orpo

BETA, SMOOTHING, WEIGHT = 0.2, 0.1, 0.4
PAIR_TASKS: dict[str, Task] = {"dpo": Dpo(beta=BETA, label_smoothing=SMOOTHING), "orpo": Orpo(weight=WEIGHT)}


def in_pairs(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every step's global batch, [STEPS, B, T], with the columns of both tasks. The first pair of each is empty."""
    generator = torch.Generator().manual_seed(11)
    labels = samples["labels"].clone()
    labels[:, 2] = labels[:, -1]
    counted = labels != IGNORED_LABEL
    answer = counted & (torch.rand(labels.shape, generator=generator) < 0.6)
    answer |= counted & ~answer.any(-1, keepdim=True)
    # Log-probabilities that the model begins with, give or take.
    reference = -4 * counted.sum(-1) * (0.9 + 0.2 * torch.rand(labels.shape[:2], generator=generator))
    pairs = counted.any(-1)[:, ::2].sum(1)
    nats_weight = torch.zeros(labels.shape[:2])
    nats_weight[:, ::2] = (pairs / counted[:, ::2].sum((1, 2)))[:, None]
    columns = {"reference": reference, "answer": answer.float(), "nats_weight": nats_weight}
    return {**samples, "labels": labels, **columns}


def plain_sums(name: str, model: nn.Module, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums and counts of whole batches: one pair after the other, in float64; "loss": what is minimised."""
    labels, counted = rows["labels"], rows["labels"] != IGNORED_LABEL
    log_probs = model(rows["tokens"]).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    zero = torch.zeros((), dtype=torch.float64)
    costs, nats, chosen, rejected, preferred = zero, zero, zero, zero, 0
    real = [row for row in range(0, len(labels), 2) if counted[row].any()]
    for row in real:
        if name == "dpo":
            gains = [(log_probs[at] * counted[at]).sum() - rows["reference"][at].double() for at in (row, row + 1)]
            rewards = [BETA * gain for gain in gains]
            margin = rewards[0] - rewards[1]
            costs = costs - (1 - SMOOTHING) * F.logsigmoid(margin) - SMOOTHING * F.logsigmoid(-margin)
        else:
            means = [log_probs[at, rows["answer"][at].bool()].mean() for at in (row, row + 1)]
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            costs = costs - WEIGHT * F.logsigmoid((odds[0] / odds[1]).log())
            nats = nats - log_probs[row, counted[row]].sum()
            rewards = [WEIGHT * mean for mean in means]
        chosen, rejected = chosen + rewards[0], rejected + rewards[1]
        preferred += int(rewards[0] > rewards[1])
    of_chosen = int(counted[::2].sum())
    loss = costs / len(real) + nats / of_chosen
    of_orpo = {"nats": nats, "odds": costs, "chosen_tokens": torch.tensor(of_chosen)} if name == "orpo" else {}
    return {
        "loss": loss,
        "objective": loss * len(real),
        "chosen": chosen,
        "rejected": rejected,
        "preferred": torch.tensor(preferred),
        "tokens": counted.sum(),
        "pairs": torch.tensor(len(real)),
        **of_orpo,
    }


def plain_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """What the model gives the labels of each row, added up."""
    log_probs = model(rows["tokens"]).log_softmax(-1).gather(2, rows["labels"].clamp(min=0)[..., None])[..., 0]
    return (log_probs * (rows["labels"] != IGNORED_LABEL)).sum(1)
