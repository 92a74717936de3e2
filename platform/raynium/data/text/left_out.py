"""What of a source is no training text, counted by reason: nothing is left out in silence."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from raynium.errors import spelled

Reason = Literal[
    "not utf-8",
    "utf-16",
    "empty",
    "null",
    "too long",
    "unread kind",
    "beside text",
    "other kind",
    "linked folder",
    "no file",
    "hidden",
    "duplicate",
    "no tokens",
]
# In words, after the number of them.
_WORDS: dict[Reason, str] = {
    "not utf-8": "not UTF-8",
    "utf-16": "UTF-16, not UTF-8",
    "empty": "empty",
    "null": "whose text is null",
    "too long": "longer than a document may be",
    "unread kind": "{kind}, which is not read",
    "beside text": "{kind} beside files of text, read only where a glob names it",
    "other kind": "of other kinds",
    "linked folder": "linked folders, which are not followed",
    "no file": "pipes, sockets, devices or broken links",
    "hidden": "hidden",
    "duplicate": "equal to an earlier document",
    "no tokens": "of which the tokenizer makes no token",
}
# Text that a user will miss. Of the rest nobody knows whether it is text, or it holds none.
_TEXT: frozenset[Reason] = frozenset(
    {"not utf-8", "utf-16", "null", "too long", "unread kind", "beside text", "no tokens"}
)


class LeftOut(NamedTuple):
    """A file, a line or a folder of a source that is not a document.

    name: as a document's. kind: the ending of a file that is not read.
    """

    name: str
    reason: Reason
    num_bytes: int = 0
    kind: str = ""


class LeftOutGroup(BaseModel):
    """All that was left out for one reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reason: Reason
    kind: Annotated[str, Field(max_length=40)]
    number: Annotated[int, Field(ge=1, lt=2**60)]
    num_bytes: Annotated[int, Field(ge=0, lt=2**60)]
    # Its name, in an order that does not depend on the machine.
    first: str

    @classmethod
    def of(cls, item: LeftOut) -> Self:
        # Linux allows names that JSON cannot hold.
        first = spelled(item.name)
        return cls(reason=item.reason, kind=item.kind, number=1, num_bytes=item.num_bytes, first=first)

    def plus(self, item: "LeftOutGroup") -> "LeftOutGroup":
        """With another group of the same reason, which comes after this one in the source."""
        more = {"number": self.number + item.number, "num_bytes": self.num_bytes + item.num_bytes}
        return self.model_copy(update=more)

    def in_words(self) -> str:
        # A manifest may have been written elsewhere.
        words = _WORDS[self.reason].format(kind=spelled(self.kind))
        return f"{self.number:,} {words} (first: {spelled(self.first)})"


class Tally:
    """Counts what is left out by reason, and adds up with the tally of another part of the source."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Reason, str], LeftOutGroup] = {}

    def add(self, item: LeftOut | LeftOutGroup) -> None:
        group = item if isinstance(item, LeftOutGroup) else LeftOutGroup.of(item)
        key = (group.reason, group.kind)
        self._groups[key] = self._groups[key].plus(group) if key in self._groups else group

    def groups(self) -> list[LeftOutGroup]:
        """The largest loss of text first."""
        return sorted(self._groups.values(), key=lambda each: (-_text_bytes(each), each.reason, each.kind))


def share_left_out(groups: Sequence[LeftOutGroup], *, kept_bytes: int) -> float:
    """Of the bytes of all that seems to be text. kept_bytes: of the documents."""
    lost = sum(map(_text_bytes, groups))
    return lost / (lost + kept_bytes) if lost else 0.0


def left_out_in_words(groups: Sequence[LeftOutGroup], *, kept_bytes: int) -> str:
    """Such as "54 % of its text: 30 not UTF-8 (first: 1.txt), 1 .parquet, which is not read (first: a.parquet)"."""
    share = share_left_out(groups, kept_bytes=kept_bytes)
    percent = f"{100 * share:.0f} %" if share >= 0.01 or not share else "less than 1 %"
    return f"{percent} of its text: {', '.join(group.in_words() for group in groups)}"


def _text_bytes(group: LeftOutGroup) -> int:
    return group.num_bytes if group.reason in _TEXT else 0
