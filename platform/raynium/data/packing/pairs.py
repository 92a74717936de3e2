"""Pairs of answers as batches: rows alternate, chosen and rejected, each a whole document, and no batch parts a pair.

What a task asks for by the names of its columns is made here: "answer" and "nats_weight", see `tasks/preferences.py`,
Orpo. S: pairs, R: rows, T: `data.seq_len`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raynium.data.batch import IGNORED_LABEL
from raynium.data.order import Samples
from raynium.data.packing.rows import PackedRows

ROWS_PER_PAIR = 2


class PairRows:
    """The training pairs of one store. See `rows.Rows`."""

    rows_per_sample = ROWS_PER_PAIR

    def __init__(self, rows: PackedRows, *, with_answers: bool = False):
        """rows: one document each, in whole pairs. with_answers: chosen rows have their prompts as labels, too, and a
        column "answer" says what is none of a prompt.
        """
        self._rows, self._with_answers = rows, with_answers
        self.index = rows.index

    def __len__(self) -> int:
        return len(self._rows) // ROWS_PER_PAIR

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        columns = self._rows.read(_rows_of(rows), unmasked=self._with_answers)
        # A row is one document and what fills it up behind, which no token of it sees.
        del columns["documents"]
        return with_answer_column(columns, columns.pop("learned")) if self._with_answers else columns

    def span(self, first: int, end: int) -> tuple[int, int]:
        return self._rows.span(ROWS_PER_PAIR * first, ROWS_PER_PAIR * end)

    def chosen_tokens(self) -> np.ndarray:
        """int64 [S]: labels of each chosen row, its prompt among them."""
        return self._rows.lengths()[::ROWS_PER_PAIR]


class ReferencedRows:
    """Pairs with the log-probabilities that a reference gives each row's labels, as the column "reference"."""

    rows_per_sample = ROWS_PER_PAIR

    def __init__(self, rows: PairRows, reference_R: np.ndarray):
        """reference_R: float32, of all rows."""
        assert len(reference_R) == ROWS_PER_PAIR * len(rows)
        self._rows, self._reference_R = rows, reference_R

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {**self._rows.read(rows), "reference": self._reference_R[_rows_of(rows)]}

    def span(self, first: int, end: int) -> tuple[int, int]:
        return self._rows.span(first, end)


def _rows_of(pairs: np.ndarray) -> np.ndarray:
    return (ROWS_PER_PAIR * pairs[:, None] + np.arange(ROWS_PER_PAIR)).ravel()


def with_answer_column(columns: Mapping[str, np.ndarray], learned_RT: np.ndarray) -> dict[str, np.ndarray]:
    """columns: "tokens", and "labels" that are all tokens of a row's document. learned_RT: which are of an answer."""
    labels_RT = columns["labels"].copy()
    rejected = labels_RT[1::ROWS_PER_PAIR]
    rejected[~learned_RT[1::ROWS_PER_PAIR]] = IGNORED_LABEL
    return {**columns, "labels": labels_RT, "answer": learned_RT.astype(np.float32)}


def nats_weights_of_step(rows: Sequence[PairRows], *, data_size: int) -> Callable[[Samples], dict[str, np.ndarray]]:
    """The column "nats_weight" of this rank's rows, float32 [R / data_size], by the samples of all ranks: of chosen
    rows the pairs of the step over their tokens in it; of rejected rows 0.

    rows: of each store.
    """
    chosen_tokens = [each.chosen_tokens() for each in rows]

    def of_step(samples: Samples) -> dict[str, np.ndarray]:
        pairs = len(samples.rows)
        tokens = sum(
            int(chosen_tokens[store][samples.rows[samples.stores == store]].sum()) for store in range(len(rows))
        )
        return {"nats_weight": np.tile(np.array([pairs / tokens, 0.0], np.float32), pairs // data_size)}

    return of_step
