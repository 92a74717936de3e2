"""The seam between what is learned and how a step is computed. No torch here. B, T as in `data/batch.py`.

An engine runs the model and its head, and hands a task the log-probability that the model gave each label. The task
answers with numbers to add up and with the slope of its objective in each log-probability; the engine makes the
gradient of the logits from that, adds the numbers up over micro-batches and ranks, and divides the objective once by
what the whole batch counted. So a task knows no engine, no rank and no vocabulary, and an engine no task.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from raynium.config.schema import Config
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from raynium.data.evaluation import EvaluationSet

# By name, over all rows that all data ranks gave; the same on every rank.
Sums = dict[str, float]


class Column(NamedTuple):
    """What a batch of a task holds beside tokens and labels.

    name: lower case, since torch.fx makes it so. per: a token for shape [B, T], a row for [B].
    """

    name: str
    dtype: Literal["int64", "float32"]
    per: Literal["token", "row"]


class Scored(NamedTuple):
    """What a task makes of the rows of one micro-batch."""

    # For each of `Task.sums` its addends, in any shape. Rows without a counted label, which fill up an evaluation, must
    # add nothing.
    terms: "Mapping[str, Tensor]"
    # The derivative of the objective's addends, summed, with respect to each log-probability. What it says of labels
    # that are not counted is not read.
    slope_BT: "Tensor"


class Task(Protocol):
    """What a run learns. Pure: every rank of a tensor group asks it the same and goes on with its own answer.

    rows_per_sample: neighbouring rows that are scored together, so that no micro-batch may part them. sums: names of
    what `score` adds up. objective: which of them is minimised. divisor: which count its sum is divided by: "tokens",
    or one of `counts`.
    """

    columns: tuple[Column, ...]
    rows_per_sample: int
    sums: tuple[str, ...]
    objective: str
    divisor: str
    # "fixed": never positive, and the same whatever the log-probabilities are; `score` is asked beforehand, with zeros.
    # "negative": never positive. "signed": some may be positive, which makes a label less likely, and costs a pass over
    # the logits more.
    slopes: Literal["fixed", "negative", "signed"]

    def counts(self, batch: Batch) -> Sums:
        """Numbers that these rows have by their columns alone, so that they are known before the step; without
        "tokens", the labels that count, which the engine adds itself. The batch is on the CPU.
        """
        ...

    def score(self, log_probs_BT: "Tensor", batch: Batch) -> Scored:
        """Whole samples, all tensors on the device; log_probs_BT: float32 or wider, 0 where no label counts.

        Must not wait for the device, nor look at it for a shape or a branch.
        """
        ...

    def training(self, sums: Sums) -> dict[str, float]:
        """What a step reports beside its loss, by full names."""
        ...

    def evaluation(self, sums: Sums, held_out: "EvaluationSet") -> dict[str, float]:
        """What an evaluation reports, by full names."""
        ...


def counts_of(task: Task, batch: Batch) -> Sums:
    """Of these rows, on the CPU. The batch must have the columns that the task declares."""
    found = {name: (str(column.dtype), tuple(column.shape)) for name, column in batch.others.items()}
    shape_BT = tuple(batch.labels_BT.shape)
    declared = {
        column.name: (f"torch.{column.dtype}", shape_BT if column.per == "token" else shape_BT[:1])
        for column in task.columns
    }
    assert found == declared, f"the batch has {found} beside tokens and labels, and the task reads {declared}"
    return {"tokens": int((batch.labels_BT != IGNORED_LABEL).sum()), **task.counts(batch)}


def loss_of(task: Task, sums: Sums) -> float:
    """The objective's mean. Where nothing counts it is 0, and so is its gradient."""
    return sums[task.objective] / (sums[task.divisor] or 1)


def check_whole_samples(task: Task, config: Config) -> None:
    """Raises ConfigError where a forward pass would part the rows of a sample."""
    rows, of_sample = config.train.micro_batch_size, task.rows_per_sample
    if rows % of_sample:
        below = rows // of_sample * of_sample
        raise ConfigError(
            [
                f"train.micro_batch_size is {rows}, and a sample of this task is {of_sample} rows, which one forward "
                f"pass must hold together: set {f'{below} or ' if below else ''}{below + of_sample}"
            ]
        )
