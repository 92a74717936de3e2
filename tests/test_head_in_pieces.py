"""The output head works through its rows in pieces: the same sums and gradients, and never a whole table of logits."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pair_task import PAIR_TASKS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.head import PiecewiseHead, counted_places
from raynium.models import pieces
from raynium.models.pieces import tokens_of_a_piece
from raynium.tasks.base import Task
from raynium.tasks.pretraining import Pretraining

B, T, D, V = 4, 24, 16, 300
TASKS: Mapping[str, Task] = {"pretraining": Pretraining(), **PAIR_TASKS}


def batch_of(task: Task) -> Batch:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.3] = IGNORED_LABEL
    of_rows = torch.rand(B, generator=generator)
    columns = {"reference": -100 * of_rows, "answer": (labels != IGNORED_LABEL).float(), "nats_weight": of_rows}
    others = {column.name: columns[column.name] for column in task.columns}
    return Batch(torch.zeros(B, T, dtype=torch.int64), labels, others, None)


def learned(
    task: Task, *, piece_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, all_tokens: bool = True
) -> list[Tensor]:
    """Sums, and gradients of hidden states and weight, with pieces of at most so many rows.

    all_tokens: those without a label that counts have logits, too.
    """
    monkeypatch.setattr(pieces, "LOGITS_BYTES", piece_rows * V * dtype.itemsize)
    generator = torch.Generator().manual_seed(4)
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    head.weight.data = torch.randn(V, D, generator=generator).to(dtype)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    made = PiecewiseHead(task, vocabulary_group=None, sum_dtype=torch.float64)
    batch = batch_of(task)
    places = None if all_tokens else counted_places(batch.labels_BT)
    objective, sums = made.learning(batch, places)(head, hidden)
    objective.backward()
    assert hidden.grad is not None and head.weight.grad is not None
    assert head.weight.grad.dtype == dtype
    return [sums, hidden.grad, head.weight.grad]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("all_tokens", [True, False])
@pytest.mark.parametrize("piece_rows", [1, 7, 32, 95, B * T])
def test_pieces_have_the_sums_and_gradients_of_the_whole(
    name: str, piece_rows: int, all_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of: dict[str, Any] = {"dtype": torch.float32, "monkeypatch": monkeypatch}
    sums, of_hidden, of_weight = learned(TASKS[name], piece_rows=piece_rows, all_tokens=all_tokens, **of)
    whole_sums, whole_of_hidden, whole_of_weight = learned(TASKS[name], piece_rows=B * T, **of)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_hidden, whole_of_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_weight, whole_of_weight, rtol=1e-4, atol=1e-5)


def test_the_whole_is_what_autograd_makes_of_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    _, of_hidden, of_weight = learned(TASKS["pretraining"], piece_rows=32, dtype=torch.float64, monkeypatch=monkeypatch)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(V, D, generator=generator).double().requires_grad_()
    hidden = torch.randn(B, T, D, generator=generator).double().requires_grad_()
    labels = batch_of(TASKS["pretraining"]).labels_BT
    F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(of_hidden, hidden.grad)
    torch.testing.assert_close(of_weight, weight.grad)


def test_a_sum_over_many_pieces_in_bfloat16_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product rounded, or a sum kept in bfloat16, would be several times as far away."""
    # Pieces are worth while for the memory that their float32 sum takes only beyond this.
    monkeypatch.setattr("raynium.engines.head.tokens_of_a_piece", lambda tokens, **_: 2)
    of: dict[str, Any] = {"dtype": torch.bfloat16, "monkeypatch": monkeypatch}
    *_, in_pieces = learned(TASKS["pretraining"], piece_rows=1, **of)
    monkeypatch.setattr("raynium.engines.head.tokens_of_a_piece", lambda tokens, **_: tokens)
    *_, whole = learned(TASKS["pretraining"], piece_rows=1, **of)
    differs = (in_pieces.float() - whole.float()).norm() / whole.float().norm()
    assert differs < 2.0**-9


class Largest(TorchDispatchMode):
    """Of all tensors that operations make, the most elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return made


def test_places_are_those_of_labels_that_count_and_at_least_one() -> None:
    labels = torch.full((2, 3), IGNORED_LABEL)
    none = counted_places(labels)
    assert none is not None and none.tolist() == [0]
    labels[0, 2] = labels[1, 0] = 5
    some = counted_places(labels)
    assert some is not None and some.tolist() == [2, 3]
    assert counted_places(torch.zeros(2, 3, dtype=torch.int64)) is None


def test_a_batch_in_which_nothing_counts_teaches_nothing() -> None:
    head, hidden = nn.Linear(D, V, bias=False), torch.randn(B, T, D, requires_grad=True)
    labels = torch.full((B, T), IGNORED_LABEL)
    made = PiecewiseHead(TASKS["pretraining"], vocabulary_group=None, sum_dtype=torch.float64)
    objective, sums = made.learning(Batch(labels, labels, {}, None), counted_places(labels))(head, hidden)
    objective.backward()
    assert hidden.grad is not None and head.weight.grad is not None
    assert sums.tolist() == [0.0] and not hidden.grad.any() and not head.weight.grad.any()


@pytest.mark.parametrize("name", TASKS)
def test_no_tensor_is_larger_than_a_piece_or_the_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 16
    with Largest() as largest:
        learned(TASKS[name], piece_rows=rows, dtype=torch.float32, monkeypatch=monkeypatch)
    assert largest.elements == max(rows * V, V * D)


def test_a_head_that_does_not_learn_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LOGITS_BYTES", 10 * V * 4)
    head = nn.Linear(D, V, bias=False)
    head.weight.requires_grad_(False)
    hidden = torch.randn(B, T, D, requires_grad=True)
    made = PiecewiseHead(TASKS["dpo"], vocabulary_group=None, sum_dtype=torch.float64)
    made.learning(batch_of(TASKS["dpo"]), None)(head, hidden)[0].backward()
    assert head.weight.grad is None and hidden.grad is not None


def test_log_probabilities_of_rows_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(D, V, bias=False)
    hidden = torch.randn(B, T, D)
    batch = batch_of(TASKS["dpo"])
    made = PiecewiseHead(TASKS["dpo"], vocabulary_group=None, sum_dtype=torch.float64)
    with torch.no_grad():
        whole, sums = made.row_log_probs(batch, None)(head, hidden), made.evaluating(batch, None)(head, hidden)
        monkeypatch.setattr(pieces, "LOGITS_BYTES", 10 * V * 4)
        torch.testing.assert_close(made.row_log_probs(batch, None)(head, hidden), whole)
        torch.testing.assert_close(made.evaluating(batch, None)(head, hidden), sums)


@given(
    tokens=st.integers(1, 10**6),
    token_bytes=st.integers(1, 2**31),
    sum_bytes=st.sampled_from([0, 1, 2**20, 2**30]),
)
def test_pieces_cover_all_tokens_fit_and_are_no_more_than_twice_the_fewest(
    tokens: int, token_bytes: int, sum_bytes: int
) -> None:
    size = tokens_of_a_piece(tokens, token_bytes=token_bytes, sum_bytes=sum_bytes)
    assert 1 <= size <= tokens
    if size == tokens:
        assert tokens == 1 or tokens * token_bytes <= pieces.LOGITS_BYTES + sum_bytes
    else:
        assert size == 1 or size * token_bytes <= pieces.LOGITS_BYTES
        fewest = -(-tokens // max(1, pieces.LOGITS_BYTES // token_bytes))
        assert -(-tokens // size) <= 2 * fewest
        assert tokens * token_bytes > pieces.LOGITS_BYTES + sum_bytes
