"""Multiple choice: a file of questions, and what a model's log-likelihoods of their choices say. No torch.

A file is JSON Lines, here or in S3, each line {"context": text, "choices": [texts], "answer": the right choice's number
from 0, or its text}. A choice is scored by the sum of the log-probabilities of its tokens after the context, a space
between the two where neither brings one. The definitions are those of lm-evaluation-harness: `acc` is the share of the
questions whose right choice has the highest score; `acc_norm`, the highest score for each byte of its UTF-8 text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError, StoreError
from raynium.storage.store import read_place

# Of a file of questions.
MAX_BYTES = 2**28


@dataclass(frozen=True)
class Question:
    """answer: the place of the right choice. where: file and line, for messages."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str


class Choice(NamedTuple):
    """One row: int64 tokens, the first of which begins every text; the last `num_labels` are those of the choice."""

    tokens: np.ndarray
    num_labels: int
    where: str


def read_file(place: str) -> bytes:
    """A file of questions, by its path or URL. DataError where it cannot be read."""
    try:
        return read_place(place, max_bytes=MAX_BYTES)
    except (OSError, StoreError) as error:
        raise DataError(f"the questions {place} cannot be read: {error}; give a .jsonl file") from error


def parse(content: bytes, place: str, *, most: int | None = None) -> list[Question]:
    """The first `most` questions of a file, or all. DataError with file and line for one that is none."""
    questions = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip() or len(questions) == most:
            continue
        questions.append(_question(line, f"{place}:{number}"))
    if not questions:
        raise DataError(f"{place} holds no question: each line is one, as {{context, choices, answer}}")
    return questions


def rows_of(questions: Sequence[Question], tokenizer: Tokenizer, *, seq_len: int) -> list[Choice]:
    """A row for each choice of each question. DataError for one that is longer than `seq_len`, or adds no token."""
    pairs = [(question, *_joined(question.context, choice)) for question in questions for choice in question.choices]
    contexts = tokenizer.encode_batch([context for _, context, _ in pairs])
    wholes = tokenizer.encode_batch([context + choice for _, context, choice in pairs])
    rows = []
    for (question, _, choice), context, whole in zip(pairs, contexts, wholes, strict=True):
        # As in lm-evaluation-harness: where the two grow together, so many tokens at the end are the choice's.
        num_labels = len(whole) - len(context)
        if num_labels < 1:
            raise DataError(f"{question.where}: the choice {choice.strip()!r} adds no token to the context: mend one")
        if len(whole) > seq_len:
            raise DataError(
                f"{question.where}: context and choice have {len(whole):,} tokens, and the model is given "
                f"{seq_len:,} (data.seq_len; by command, model.max_seq_len): leave the question out, or shorten it"
            )
        tokens = np.concatenate([[tokenizer.end_of_document_id], whole])
        rows.append(Choice(tokens, num_labels, question.where))
    return rows


def judged(questions: Sequence[Question], scores: Iterable[float]) -> dict[str, float]:
    """acc and acc_norm, of scores in the order of `rows_of`; NaN where a score is no number."""
    found = np.fromiter(scores, np.float64)
    if not np.isfinite(found).all():
        return {"acc": float("nan"), "acc_norm": float("nan")}
    right, right_normed, begin = 0, 0, 0
    for question in questions:
        own = found[begin : begin + len(question.choices)]
        num_bytes = np.array([len(choice.encode()) for choice in question.choices])
        right += int(own.argmax()) == question.answer
        right_normed += int((own / num_bytes).argmax()) == question.answer
        begin += len(question.choices)
    assert begin == len(found)
    return {"acc": right / len(questions), "acc_norm": right_normed / len(questions)}


def _joined(context: str, choice: str) -> tuple[str, str]:
    """What is given and what is scored: spaces at the end of the context belong to the choice, as tokens have them."""
    apart = "" if not context or context[-1].isspace() or choice[0].isspace() else " "
    given = context.rstrip()
    return given, context[len(given) :] + apart + choice


def _question(line: bytes, where: str) -> Question:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({error}): each line is a question, {{context, choices, answer}}"
        ) from error
    if not isinstance(fields, Mapping) or not {"context", "choices", "answer"} <= fields.keys():
        raise DataError(f"{where}: a question is an object with context, choices and answer")
    context, choices, answer = fields["context"], fields["choices"], fields["answer"]
    if not isinstance(context, str):
        raise DataError(f"{where}: context is {context!r:.60}: it must be a text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{where}: choices is {choices!r:.60}: it must be a list of texts, none of them empty")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(f"{where}: choices is {choices!r:.60}: there must be two or more, all different")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: the answer {answer!r:.60} is none of the choices: give the text of one, or its number, "
            f"0 to {len(choices) - 1}"
        )
    return Question(context, tuple(choices), answer, where)
