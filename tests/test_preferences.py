"""DPO and ORPO as arithmetic: their slopes are the derivatives of the losses that the papers and TRL write down."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.evaluation import EvaluationSet
from raynium.tasks.base import Task, counts_of, loss_of
from raynium.tasks.preferences import Dpo, Orpo

PAIRS, SEQ_LEN = 5, 9
# One pair fills up, and counts for nothing.
REAL = PAIRS - 1
NOTHING_HELD_OUT = EvaluationSet([], num_documents=0, num_tokens=0, num_bytes=0)
TASKS = [Dpo(beta=0.3), Dpo(beta=0.1, label_smoothing=0.2), Orpo(weight=0.25)]


def rows(*, scale: float = 1.0) -> tuple[Tensor, Batch]:
    """Log-probabilities in float64, about -scale each, and their batch. Answers begin anywhere after a prompt."""
    generator = torch.Generator().manual_seed(3)
    shape = (2 * PAIRS, SEQ_LEN)
    labels_BT = torch.randint(0, 99, shape, generator=generator)
    begins_B1 = torch.randint(1, 5, (PAIRS, 1), generator=generator).repeat_interleave(2, 0)
    ends_B1 = torch.randint(6, SEQ_LEN + 1, (2 * PAIRS, 1), generator=generator)
    places_T = torch.arange(SEQ_LEN)
    answer_BT = (places_T >= begins_B1) & (places_T < ends_B1)
    answer_BT[4:6] = False
    labels_BT = labels_BT.where(answer_BT, IGNORED_LABEL)
    # ORPO learns the prompts of chosen rows, too.
    prompt_BT = (places_T < begins_B1) & (torch.arange(2 * PAIRS) % 2 == 0)[:, None] & answer_BT.any(1)[:, None]
    of_orpo_BT = labels_BT.where(~prompt_BT, 7)
    log_probs_BT = -scale * torch.rand(shape, generator=generator, dtype=torch.float64)
    reference_B = -3.0 * torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64)
    tokens = int((of_orpo_BT[::2] != IGNORED_LABEL).sum())
    nats_weight_B = torch.tensor([REAL / tokens, 0.0], dtype=torch.float64).repeat(PAIRS)
    others = {"reference": reference_B, "answer": answer_BT.double(), "nats_weight": nats_weight_B}
    return log_probs_BT, Batch(labels_BT, of_orpo_BT, others | {"dpo_labels": labels_BT})


def given(task: Task, *, scale: float = 1.0) -> tuple[Tensor, Batch]:
    """What an engine gives this task: its columns alone, and log-probabilities of 0 where no label counts."""
    log_probs_BT, batch = rows(scale=scale)
    labels_BT = batch.labels_BT if isinstance(task, Orpo) else batch.others["dpo_labels"]
    others = {column.name: batch.others[column.name] for column in task.columns}
    log_probs_BT = log_probs_BT.where(labels_BT != IGNORED_LABEL, 0).requires_grad_()
    return log_probs_BT, Batch(batch.tokens_BT, labels_BT, others)


def written_down(task: Task, log_probs_BT: Tensor, batch: Batch) -> Tensor:
    """The loss as the papers have it, one pair after the other."""
    costs, nats, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for chosen in range(0, 2 * PAIRS, 2):
        counted = batch.labels_BT[chosen : chosen + 2] != IGNORED_LABEL
        if not counted.any():
            continue
        if isinstance(task, Dpo):
            gains = log_probs_BT[chosen : chosen + 2].sum(1) - batch.others["reference"][chosen : chosen + 2]
            margin = task._beta * (gains[0] - gains[1])
            smoothing = task._label_smoothing
            costs.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
        elif isinstance(task, Orpo):
            answer = batch.others["answer"][chosen : chosen + 2].bool()
            means = [log_probs_BT[chosen + i][answer[i]].mean() for i in range(2)]
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            costs.append(-task._weight * F.logsigmoid((odds[0] / odds[1]).log()))
            nats = nats - log_probs_BT[chosen, counted[0]].sum()
            tokens += int(counted[0].sum())
    return torch.stack(costs).mean() + nats / (tokens or 1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
def test_slopes_in_closed_form_are_the_derivatives_of_the_loss_as_it_is_written_down(task: Task, scale: float) -> None:
    log_probs_BT, batch = given(task, scale=scale)
    loss = written_down(task, log_probs_BT, batch)
    loss.backward()
    scored = task.score(log_probs_BT.detach(), batch)
    counted = batch.labels_BT != IGNORED_LABEL
    assert log_probs_BT.grad is not None
    torch.testing.assert_close(
        (scored.slope_BT / REAL).where(counted, 0), log_probs_BT.grad.where(counted, 0), rtol=1e-10, atol=1e-14
    )
    sums = {name: term.double().sum().item() for name, term in scored.terms.items()} | counts_of_rows(task, batch)
    assert loss_of(task, sums) == pytest.approx(loss.item(), rel=1e-12)
    assert task.evaluation(sums, NOTHING_HELD_OUT)["eval/loss"] == pytest.approx(loss.item(), rel=1e-12)


def counts_of_rows(task: Task, batch: Batch) -> dict[str, float]:
    narrow = Batch(batch.tokens_BT, batch.labels_BT, {name: each.float() for name, each in batch.others.items()})
    return counts_of(task, narrow)


@pytest.mark.parametrize("task", TASKS)
def test_rewards_are_means_over_pairs_and_a_pair_that_fills_up_changes_none(task: Task) -> None:
    log_probs_BT, batch = given(task)
    scored = task.score(log_probs_BT.detach(), batch)
    sums = {name: term.double().sum().item() for name, term in scored.terms.items()} | counts_of_rows(task, batch)
    assert sums["pairs"] == REAL
    rewards = []
    for row in range(2 * PAIRS):
        if isinstance(task, Dpo):
            rewards.append(task._beta * (log_probs_BT[row].sum() - batch.others["reference"][row]).item())
        elif isinstance(task, Orpo):
            answer = batch.others["answer"][row].bool()
            rewards.append(task._weight * log_probs_BT[row][answer].mean().item() if answer.any() else 0.0)
    real = [row for row in range(0, 2 * PAIRS, 2) if row != 4]
    chosen, rejected = (sum(rewards[row + i] for row in real) / REAL for i in range(2))
    expected = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": sum(rewards[row] > rewards[row + 1] for row in real) / REAL,
    }
    assert task.training(sums) == pytest.approx(expected, rel=1e-9)
    of_evaluation = {f"eval/{name.replace('/', '_')}": value for name, value in expected.items()}
    assert (
        task.evaluation(sums, NOTHING_HELD_OUT).items()
        >= {name: pytest.approx(value, rel=1e-9) for name, value in of_evaluation.items()}.items()
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_is_certain_of_its_answers_makes_no_number_infinite(task: Task) -> None:
    log_probs_BT, batch = given(task)
    others = {name: column.float() for name, column in batch.others.items()}
    batch = Batch(batch.tokens_BT, batch.labels_BT, others)
    for chosen, rejected in ((0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4)):
        certain = torch.tensor([chosen, rejected]).repeat(PAIRS)[:, None].expand_as(log_probs_BT)
        scored = task.score(certain.where(batch.labels_BT != IGNORED_LABEL, 0), batch)
        assert scored.slope_BT.isfinite().all()
        assert all(term.isfinite().all() for term in scored.terms.values())


@pytest.mark.parametrize("task", TASKS)
def test_nothing_but_pairs_that_fill_up_is_no_loss_and_no_reward(task: Task) -> None:
    log_probs_BT, batch = given(task)
    others = {name: torch.zeros_like(column) for name, column in batch.others.items()}
    batch = Batch(batch.tokens_BT, torch.full_like(batch.labels_BT, IGNORED_LABEL), others)
    scored = task.score(torch.zeros_like(log_probs_BT), batch)
    sums = {name: term.double().sum().item() for name, term in scored.terms.items()} | counts_of_rows(task, batch)
    assert not scored.slope_BT.any() and not any(sums.values())
    assert loss_of(task, sums) == 0 and not any(task.training(sums).values())


def test_equal_answers_cost_log_2_and_smoothing_keeps_the_model_from_being_too_sure() -> None:
    labels_BT = torch.ones(2, 1, dtype=torch.int64)
    batch = Batch(labels_BT, labels_BT, {"reference": torch.zeros(2)})
    terms = Dpo(beta=0.1).score(torch.full((2, 1), -2.0), batch).terms
    assert terms["objective"].item() == pytest.approx(math.log(2)) and not terms["preferred"].item()
    sure = torch.tensor([[-1.0], [-400.0]])
    assert (
        Dpo(beta=0.1).score(sure, batch).slope_BT[0, 0]
        < 0
        < Dpo(beta=0.1, label_smoothing=0.1).score(sure, batch).slope_BT[0, 0]
    )
