"""Tokenising one split: what gives no tokens, what would end a document in its middle, and a disk that is full."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from raynium.config.schema import DataSection
from raynium.data.build import tokenise
from raynium.data.build.fit import refuse_end_in_text
from raynium.data.build.prepare import check_data
from raynium.data.build.store_build import build_from_recipe
from raynium.data.manifest import Recipe, StoreManifest
from raynium.data.runner import in_this_process
from raynium.data.store import open_store
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError
from raynium.launch.data.build import build_data


def build(folder: Path, texts: list[str], tokenizer: Tokenizer, **how: Any) -> StoreManifest:
    (folder / "source").mkdir()
    (folder / "source/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = Recipe(sources=[str(folder / "source")], text_field="text", heldout_fraction=0.3, dedup="none")
    return build_from_recipe(folder / "store", recipe, tokenizer, runner=in_this_process, tell=print, **how)


def words() -> tokenizers.Tokenizer:
    """A token a word, also of `</s>` where a space stands on both sides; and nothing of spaces alone."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "say": 2, "hi": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["</s>", "<end>"])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), *letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["</s>", "<end>"])
    return tokenizer


# ---- no tokens -------------------------------------------------------------------------------------------------------


def test_a_document_of_which_no_token_comes_is_left_out_and_counted(tmp_path: Path):
    tokenizer = Tokenizer(words().to_str(), "words", end_of_document="<end>")
    texts = [text for number in range(40) for text in ("say hi " * (number + 1), " " * 4)]
    manifest = build(tmp_path, texts, tokenizer)
    assert [(group.reason, group.number, group.num_bytes) for group in manifest.left_out] == [("no tokens", 40, 160)]
    assert manifest.train.documents + manifest.heldout.documents == 40 and manifest.lengths.least >= 2
    assert all(document.num_tokens for document in open_store(tmp_path / "store").heldout_documents())


def test_a_source_of_which_no_token_comes_is_refused(tmp_path: Path):
    tokenizer = Tokenizer(words().to_str(), "words", end_of_document="<end>")
    with pytest.raises(
        DataError,
        match=r"lose 100 % of its text: 40 of which the tokenizer makes no token .*take a tokenizer that knows",
    ):
        build(tmp_path, [" " * (number + 2) for number in range(40)], tokenizer)


# ---- the end of a document -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [words, unigram])
def test_a_tokenizer_that_makes_its_end_of_text_is_refused(tmp_path: Path, make: Any):
    path = tmp_path / "tokenizer.json"
    path.write_text(make().to_str())
    (tmp_path / "a.txt").write_text("say hi")
    section = DataSection(path=str(tmp_path / "store"), source=str(tmp_path), seq_len=8, tokenizer=str(path))
    with pytest.raises(DataError, match=r"json' makes '</s>' of a text that spells it.* name another token to end"):
        build_data(str(tmp_path / "store"), sources=[str(tmp_path / "a.txt")], tokenizer=str(path), tell=print)
    with pytest.raises(DataError, match=r"json' makes '</s>' of a text that spells it"):
        check_data(section, model_vocab_size=400, tell=print)
    refuse_end_in_text(Tokenizer.load(path, end_of_document="<end>"), str(path))


def test_a_text_that_becomes_the_end_of_a_document_is_refused(tmp_path: Path):
    """Whatever its spelling: here by way of the token for unknown words, which no check of one spelling finds."""
    tokenizer = Tokenizer(words().to_str(), "words", end_of_document="<unk>")
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: the tokenizer makes '<unk>', which ends a document, of a part"):
        build(tmp_path, ["say hi"] * 30 + ["say what"] * 10, tokenizer)


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_a_temporary_folder_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The limit of a file's size stands in for that of the disk."""
    small, limits = tmp_path / "small", resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_from_now_on() -> Path:
        small.mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        return small

    monkeypatch.setattr(tokenise, "temporary_parent", full_from_now_on)
    tokenizer = Tokenizer(words().to_str(), "words", end_of_document="<end>")
    try:
        with pytest.raises(DataError, match=r"cannot be written to .*/small/.*: File too large\. Free space .*TMPDIR"):
            build(tmp_path, ["say hi " * 100] * 200, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
