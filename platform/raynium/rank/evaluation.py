"""What a run is judged by while it trains: the task's sums over held-out rows, and answers to multiple choice.

B: rows of a call, T: tokens of a row.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL
from raynium.data.evaluation import EvaluationSet, counts_of_all, dealt_out
from raynium.data.questions import Question, judged, rows_of
from raynium.data.tokenizer import Tokenizer
from raynium.engines.base import Engine
from raynium.tasks.base import Sums, Task

# The fewest tokens of a row of a question's choice.
LEAST_WIDTH = 16


def rows_of_call(config: Config, world: World) -> int:
    """Of one call of `Engine.evaluate`: a pipeline takes as many micro-batches as a step has; without one a single
    micro-batch needs the least memory.
    """
    return config.train.micro_batch_size * (world.num_micro_batches if world.pipeline > 1 else 1)


class Evaluation:
    """Every rank calls `metrics()` at the same step; all get the same numbers."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        held_out: Mapping[str, EvaluationSet],
        *,
        sets: Mapping[str, EvaluationSet] = {},
        questions: Mapping[str, "QuestionRows"] = {},
    ):
        """By name. held_out: of the stores that the run trains on; sets: of others, each of which is judged alone."""
        self._engine = engine
        self._task = task
        self._documents = dict(held_out)
        self._sets = dict(sets)
        self._questions = dict(questions)

    def metrics(self, tell: Callable[[int, int], None]) -> dict[str, float]:
        """Over the documents of all stores; of a mixture, and of sets, those of each store, too (`eval/<store>/loss`).

        tell: is given the batches done and in all, before each.
        """
        held_out = self._documents | self._sets
        total, alone, done = Sums(), dict[str, float](), 0
        num_batches = sum(len(each.batches) for each in (*held_out.values(), *self._questions.values()))
        for store, of_store in held_out.items():
            sums = Sums()
            for batch in of_store.batches:
                tell(done, num_batches)
                _add(sums, self._engine.evaluate(batch))
                done += 1
            if store in self._documents:
                _add(total, sums)
            if store in self._sets or len(self._documents) > 1:
                for name, value in self._task.evaluation(sums, of_store).items():
                    alone[f"eval/{store}/{name.removeprefix('eval/')}"] = value
        for name, questions in self._questions.items():
            scores_R = questions.empty_scores()
            for batch, begin in zip(questions.batches, questions.begins, strict=True):
                tell(done, num_batches)
                scores_B = self._engine.row_log_probs(batch)
                scores_R[begin : begin + len(scores_B)] = scores_B
                done += 1
            found = questions.judged(self._engine.sum_over_ranks(scores_R))
            alone |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
        return self._task.evaluation(total, counts_of_all([*self._documents.values()])) | alone


class QuestionRows:
    """The choices of questions as one data rank's batches, dealt out as `evaluation_set` deals documents' rows.

    All rows of a file have one length, the least power of two that holds the longest: one graph where graphs are
    compiled. begins: of each batch, its first row's place among all.
    """

    def __init__(
        self,
        questions: list[Question],
        tokenizer: Tokenizer,
        config: Config,
        *,
        batch_size: int,
        data_rank: int,
        data_size: int,
    ):
        self._asked = questions
        rows = rows_of(questions, tokenizer, seq_len=config.data.seq_len)
        self._num_rows = len(rows)
        longest = max(len(row.tokens) - 1 for row in rows)
        width = max(LEAST_WIDTH, 1 << (longest - 1).bit_length())
        # Sequence parallelism splits a row's tokens.
        if width > config.data.seq_len or width % config.parallel.tensor:
            width = config.data.seq_len
        tokens_RT = np.full((len(rows), width), tokenizer.end_of_document_id)
        labels_RT = np.full_like(tokens_RT, IGNORED_LABEL)
        for number, row in enumerate(rows):
            end = len(row.tokens) - 1
            tokens_RT[number, :end] = row.tokens[:-1]
            labels_RT[number, end - row.num_labels : end] = row.tokens[-row.num_labels :]
        self.batches, self.begins, self._num_places = dealt_out(
            {"tokens": tokens_RT, "labels": labels_RT},
            filler=tokenizer.end_of_document_id,
            batch_size=batch_size,
            data_rank=data_rank,
            data_size=data_size,
        )

    def empty_scores(self) -> torch.Tensor:
        """float32, one for each row of all ranks."""
        return torch.zeros(self._num_places)

    def judged(self, scores_R: torch.Tensor) -> dict[str, float]:
        """Of the scores of all ranks."""
        return judged(self._asked, scores_R[: self._num_rows].tolist())


def _add(total: Sums, more: Sums) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value
