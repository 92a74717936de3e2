"""Multiple choice: files of questions, and what a model makes of them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Ended, run_command
from tiny import job_text

from raynium import find_run
from raynium.checkpoint.catalog import choose_checkpoint
from raynium.config.judged import name_of_place
from raynium.config.load import parse_config
from raynium.convert.export import export_checkpoint
from raynium.data.questions import Question, judged, parse, read_file, rows_of
from raynium.data.tokenizer import Tokenizer
from raynium.errors import ConfigError, DataError
from raynium.generation import choices
from raynium.generation.choices import evaluate_questions
from raynium.generation.sampler import open_sampler
from raynium.models.decoder import Decoder
from raynium.run.record import claim
from raynium.storage.store import Store
from raynium.tracking.runs import open_run

QUESTIONS: list[dict[str, Any]] = [
    {"context": "def main(", "choices": ["arguments", "return", "arguments): return 1"], "answer": 0},
    {"context": "Two and two are ", "choices": ["four", "five"], "answer": "five"},
    {"context": "", "choices": ["def", "return arguments", "main", "naïve 🎉"], "answer": 3},
    {"context": "return", "choices": [" main", "\nmain", ":"], "answer": 1},
]


@pytest.fixture
def store(save_run: Callable[..., Store]) -> Store:
    config = parse_config(job_text({"model.vocab_size": 320, "model.max_seq_len": 64, "data.seq_len": 16}))
    torch.manual_seed(0)
    model = Decoder(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return save_run(model, config)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "made-up.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return path


def test_scores_are_those_of_a_plain_computation_with_transformers(
    transformers: Any, store: Store, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = open_sampler(store.url)
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # What lm-evaluation-harness does of each request: HFLM._encode_pair and _loglikelihood_tokens, and the metrics of
    # its multiple_choice, whose target_delimiter is a space.
    scores, right, right_normed = [], 0, 0
    for fields in QUESTIONS:
        answer = fields["answer"] if isinstance(fields["answer"], int) else fields["choices"].index(fields["answer"])
        of_choices = []
        for choice in fields["choices"]:
            context, continuation = fields["context"], choice
            if context and not context[-1].isspace() and not choice[0].isspace():
                continuation = " " + choice
            spaces = len(context) - len(context.rstrip())
            if spaces:
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            whole = tokenizer(context + continuation).input_ids
            begin = len(tokenizer(context).input_ids)
            with torch.no_grad():
                log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            of_choices.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(begin, len(whole))))
        scores += of_choices
        right += int(np.argmax(of_choices)) == answer
        right_normed += int(np.argmax(np.array(of_choices) / [len(c.encode()) for c in fields["choices"]])) == answer
    questions = parse(file.read_bytes(), str(file))
    ours: list[float] = []
    monkeypatch.setattr(choices, "judged", lambda questions, found: ours.extend(found) or judged(questions, found))
    for batch_bytes in (1, 2**28):
        ours.clear()
        monkeypatch.setattr(choices, "BATCH_BYTES", batch_bytes)
        told: list[int] = []
        found = evaluate_questions(sampler, questions, tell=lambda done, total, told=told: told.append(done))
        assert found == {"acc": right / 4, "acc_norm": right_normed / 4}
        np.testing.assert_allclose(ours, scores, rtol=1e-5)
        assert told == list(range(12 if batch_bytes == 1 else 1))


def test_the_likeliest_choice_is_not_always_that_for_each_byte() -> None:
    questions = [Question("", ("short", "a longer choice"), answer, "f:1") for answer in (0, 1)]
    assert judged(questions, [-5.0, -6.0, -5.0, -6.0]) == {"acc": 0.5, "acc_norm": 0.5}
    assert judged(questions[:1], [-5.0, -6.0]) == {"acc": 1.0, "acc_norm": 0.0}
    # In bytes, and not in characters.
    assert judged([Question("", ("éé", "abc"), 0, "f:1")], [-4.0, -3.1])["acc_norm"] == 1.0
    broken = judged(questions[:1], [float("nan"), -6.0])
    assert np.isnan([*broken.values()]).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"made-up\.jsonl:2 is not JSON \("),
        ("[1]", r"made-up\.jsonl:2: a question is an object with context, choices and answer"),
        ('{"context": "a", "choices": ["b", "c"]}', r"made-up\.jsonl:2: a question is an object with"),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', r":2: context is 1: it must be a text"),
        ('{"context": "a", "choices": "bc", "answer": 0}', r":2: choices is 'bc': it must be a list of texts"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', r":2: choices is \['b', ''\]: it must be a list of"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', r":2: choices is \['b'\]: there must be two or more"),
        ('{"context": "a", "choices": ["b", "b"], "answer": 0}', r":2: choices is \['b', 'b'\]: there must be two"),
        ('{"context": "a", "choices": ["b", "c"], "answer": "d"}', r":2: the answer 'd' is none of the choices: give"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', r":2: the answer 2 is none of .*its number, 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', r":2: the answer True is none of the choices"),
        ('{"context": "a", "choices": ["b", "c"], "answer": -1}', r":2: the answer -1 is none of the choices"),
    ],
)
def test_what_is_no_question_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(f"{json.dumps(QUESTIONS[0])}\n{line}\n".encode(), "/x/made-up.jsonl")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the questions .*none\.jsonl cannot be read: .*; give a \.jsonl file"):
        read_file(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"the questions file:.*none\.jsonl cannot be read: .*does not exist"):
        read_file(f"file://{tmp_path}/none.jsonl")
    with pytest.raises(DataError, match="f holds no question: each line is one"):
        parse(b"\n \n", "f")
    assert [name_of_place(place) for place in ("/a/arc.jsonl", "s3://b/c.d.jsonl", "x")] == ["arc", "c.d", "x"]
    assert len(parse("\n".join(map(json.dumps, QUESTIONS)).encode(), "f", most=2)) == 2


def test_rows_that_do_not_fit_are_refused_with_file_and_line() -> None:
    tokenizer = Tokenizer.train(["abab " * 50], vocab_size=270)
    long = [Question("ab " * 20, ("a", "b"), 0, "f:7")]
    longest = len(rows_of(long, tokenizer, seq_len=64)[0].tokens) - 1
    assert len(rows_of(long, tokenizer, seq_len=longest)) == 2
    with pytest.raises(
        DataError, match=rf"f:7: context and choice have {longest} tokens, and the model is given {longest - 1}"
    ):
        rows_of(long, tokenizer, seq_len=longest - 1)
    # Together they are one token, as the context alone is.
    assert len(tokenizer.encode("aba")) == len(tokenizer.encode("abab")) + 1
    with pytest.raises(DataError, match="f:8: the choice 'b' adds no token to the context: mend one"):
        rows_of([Question("aba", ("b", "x"), 0, "f:8")], _Merging(tokenizer), seq_len=64)


class _Merging:
    """The choice and the context without a space between them, as where a tokenizer drops it."""

    def __init__(self, tokenizer: Tokenizer):
        self.end_of_document_id = tokenizer.end_of_document_id
        self._tokenizer = tokenizer

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return self._tokenizer.encode_batch([text.replace(" ", "") for text in texts])


def test_a_run_is_evaluated_by_command_and_in_python(
    store: Store, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(run_command, monkeypatch=monkeypatch, capsys=capsys)
    root = ("--root", str(tmp_path / "runs"))
    found = find_run("first", tmp_path / "runs").evaluate(file)
    assert found.keys() == {"eval/made-up/acc", "eval/made-up/acc_norm"}
    row = [f"{found[f'eval/made-up/{metric}']:8.4f}" for metric in ("acc", "acc_norm")]
    shown = run("evaluate", "first@4", "--task", str(file), *root).out.splitlines()
    assert shown == ["task          acc  acc_norm", f"made-up  {row[0]}  {row[1]}"]
    assert json.loads(run("evaluate", "first", "--task", str(file), "--json", *root).out) == found
    [first] = parse(file.read_bytes(), "f", most=1)
    limited = json.loads(run("evaluate", "first", "--task", str(file), "--limit", "1", "--json", *root).out)
    assert limited["eval/made-up/acc"] == evaluate_questions(open_sampler(store.url), [first])["acc"]
    ended: Ended = run("evaluate", "first", "--task", str(file), "--task", "/elsewhere/arc.jsonl", *root)
    assert ended.code == 1 and "/elsewhere/arc.jsonl cannot be read" in ended.err
    with pytest.raises(ConfigError, match="two of the files are named made-up, and so would their metrics be: rename"):
        find_run("first", tmp_path / "runs").evaluate(file, file)


def test_an_evaluation_by_command_goes_into_the_runs_page_if_it_is_to(
    store: Store, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(run_command, monkeypatch=monkeypatch, capsys=capsys)
    words = ("evaluate", "first", "--task", str(file), "--root", str(tmp_path / "runs"))
    keeper = claim(store, "first", {"run": {"root": "runs"}, "train": {"steps": 4}})
    without: Ended = run(*words, "--track")
    assert without.code == 2 and "run 'first' has no MLflow page yet: evaluate it without tracking, or" in without.err
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    page = open_run(uri, experiment="raynium", run_name="first", run_id=None, params={}, tags={})
    keeper.update(mlflow_uri=uri, mlflow_run_id=page.run_id, mlflow_experiment_id=page.experiment_id)
    found = find_run("first", tmp_path / "runs")
    assert run(*words).code == 0 and found.metrics("eval/made-up/acc") == []
    assert run(*words, "--track").code == 0
    for metric, value in found.evaluate(file).items():
        [point] = found.metrics(metric)
        assert (point.step, point.value) == (4, value)
