"""The tokenizer loses nothing, is made the same every time, and knows itself by its hash."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.data import tokenizer as tokenizer_module
from raynium.data.tokenizer import END_NAME, END_OF_DOCUMENT, LONGEST_WORD, TOKENIZER_NAME, Tokenizer
from raynium.errors import DataError
from raynium.storage.store import Store

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
    with pytest.raises(DataError, match=r"tokenizer\.json' cannot be read: there is no such file"):
        Tokenizer.load(path)
    path.write_text(tokenizer.file_text[:1000])
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="it is a pipe, and only plain files are read"):
        Tokenizer.load(path)
    for name, problem in (("", "it is a pipe"), ("a\0b", "no file can have this name"), ("/dev/zero", "is a device")):
        with pytest.raises(DataError, match=problem):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(DataError, match="scheme 'https'"):
        Tokenizer.load("https://example.com/tokenizer.json")


# ---- the end of a document -------------------------------------------------------------------------------------------

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture
def deepseek(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A tokenizer.json whose end of document has a name of its own."""
    fields = json.loads(tokenizer.file_text.replace(END_OF_DOCUMENT, BEGIN))
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 400, "content": END})
    fields["model"]["vocab"][END] = 400
    path = tmp_path / TOKENIZER_NAME
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"eos_token": END}),
        ("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": END, "special": True}}),
        ("config.json", {"eos_token_id": 400}),
        ("config.json", {"eos_token_id": [9_999_999, 400, 0]}),
        ("generation_config.json", {"eos_token_id": [400]}),
        ("manifest.json", {"end_of_document_id": 400}),
        (END_NAME, {"token": END}),
    ],
)
def test_the_files_beside_a_tokenizer_say_which_token_ends_a_document(deepseek: Path, name: str, fields: object):
    (deepseek.parent / name).write_text(json.dumps(fields))
    loaded = Tokenizer.load(deepseek)
    assert (loaded.end_of_document, loaded.end_of_document_id) == (END, 400)
    assert 400 not in loaded.encode(f"text with {END} in it")


def test_an_end_that_is_known_to_stand_between_documents_comes_before_one_of_answers(
    tokenizer: Tokenizer, tmp_path: Path
):
    """As in Llama 3's and Qwen 3's chat models, whose eos_token ends a turn."""
    path = tmp_path / TOKENIZER_NAME
    fields = json.loads(tokenizer.file_text)
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 400, "content": "<|im_end|>"})
    fields["model"]["vocab"]["<|im_end|>"] = 400
    path.write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert Tokenizer.load(path).end_of_document == "<|im_end|>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [400, tokenizer.end_of_document_id]}))
    assert Tokenizer.load(path).end_of_document == END_OF_DOCUMENT
    assert Tokenizer.load(path, end_of_document="<|im_end|>").end_of_document_id == 400


def test_an_end_that_nothing_names_is_asked_for_and_never_added(deepseek: Path):
    (deepseek.parent / "tokenizer_config.json").write_text('{"eos_token": null, "bos_token": "x"}')
    (deepseek.parent / "config.json").write_text('{"eos_token_id": [true, -1, 18446744073709551616, 1e3, "</s>"]}')
    (deepseek.parent / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"nothing says which token .*Set data\.end_of_document to the token") as caught:
        Tokenizer.load(deepseek)
    assert BEGIN in str(caught.value) and END in str(caught.value) and "add" not in str(caught.value)
    assert Tokenizer.load(deepseek, end_of_document=END).end_of_document_id == 400
    with pytest.raises(DataError, match=r"data\.end_of_document = '<eos>': .*has no such token.*end▁of▁sentence"):
        Tokenizer.load(deepseek, end_of_document="<eos>")


def test_a_run_keeps_its_tokenizer_with_the_end_of_its_documents(deepseek: Path, tmp_path: Path):
    store = Store(tmp_path / "run")
    Tokenizer.load(deepseek, end_of_document=BEGIN).keep(store)
    for again in (Tokenizer.kept(store), Tokenizer.load(store.uri(TOKENIZER_NAME))):
        assert again.end_of_document == BEGIN and again.file_text == deepseek.read_text()


# ---- long words ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)  # without a cut, the first alone takes most of an hour
@pytest.mark.parametrize("kind", ["ACGT", "-=+*", " \t", "_", "é"])
def test_one_unbroken_megabyte_does_not_stall_training(kind: str):
    text = "".join(random.Random(0).choices(kind, k=1_000_000))
    trained = Tokenizer.train([text, "hello, world"], vocab_size=300)
    assert trained.decode(trained.encode(text[:5000])) == text[:5000]


@given(st.lists(st.text(alphabet="aé1 -\n", max_size=30), max_size=4))
def test_cutting_long_words_loses_no_text_and_cuts_no_short_one(texts: list[str]):
    assert list(tokenizer_module._without_long_words(texts)) == texts
    long = ["".join(part * LONGEST_WORD for part in text) for text in texts]
    cut = list(tokenizer_module._without_long_words(long))
    assert "".join(cut) == "".join(long)
    assert all(len(run.group()) <= LONGEST_WORD for piece in cut for run in re.finditer(r"[aé]+|\s+|-+", piece))


def test_vocabulary_smaller_than_the_bytes_is_refused():
    assert Tokenizer.train(["ab"], vocab_size=257).vocab_size == 257
    with pytest.raises(DataError, match=r"vocab_size = 256: .* at least 257"):
        Tokenizer.train(["ab"], vocab_size=256)
