"""What a record is, and what of it is learned: from the values of its fields to texts with their labels marked.

A format asks for fields, which a source has under the same names, or as `data.fields` says, and makes of each record
one document or several. No torch and no tokenizer here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Rendered(NamedTuple):
    """One document. labels: [begin, end) of the characters that are learned, rising and apart; a token is a label if
    one of its characters is. markup: whether special tokens that the text spells become them, as in a chat template's
    text; otherwise they stay text. ends: whether the end-of-document token follows, as a label.
    """

    text: str
    labels: tuple[tuple[int, int], ...]
    markup: bool
    ends: bool


class FieldOf(NamedTuple):
    """A field that a format asks for. One that is not required may be missing."""

    name: str
    required: bool


class RecordFormat(Protocol):
    """Pure, and small when pickled: builds run it on any node.

    sequences: documents of each record, which lie one after the other in the store.
    """

    sequences: int

    @property
    def fields(self) -> tuple[FieldOf, ...]: ...

    def render(self, record: Mapping[str, Any]) -> list[Rendered]:
        """record: values by the names of `fields`, without those that are null. Raises RecordError."""
        ...


class RecordError(Exception):
    """A record that cannot be learned from; its text says why, and what to do."""


class Completions:
    """A text, and another that follows it and is learned, with the end of the document."""

    sequences = 1
    fields = (FieldOf("prompt", required=True), FieldOf("completion", required=True))

    def render(self, record: Mapping[str, Any]) -> list[Rendered]:
        prompt, completion = (text_of(record, name) for name in ("prompt", "completion"))
        whole = prompt + completion
        return [Rendered(whole, ((len(prompt), len(whole)),), markup=False, ends=True)]


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Raises RecordError for what is no text."""
    value = record[name]
    if not isinstance(value, str):
        raise RecordError(f"{name} is {type(value).__name__}, not a text")
    return value
