"""evaluate.patience and checkpoint.best_metric: which evaluation ends a run, and what a config may name."""

import math
import re
from typing import Any

import pytest
from tiny import job_text

from raynium.checkpoint.state import Chunk
from raynium.config.judged import best_value_of, judged_alike
from raynium.config.load import parse_config
from raynium.planning.rules import check
from raynium.train.patience import Patience


def judged(patience: Patience, values: list[float], *, metric: str = "eval/loss") -> list[bool]:
    """Whether each of these evaluations, ten steps apart, ends the run."""
    return [patience.judge(10 * number, {metric: value}) is not None for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("most", "best_is", "values", "ends"),
    [
        (2, "lowest", [3.0, 2.0, 2.5, 2.1], [False, False, False, True]),
        (2, "lowest", [3.0, 3.0, 2.9, 3.0, 2.9], [False, False, False, False, True]),
        (1, "highest", [0.1, 0.2, 0.3, 0.3], [False, False, False, True]),
        (2, "lowest", [math.nan, 3.0, math.nan, math.nan], [False, False, False, True]),
        (2, "lowest", [math.nan, math.nan], [False, True]),
        (1, "lowest", [math.inf, 3.0], [False, False]),
        (None, "lowest", [1.0, 2.0, 3.0], [False, False, False]),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(
    most: int | None, best_is: Any, values: list[float], ends: list[bool]
) -> None:
    assert judged(Patience(best_is=best_is, most=most), values) == ends


def test_the_reason_says_what_was_best_and_when() -> None:
    patience = Patience("eval/arc/acc", best_is="highest", most=2)
    assert judged(patience, [0.5, 0.75, 0.5, 0.25], metric="eval/arc/acc")[-1]
    assert patience.is_over() == (
        "ended early at step 40: eval/arc/acc has not improved in 2 evaluations; its best was 0.75 at step 20 "
        "(evaluate.patience)"
    )


def test_what_was_seen_goes_on_from_a_checkpoint_and_the_same_evaluation_counts_once() -> None:
    values = [3.0, 2.0, 2.5, 2.4, 2.3]
    first = Patience(most=3)
    judged(first, values[:4])
    [saved] = first.chunks(saved_here=True)
    second = Patience(most=3)
    [restored] = second.chunks(saved_here=False)
    assert (saved.name, saved.global_shape, saved.saved_here) == ("patience/eval/loss", (4,), True)
    restored.tensor.copy_(saved.tensor)
    # Made again: it was reported before the save, or not.
    assert second.judge(40, {"eval/loss": 2.4}) is None
    assert (second.judge(50, {"eval/loss": 2.3}) is not None) == (first.judge(50, {"eval/loss": 2.3}) is not None)
    assert second.is_over() == first.is_over() is not None
    # Saved with it, so that a generation that starts from here ends at once.
    assert bool(restored.tensor[3] == 3)
    assert Patience().chunks(saved_here=True) == list[Chunk]()


def problems(**changes: Any) -> list[str]:
    task = changes.pop("task", "pretraining")
    job = f"task: {task}\n" + job_text({name.replace("__", "."): value for name, value in changes.items()})
    return check(parse_config(job))


QUESTIONS, SET = ["/x/arc.jsonl"], ["s3://bucket/books"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"checkpoint__best_metric": "eval/bits_per_byte"}, None),
        ({"checkpoint__best_metric": "eval/arc/acc_norm", "evaluate__tasks": QUESTIONS}, None),
        ({"checkpoint__best_metric": "eval/books/loss", "evaluate__sets": SET}, None),
        ({"checkpoint__best_metric": "eval/arc/acc"}, "nothing is evaluated under that name: .* own are none"),
        ({"checkpoint__best_metric": "eval/a/b/acc"}, "nothing is evaluated under that name"),
        ({"checkpoint__best_metric": "eval/acc"}, "acc and acc_norm are of questions"),
        ({"checkpoint__best_metric": "eval/books/acc", "evaluate__sets": SET}, "acc and acc_norm are of questions"),
        ({"checkpoint__best_metric": "eval/arc/loss", "evaluate__tasks": QUESTIONS}, "acc and acc_norm are of quest"),
        (
            {"checkpoint__best_metric": "eval/perplexity"},
            "with task pretraining evaluations report eval/loss",
        ),
        (
            {"checkpoint__best_metric": "eval/books/words", "evaluate__sets": SET},
            "not known whether high or low is good: set checkpoint.best_mode to highest or lowest",
        ),
        (
            {"checkpoint__best_metric": "eval/books/words", "evaluate__sets": SET, "checkpoint__best_mode": "highest"},
            None,
        ),
        ({"evaluate__tasks": ["/x/arc.jsonl", "/y/arc.jsonl"]}, r"tasks\[1\]: metrics know it as 'arc', and evaluate"),
        ({"evaluate__tasks": ["/x/a b.jsonl"]}, r"evaluate.tasks\[0\]: metrics know it as 'a b', the last part"),
        *(
            ({"task": task, "evaluate__sets": SET}, f"evaluate.sets is given with task {task}, which judges pairs of")
            for task in ("dpo", "orpo")
        ),
        ({"evaluate__sets": ["/x/arc"], "evaluate__tasks": QUESTIONS}, "metrics know it as 'arc', and evaluate.sets"),
    ],
)
def test_the_best_metric_is_one_that_the_run_reports(changes: dict[str, Any], problem: str | None) -> None:
    found = problems(**changes)
    if problem is None:
        assert found == []
    else:
        [message] = found
        assert re.search(problem, message), message


def test_which_value_is_best_is_known_by_the_name_or_said() -> None:
    def best(metric: str, mode: str = "auto") -> str | None:
        changes = {"checkpoint.best_metric": metric, "checkpoint.best_mode": mode}
        return best_value_of(parse_config(job_text(changes)).checkpoint)

    assert (best("eval/loss"), best("eval/arc/acc"), best("eval/x/y")) == ("lowest", "highest", None)
    assert (best("eval/loss", "highest"), best("eval/x/y", "lowest")) == ("highest", "lowest")


def test_a_run_that_ended_early_is_over_for_as_long_as_it_is_judged_alike() -> None:
    before = parse_config(job_text({"evaluate.patience": 3}))
    saved = before.model_dump(mode="json")
    assert judged_alike(saved, before)
    for changes in ({"evaluate.patience": 4}, {"evaluate.patience": None}):
        assert not judged_alike(saved, parse_config(job_text({"evaluate.patience": 3} | changes)))
    other = {"evaluate.patience": 3, "checkpoint.best_metric": "eval/bits_per_byte"}
    assert not judged_alike(saved, parse_config(job_text(other)))
