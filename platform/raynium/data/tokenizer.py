"""Byte-level BPE: text to token ids and back without loss, trained here or read from a tokenizer.json.

Which token ends a document, tokenizer.json does not say. The files beside it do: see `_STATEMENTS`.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from raynium.config.plain_file import read_plain
from raynium.data.records.template import ReadBeside
from raynium.errors import DataError, StoreError, some
from raynium.storage.backend import KeyMissing
from raynium.storage.local_files import look
from raynium.storage.store import Store

TOKENIZER_NAME = "tokenizer.json"
# Beside the tokenizer that a run keeps.
END_NAME = "end-of-document.json"
END_OF_DOCUMENT = "<|endoftext|>"
# The same token in vocabularies trained elsewhere: ours, GPT-2's and Qwen's, then Llama 3's, then Llama 2's.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>")
# What names the end of a document in a tokenizer's folder: a token or an id, or several. A document store and a run
# know theirs; of the ends that Hugging Face's files name, one that is known to stand between documents comes before one
# that may only end an answer.
_OWN_STATEMENTS = (("manifest.json", "end_of_document_id"), (END_NAME, "token"))
_STATEMENTS = (
    ("tokenizer_config.json", "eos_token"),
    ("config.json", "eos_token_id"),
    ("generation_config.json", "eos_token_id"),
)
# The most bytes of a tokenizer.json; the largest in use have about 35 MB.
MAX_FILE_BYTES = 256 * 2**20
# Every byte, and the end of a document.
SMALLEST_VOCAB_SIZE = 256 + 1

# Llama 3's rule for what a token may not cross, without its English contractions. Measured on the standard library at
# 4,096 tokens: 3.40 bytes per token, against 3.27 with GPT-2's rule.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


# Training a vocabulary takes time by the square of a word's length: one unbroken megabyte (a protein, a dump in base
# 26, a line of dashes) would take an hour. Longer runs of one kind of character are cut, for training only.
LONGEST_WORD = 256
_LONG_WORD = re.compile("|".join(f"{kind}{{{LONGEST_WORD}}}" for kind in (r"[^\W\d_]", r"\s", r"(?:[^\w\s]|_)")))


class Tokenizer:
    """A tokenizer and the file it came from. Text that spells a special token stays text: it never becomes the token.

    sha256: hash of the file as canonical JSON (sorted keys, no spaces), so that formatting does not matter; without
    what the file adds to a text or cuts off it, which training never does and an export says anew. sha256s: this one,
    and that of the whole, which older document stores name.
    vocab_size: one more than the largest token id.
    end_of_document, end_of_document_id: the token that separates documents in the training stream.
    """

    def __init__(
        self,
        file_text: str,
        described_as: str,
        *,
        end_of_document: str | int | None = None,
        ends: Sequence[str | int] = (),
    ):
        """file_text: content of a tokenizer.json; described_as: names it in errors.

        end_of_document: the token that ends a document, or its id. None: the first of `ends` that the vocabulary has
        and that is known to end documents, else the first that it has, else one of END_OF_DOCUMENT_NAMES.

        Raises DataError if it is no tokenizer.json, or has no such token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file_text)
        except Exception as error:
            # The library raises bare Exception for everything.
            raise DataError(f"{described_as} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        candidates = (
            [end_of_document]
            if end_of_document is not None
            else [*sorted(ends, key=lambda end: self._name(end) not in END_OF_DOCUMENT_NAMES), *END_OF_DOCUMENT_NAMES]
        )
        known = [name for name in map(self._name, candidates) if name is not None]
        end_id = self._tokenizer.token_to_id(known[0]) if known else None
        if end_id is None:
            raise DataError(self._no_end(described_as, end_of_document))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document must not be able to end itself by spelling the token.
        self._tokenizer.encode_special_tokens = True
        self.file_text = file_text
        self.end_of_document = known[0]
        self.end_of_document_id: int = end_id
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        unused = {"post_processor": None, "truncation": None, "padding": None}
        whole = json.loads(file_text)
        self.sha256s = [
            hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
            for fields in (whole | unused, whole)
        ]
        self.sha256 = self.sha256s[0]

    @classmethod
    def load(cls, path: str | Path, *, end_of_document: str | None = None) -> Self:
        """Read a tokenizer.json, or that of a folder, from a path or a URL, and what the files beside it say of the end
        of a document.

        end_of_document: that token, where the user names it. Raises DataError if the file is missing, damaged, or
        nothing says how a document ends.
        """
        described_as = f"tokenizer {str(path)!r}"
        try:
            read, name = beside(path)
            content = read(name)
            if content is None:
                missing = f"it is a folder without a {name}" if name != Path(path).name else "there is no such file"
                raise DataError(f"{described_as} cannot be read: {missing}; give the path of a tokenizer.json")
            return cls._of(content.decode(), read, described_as, end_of_document)
        except (OSError, UnicodeDecodeError, StoreError) as error:
            raise DataError(f"{described_as} cannot be read: {error}; give the path of a tokenizer.json") from error

    @classmethod
    def kept(cls, store: Store) -> Self:
        """The tokenizer that the run at `store` keeps. Raises KeyMissing, DataError."""
        return cls._of(store.read(TOKENIZER_NAME).decode(), reader(store), store.uri(TOKENIZER_NAME), None)

    def keep(self, store: Store) -> None:
        """In the run at `store`, so that it can be sampled without the data."""
        store.replace(END_NAME, json.dumps({"token": self.end_of_document}).encode())
        store.replace(TOKENIZER_NAME, self.file_text.encode())

    @classmethod
    def _of(cls, file_text: str, read: ReadBeside, described_as: str, end_of_document: str | None) -> Self:
        if end_of_document is None and (own := _ends(read, _OWN_STATEMENTS)):
            return cls(file_text, described_as, end_of_document=own[0])
        return cls(file_text, described_as, end_of_document=end_of_document, ends=_ends(read, _STATEMENTS))

    def _name(self, token: str | int) -> str | None:
        """Of a token of the vocabulary, or of its id; None if there is none."""
        if isinstance(token, int):
            return self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        return token if self._tokenizer.token_to_id(token) is not None else None

    def _no_end(self, described_as: str, asked_for: str | int | None) -> str:
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = some([repr(token.content) for token in added if token.special]) or "none"
        if asked_for is not None:
            return (
                f"data.end_of_document = {asked_for!r}: {described_as} has no such token; set it to the one that ended "
                f"documents when the model was trained. Its special tokens are {special}"
            )
        stated = ", ".join(f"{name} ({key})" for name, key in _STATEMENTS)
        return (
            f"{described_as}: nothing says which token ends a document. It has none of "
            f"{', '.join(END_OF_DOCUMENT_NAMES)}, and beside it no {stated} names one that it has. Set "
            f"data.end_of_document to the token that ended documents when the model was trained, or copy those files "
            f"from where the tokenizer came from. Its special tokens are {special}"
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = ()) -> Self:
        """A byte-level BPE learned from `texts`; the same texts in the same order give the same file, byte for byte.

        special_tokens: beside that which ends a document; what chat templates mark turns with.
        The result has fewer than `vocab_size` tokens when the texts hold too few pairs to merge.
        """
        check_vocab_size(vocab_size)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT, *special_tokens],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_without_long_words(texts), trainer)
        return cls(tokenizer.to_str(pretty=True), "the trained tokenizer")

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, int64 [tokens], without any special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [tokens] each, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        # By way of an array of C's integers: numpy itself takes twice as long over a list.
        return [np.frombuffer(array("I", encoding.ids), np.uint32).astype(np.int64) for encoding in encodings]

    def encode_markup(self, texts: Sequence[str], *, markup: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text the token ids, int64 [n], and the [begin, end) of the characters of each, int64 [n, 2].

        markup: whether special tokens that a text spells become them, as they must in what a chat template rendered.
        """
        tokenizer = self._reading_markup if markup else self._tokenizer
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(each.ids, np.int64), np.array(each.offsets, np.int64).reshape(-1, 2)) for each in encodings]

    @cached_property
    def _reading_markup(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self.file_text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text that these ids stand for; bytes that are no UTF-8 (a sample cut mid-character) become U+FFFD."""
        return self._tokenizer.decode([int(token_id) for token_id in token_ids], skip_special_tokens=False)


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each cut within every word that is longer than LONGEST_WORD."""
    for text in texts:
        begin = 0
        for word in _LONG_WORD.finditer(text):
            yield text[begin : word.end()]
            begin = word.end()
        yield text[begin:]


def check_vocab_size(vocab_size: int) -> None:
    """Raises DataError for a vocabulary that cannot be trained."""
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise DataError(
            f"vocab_size = {vocab_size}: a byte-level vocabulary has at least {SMALLEST_VOCAB_SIZE} tokens "
            f"(256 bytes and {END_OF_DOCUMENT}); set model.vocab_size to {SMALLEST_VOCAB_SIZE} or more"
        )


def _ends(read: ReadBeside, statements: Iterable[tuple[str, str]]) -> list[str | int]:
    """The tokens and ids that these files name."""
    return [end for name, key in statements for end in _tokens(_field(read(name), key))]


def _field(content: bytes | None, key: str) -> Any:
    """None where the file is missing, is no JSON object, or lacks the key: then it says nothing."""
    try:
        fields = json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None
    return fields.get(key) if isinstance(fields, dict) else None


def _tokens(value: Any) -> Iterator[str | int]:
    """Those in any of the forms that Hugging Face's files have: a token, {"content": a token}, an id, a list of ids."""
    if isinstance(value, dict):
        value = value.get("content")
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, (str, int)) and not isinstance(each, bool):
            yield each


def beside(path: str | Path) -> tuple[ReadBeside, str]:
    """What reads files of the folder of a tokenizer.json, given by its path or URL or by that of its folder, and the
    name of its file there.
    """
    plain = str(path).removeprefix("file://").rstrip("/")
    if "://" in plain:
        folder, _, name = plain.rpartition("/") if plain.endswith(".json") else (plain, "", TOKENIZER_NAME)
        return reader(Store(folder)), name
    local = Path(plain)
    folder, name = (local, TOKENIZER_NAME) if look(local.is_dir) else (local.parent, local.name)
    return (lambda name: _read_beside(folder / name)), name


def reader(store: Store) -> ReadBeside:
    """Of a run, or of a folder that a store is for."""

    def read(name: str) -> bytes | None:
        try:
            return store.read(name, max_bytes=MAX_FILE_BYTES)
        except KeyMissing:
            return None

    return read


def _read_beside(path: Path) -> bytes | None:
    try:
        return read_plain(path, max_bytes=MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
