"""Byte-level BPE: text to token ids and back without loss, trained here or read from a tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from raynium.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
# the same token in vocabularies trained elsewhere, the first that exists counts: ours/GPT-2/Qwen, Llama 3, Llama 2
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>")
SMALLEST_VOCAB_SIZE = 256 + 1  # every byte, and the end of a document

# Llama 3's rule for what a token may not cross, without its English contractions. Measured on the standard library at
# 4,096 tokens: 3.40 bytes per token, against 3.27 with GPT-2's rule.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


class Tokenizer:
    """A tokenizer and the file it came from. Text that spells a special token stays text: it never becomes the token.

    sha256: hash of the file as canonical JSON (sorted keys, no spaces), so that formatting does not matter.
    vocab_size: one more than the largest token id.
    end_of_document_id: the token that separates documents in the training stream.
    """

    def __init__(self, file_text: str, described_as: str):
        """file_text: content of a tokenizer.json; described_as: names it in errors.

        Raises DataError if it is none, or has no end-of-document token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file_text)
        except Exception as error:  # the library raises bare Exception for everything
            raise DataError(f"{described_as} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        end_of_document_ids = [self._tokenizer.token_to_id(name) for name in END_OF_DOCUMENT_NAMES]
        known_ids = [token_id for token_id in end_of_document_ids if token_id is not None]
        if not known_ids:
            raise DataError(
                f"{described_as} has no end-of-document token; add one of {', '.join(END_OF_DOCUMENT_NAMES)} "
                "to its special tokens"
            )
        self._tokenizer.encode_special_tokens = True  # a document must not be able to end itself by spelling the token
        self.file_text = file_text
        self.end_of_document_id: int = known_ids[0]
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        canonical = json.dumps(json.loads(file_text), sort_keys=True, separators=(",", ":"))
        self.sha256 = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer.json. Raises DataError if it is missing, damaged, or without an end-of-document token."""
        try:
            file_text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"tokenizer {str(path)!r} cannot be read: {error}; give the path of a tokenizer.json"
            ) from error
        return cls(file_text, f"tokenizer {str(path)!r}")

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Self:
        """A byte-level BPE learned from `texts`; the same texts in the same order give the same file, byte for byte.

        The result has fewer than `vocab_size` tokens when the texts hold too few pairs to merge.
        """
        if vocab_size < SMALLEST_VOCAB_SIZE:
            raise DataError(
                f"vocab_size = {vocab_size}: a byte-level vocabulary has at least {SMALLEST_VOCAB_SIZE} tokens "
                f"(256 bytes and {END_OF_DOCUMENT}); set model.vocab_size to {SMALLEST_VOCAB_SIZE} or more"
            )
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
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(pretty=True), "the trained tokenizer")

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, int64 [tokens], without any special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [tokens] each, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text that these ids stand for; bytes that are no UTF-8 (a sample cut mid-character) become U+FFFD."""
        return self._tokenizer.decode([int(token_id) for token_id in token_ids], skip_special_tokens=False)
