"""Learning from pairs of answers to one prompt, of which people preferred the first. No torch at import.

Rows alternate: chosen, rejected. S: pairs, B = 2 S rows. A pair without a counted label fills up a batch and adds
nothing. Definitions and names are TRL's.
"""

from typing import TYPE_CHECKING, Literal

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.tasks.base import Column, Scored, Sums, loss_of

if TYPE_CHECKING:
    from torch import Tensor

    from raynium.data.evaluation import EvaluationSet

# Of every task here, so that they report alike.
_REWARDS = ("chosen", "rejected", "preferred")


class Dpo:
    """Direct preference optimisation (arXiv 2305.18290), the mean over all pairs of a step.

    With m = beta × ((log p(chosen) - its reference) - (log p(rejected) - its reference)), over whole answers, a pair
    costs -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m). The reference is the log-probability
    that the first weights gave the answer; a batch holds it as a column.
    """

    columns: tuple[Column, ...] = (Column("reference", "float32", "row"),)
    rows_per_sample = 2
    sums: tuple[str, ...] = ("objective", *_REWARDS)
    objective = "objective"
    divisor = "pairs"
    slopes: Literal["fixed", "negative", "signed"] = "signed"

    def __init__(self, *, beta: float, label_smoothing: float = 0.0):
        """label_smoothing: the share of pairs that people are believed to have confused, below 0.5."""
        self._beta, self._label_smoothing = beta, label_smoothing

    def counts(self, batch: Batch) -> Sums:
        return {"pairs": int(_real_pairs(batch.labels_BT).sum())}

    def score(self, log_probs_BT: "Tensor", batch: Batch) -> Scored:
        from torch.nn.functional import logsigmoid

        real_S = _real_pairs(batch.labels_BT)
        rewards_S2 = self._beta * (log_probs_BT.sum(1) - batch.others["reference"]).unflatten(0, (-1, 2))
        margin_S = rewards_S2[:, 0] - rewards_S2[:, 1]
        kept = 1 - self._label_smoothing
        costs_S = -kept * logsigmoid(margin_S) - self._label_smoothing * logsigmoid(-margin_S)
        pull_S = self._beta * (kept * (-margin_S).sigmoid() - self._label_smoothing * margin_S.sigmoid()) * real_S
        terms = {"objective": costs_S * real_S, **_reward_terms(rewards_S2, real_S)}
        return Scored(terms, _of_rows(-pull_S, pull_S, log_probs_BT))

    def training(self, sums: Sums) -> dict[str, float]:
        return _reward_metrics(sums, "rewards/")

    def evaluation(self, sums: Sums, held_out: "EvaluationSet") -> dict[str, float]:
        """eval/loss is the objective, the mean over all held-out pairs."""
        return {"eval/loss": loss_of(self, sums), **_reward_metrics(sums, "eval/rewards_")}


class Orpo:
    """Odds ratio preference optimisation (arXiv 2403.07691): the cross-entropy of the chosen texts, prompts included,
    the mean over their tokens in a step, minus weight × log sigmoid of the log-odds ratio, the mean over its pairs.

    With a the mean log-probability of an answer's tokens, its log-odds are a - log(1 - exp(a)), and the ratio is that
    of the chosen answer to the rejected one. It needs no reference.
    """

    columns: tuple[Column, ...] = (Column("answer", "float32", "token"), Column("nats_weight", "float32", "row"))
    """answer: 1 where the label is one of an answer, else 0. nats_weight: pairs of the step over the chosen tokens of
    the step, over all ranks, so that both means become one sum over one count."""
    rows_per_sample = 2
    sums: tuple[str, ...] = ("objective", "nats", "odds", *_REWARDS)
    objective = "objective"
    divisor = "pairs"
    slopes: Literal["fixed", "negative", "signed"] = "signed"

    def __init__(self, *, weight: float):
        self._weight = weight

    def counts(self, batch: Batch) -> Sums:
        chosen = int((batch.labels_BT[::2] != IGNORED_LABEL).sum())
        return {"pairs": int(_real_pairs(batch.labels_BT).sum()), "chosen_tokens": chosen}

    def score(self, log_probs_BT: "Tensor", batch: Batch) -> Scored:
        from torch.nn.functional import logsigmoid

        real_S = _real_pairs(batch.labels_BT)
        answer_BT = batch.others["answer"]
        lengths_S2 = answer_BT.sum(1).clamp(min=1).unflatten(0, (-1, 2))
        # A mean log-probability of 0 has infinite odds. A pair that fills up has no answer, and none of its own.
        means_S2 = ((log_probs_BT * answer_BT).sum(1).unflatten(0, (-1, 2)) / lengths_S2).clamp(max=-_LEAST_DOUBT)
        others_S2 = -means_S2.expm1()
        log_odds_S2 = means_S2 - others_S2.log()
        ratio_S = log_odds_S2[:, 0] - log_odds_S2[:, 1]
        nats_S = -log_probs_BT[::2].sum(1)
        nats_weight_S = batch.others["nats_weight"][::2]
        odds_S = -self._weight * logsigmoid(ratio_S) * real_S
        # The derivative of the log-odds with respect to each of an answer's log-probabilities.
        pulls_S2 = self._weight * ((-ratio_S).sigmoid() * real_S)[:, None] / (others_S2 * lengths_S2)
        slope_BT = _of_rows(-pulls_S2[:, 0], pulls_S2[:, 1], log_probs_BT) * answer_BT
        slope_BT = slope_BT - _of_rows(nats_weight_S, nats_weight_S * 0, log_probs_BT)
        terms = {
            "objective": nats_weight_S * nats_S + odds_S,
            "nats": nats_S,
            "odds": odds_S,
            **_reward_terms(self._weight * means_S2, real_S),
        }
        return Scored(terms, slope_BT)

    def training(self, sums: Sums) -> dict[str, float]:
        return _reward_metrics(sums, "rewards/")

    def evaluation(self, sums: Sums, held_out: "EvaluationSet") -> dict[str, float]:
        """eval/loss is as the objective, over all held-out tokens and pairs."""
        loss = sums["nats"] / (sums["chosen_tokens"] or 1) + sums["odds"] / (sums["pairs"] or 1)
        return {"eval/loss": loss, **_reward_metrics(sums, "eval/rewards_")}


# What float32 tells from certainty.
_LEAST_DOUBT = 2.0**-23


def _real_pairs(labels_BT: "Tensor") -> "Tensor":
    """bool [S]: whether the pair counts a label."""
    return (labels_BT != IGNORED_LABEL).any(1).unflatten(0, (-1, 2)).any(1)


def _of_rows(chosen_S: "Tensor", rejected_S: "Tensor", like_BT: "Tensor") -> "Tensor":
    """[B, T]: each pair's two numbers, along all of its rows."""
    import torch

    return torch.stack((chosen_S, rejected_S), dim=1).flatten()[:, None].expand_as(like_BT)


def _reward_terms(rewards_S2: "Tensor", real_S: "Tensor") -> "dict[str, Tensor]":
    chosen_S, rejected_S = rewards_S2.unbind(1)
    return {
        "chosen": chosen_S * real_S,
        "rejected": rejected_S * real_S,
        "preferred": (chosen_S > rejected_S) & real_S,
    }


def _reward_metrics(sums: Sums, prefix: str) -> dict[str, float]:
    """TRL's names: means over pairs."""
    pairs = sums["pairs"] or 1
    chosen, rejected, preferred = (sums[name] / pairs for name in _REWARDS)
    rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": preferred}
    return {f"{prefix}{name}": value for name, value in rewards.items()}
