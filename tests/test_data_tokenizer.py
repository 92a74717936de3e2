"""The tokenizer loses nothing, is made the same every time, and knows itself by its hash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from raynium.errors import DataError

pytestmark = pytest.mark.quick

TEXTS = [
    "def main(argument):\n    return argument + 1\n" * 20,
    "class Größe:\n\tpass  # naïve ✓\n" * 20,
    "0123456789 " * 30,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r'0a\u0301\u00a0"))))
def test_round_trip_loses_nothing(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_spells_the_special_token_stays_text(tokenizer: Tokenizer):
    text = f"before{END_OF_DOCUMENT}after {END_OF_DOCUMENT}"
    token_ids = tokenizer.encode(text)
    assert tokenizer.end_of_document_id not in token_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode([tokenizer.end_of_document_id]) == END_OF_DOCUMENT


def test_batches_equal_single_texts(tokenizer: Tokenizer):
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [
        tokenizer.encode(text).tolist() for text in TEXTS
    ]
    assert tokenizer.encode(TEXTS[0]).dtype == "int64"
    assert tokenizer.encode("").tolist() == []
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # it did learn merges


def test_training_gives_the_same_bytes_in_another_process(tokenizer: Tokenizer):
    # the library's hash maps are seeded per process, so one process would not show an order that depends on them
    script = (
        "import sys, json; from raynium.data.tokenizer import Tokenizer;"
        "sys.stdout.write(Tokenizer.train(json.load(sys.stdin), vocab_size=400).file_text)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert result.stdout == tokenizer.file_text


def test_hash_ignores_formatting_but_nothing_else(tokenizer: Tokenizer, tmp_path: Path):
    fields = json.loads(tokenizer.file_text)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields, indent=7, sort_keys=True))
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
    assert loaded.vocab_size == tokenizer.vocab_size == 313  # the texts have no more pairs to merge
    fields["model"]["merges"].pop()
    path.write_text(json.dumps(fields))
    assert Tokenizer.load(path).sha256 != tokenizer.sha256


def test_another_vocabularys_name_for_the_end_of_a_document_is_known(tokenizer: Tokenizer):
    renamed = Tokenizer(tokenizer.file_text.replace(END_OF_DOCUMENT, "<|end_of_text|>"), "renamed")
    assert renamed.end_of_document_id == tokenizer.end_of_document_id
    assert renamed.end_of_document_id not in renamed.encode("<|end_of_text|>")


def test_bad_files_are_refused(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json' cannot be read: .*No such file"):
        Tokenizer.load(path)
    path.write_text(tokenizer.file_text[:1000])
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(path)
    path.write_text(tokenizer.file_text.replace(END_OF_DOCUMENT, "<pad>"))
    with pytest.raises(DataError, match=r"no end-of-document token; add one of <\|endoftext\|>"):
        Tokenizer.load(path)


def test_vocabulary_smaller_than_the_bytes_is_refused():
    assert Tokenizer.train(["ab"], vocab_size=257).vocab_size == 257
    with pytest.raises(DataError, match=r"vocab_size = 256: .* at least 257"):
        Tokenizer.train(["ab"], vocab_size=256)
