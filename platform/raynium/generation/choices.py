"""Multiple choice by a model in memory: each choice's log-likelihood, in batches. For `raynium evaluate`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from raynium.config.judged import name_of_place
from raynium.data.questions import Choice, Question, judged, parse, read_file, rows_of
from raynium.errors import ConfigError
from raynium.generation.sampler import Sampler, on_threads, threads_for

Tell = Callable[[int, int], None]
# Logits of one batch, in float32, at most; a row alone may have more.
BATCH_BYTES = 2**28


def evaluate_questions(
    sampler: Sampler, questions: Sequence[Question], *, tell: Tell = lambda done, total: None
) -> dict[str, float]:
    """acc and acc_norm. tell: is given the rows done and in all. Raises DataError as `rows_of`."""
    rows = rows_of(questions, sampler.tokenizer, seq_len=sampler.model.config.max_seq_len)
    # Rows of about a length together, the longest first: memory is short at once, or never.
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].tokens))
    scores, done = np.zeros(len(rows)), 0
    with on_threads(threads_for(sampler.model)):
        while done < len(order):
            tell(done, len(rows))
            of_row = len(rows[order[done]].tokens) * sampler.model.config.vocab_size * 4
            places = order[done : done + max(1, BATCH_BYTES // of_row)]
            scores[places] = _log_likelihoods(sampler.model, [rows[place] for place in places])
            done += len(places)
    return judged(questions, scores)


def evaluate_files(
    sampler: Sampler, places: Sequence[str], *, limit: int | None = None, tell: Tell = lambda done, total: None
) -> dict[str, float]:
    """Of files of questions, eval/<name>/acc and /acc_norm. All are read, and refused, before the first is evaluated.

    ConfigError for two files of one name; DataError for one that cannot be used.
    """
    files = {}
    for place in places:
        if (name := name_of_place(place)) in files:
            raise ConfigError([f"two of the files are named {name}, and so would their metrics be: rename one"])
        files[name] = parse(read_file(place), place, most=limit)
    return {
        f"eval/{name}/{metric}": value
        for name, questions in files.items()
        for metric, value in evaluate_questions(sampler, questions, tell=tell).items()
    }


@torch.inference_mode()
def _log_likelihoods(model: torch.nn.Module, rows: Sequence[Choice]) -> list[float]:
    longest = max(len(row.tokens) for row in rows)
    # Filled up on the right: what stands there is seen by nobody before it.
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row.tokens)] = torch.from_numpy(row.tokens)
    logits_BTV = model(tokens_BT[:, :-1])
    found = []
    for row, logits_TV in zip(rows, logits_BTV, strict=True):
        labels_L = torch.from_numpy(row.tokens[-row.num_labels :])
        end = len(row.tokens) - 1
        log_probs_LV = logits_TV[end - row.num_labels : end].float().log_softmax(-1)
        found.append(float(log_probs_LV.gather(1, labels_L[:, None]).sum()))
    return found
