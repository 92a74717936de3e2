"""evaluate.sets and evaluate.tasks: what is refused before a run starts, files in S3, and every layout's scores."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_native_engine import QWEN3, config, forker, run
from tiny import job_text, publish

from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.data.judges import check_judges, keep_judges, kept_questions, open_sets
from raynium.data.questions import parse
from raynium.data.store import open_store
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError
from raynium.storage.store import Store

__all__ = ["forker"]

QUESTIONS = "\n".join(
    json.dumps({"context": f"{number} and", "choices": ["one", " two", "three"], "answer": number % 3})
    for number in range(5)
)


def judged_by(**evaluate: Any) -> Config:
    return parse_config(job_text({f"evaluate.{name}": value for name, value in evaluate.items()}))


def test_a_set_that_is_no_store_or_none_of_this_run_is_refused(document_folder: Path, tmp_path: Path) -> None:
    tokenizer = open_store(document_folder).tokenizer()
    nothing = judged_by(sets=[str(tmp_path)])
    with pytest.raises(
        DataError, match=r"evaluate.sets names '.*', which is no document store: build it with `raynium"
    ):
        check_judges(nothing)
    good = judged_by(sets=[str(document_folder)])
    check_judges(good)
    keep_judges(good, Store(tmp_path / "run"), tokenizer)
    other = Tokenizer.train(["something else " * 20], vocab_size=300)
    with pytest.raises(DataError, match=r"has another tokenizer: build it from that text with the run's tokenizer and"):
        keep_judges(good, Store(tmp_path / "run"), other)


@pytest.mark.s3
def test_questions_and_sets_may_lie_in_s3(
    document_folder: Path, tmp_path: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.create_bucket("judges")
    Store(f"{bucket}/asked").replace("made-up.v1.jsonl", QUESTIONS.encode())
    publish(document_folder, f"{bucket}/books")
    place = f"{bucket}/asked/made-up.v1.jsonl"
    found = judged_by(sets=[f"{bucket}/books"], tasks=[place], max_questions=3)
    store = Store(tmp_path / "run")
    check_judges(found)
    keep_judges(found, store, open_store(document_folder).tokenizer())
    # Ranks read the copy in the run's store.
    Store(f"{bucket}/asked").delete("made-up.v1.jsonl")
    assert kept_questions(found, store) == {"made-up.v1": parse(QUESTIONS.encode(), place, most=3)}
    [(name, opened)] = open_sets(found).items()
    own = open_store(document_folder)
    assert name == "books" and opened.heldout_documents(None) == own.heldout_documents(None)
    [first] = opened.heldout_documents(1)
    read = [each.heldout_stream().read(first.offset, first.num_tokens).tolist() for each in (opened, own)]
    assert read[0] == read[1]
    with pytest.raises(DataError, match=r"the questions s3://.*/none\.jsonl cannot be read: .*; give a \.jsonl file"):
        check_judges(judged_by(tasks=[f"{bucket}/none.jsonl"]))


def test_every_layout_scores_the_choices_as_one_rank_does(tmp_path: Path, forker: subprocess.Popen[str]) -> None:
    """Over several calls, the last of which is not full."""
    model: dict[str, str | int] = QWEN3 | {"vocab_size": 320}
    alone = run(forker, tmp_path / "one", config(model=model), last_step=0, questions=QUESTIONS).asked[0]
    assert alone is not None and len(alone[0]) == 15 and alone[0].unique().numel() == 15
    for name, layout in {"fsdp 2": {"ranks": 2}, "tp 2": {"ranks": 2, "tensor": 2}}.items():
        made = config(model=model, **layout)
        for of_rank in run(forker, tmp_path / name, made, last_step=0, questions=QUESTIONS).asked:
            assert of_rank is not None
            assert of_rank[0].tolist() == pytest.approx(alone[0].tolist(), rel=1e-5), name
            for metric in ("eval/q/acc", "eval/q/acc_norm"):
                assert of_rank[1][metric] == alone[1][metric], name
