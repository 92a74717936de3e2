"""A source read once from end to end, before anything is written: can it be trained on, and what is left out?"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raynium.data.build.recorded import render
from raynium.data.records.registry import Records
from raynium.data.text.documents import Item, Split, fraction_that_holds_out, is_held_out, name_hash
from raynium.data.text.left_out import LeftOut, LeftOutGroup, Tally, left_out_in_words, share_left_out
from raynium.data.text.sources import Source, open_source, plan_splits, probe, read_split
from raynium.errors import DataError

Tell = Callable[[str], None]
TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Survey:
    """What reading all of a source has found."""

    source: Source
    # UTF-8 bytes of each training document by name.
    train_bytes: dict[str, int]
    heldout_documents: int
    heldout_bytes: int
    left_out: list[LeftOutGroup]

    @property
    def num_train_bytes(self) -> int:
        return sum(self.train_bytes.values())

    def tokenizer_sample(self, sample_bytes: int) -> set[str]:
        """Names of the documents that a tokenizer learns from: in hash order, until `sample_bytes` are reached."""
        names: set[str] = set()
        taken_bytes = 0
        for name in sorted(self.train_bytes, key=lambda name: name_hash(f"tokenizer sample: {name}")):
            if taken_bytes >= sample_bytes:
                break
            names.add(name)
            taken_bytes += self.train_bytes[name]
        return names


def survey(
    source: str,
    *,
    text_field: str = "text",
    profile: str | None = None,
    heldout_fraction: float,
    max_left_out: float,
    tell: Tell,
    records: Records | None = None,
) -> Survey:
    """Read all of it, and render its records.

    text_field, profile: see `sources.open_source`. max_left_out: the largest share of the source's text that may be
    left out. tell: gets a line every ten seconds.

    Raises DataError for what `open_source` and its readers refuse, for a larger share, and unless both splits have
    documents.
    """
    columns = records.columns if records else ()
    opened, tally = open_source(source, text_field=text_field, columns=columns, profile=profile), Tally()
    probe(opened)
    progress = Progress(tell)
    train_bytes: dict[str, int] = {}
    heldout_documents = heldout_bytes = read_bytes = 0
    for item, split in _items(opened):
        if isinstance(item, LeftOut):
            tally.add(item)
            continue
        if records is not None and split is not None:
            render(records.format, item, split)
        num_bytes = len(item.text.encode())
        read_bytes += num_bytes
        if is_held_out(item.name, heldout_fraction):
            heldout_documents += 1
            heldout_bytes += num_bytes
        else:
            train_bytes[item.name] = num_bytes
        progress(f"data: {read_bytes / 1e6:,.0f} MB of {source} read")
    found = Survey(opened, train_bytes, heldout_documents, heldout_bytes, tally.groups())
    refuse_unusable(
        source,
        found.left_out,
        documents=(len(train_bytes), heldout_documents),
        least_hash=min(map(name_hash, train_bytes), default=0),
        kept_bytes=read_bytes,
        heldout_fraction=heldout_fraction,
        max_left_out=max_left_out,
    )
    return found


def _items(source: Source) -> Iterator[tuple[Item, Split | None]]:
    """All documents with the split that they are of, and what is none."""
    yield from ((item, None) for item in source.left_out)
    for split in plan_splits(source):
        yield from ((item, split) for item in read_split(split))


def refuse_unusable(
    source: str,
    left_out: list[LeftOutGroup],
    *,
    documents: tuple[int, int],
    least_hash: int,
    kept_bytes: int,
    heldout_fraction: float,
    max_left_out: float,
) -> None:
    """Raises DataError if too much is left out, or if not both of training and held-out documents are there.

    documents: training and held-out ones. least_hash: of the names of the former. kept_bytes: of both together.
    """
    _refuse_large_share(source, left_out, kept_bytes, max_left_out)
    if not all(documents):
        # A hash of a document's name decides alone whether it is held out.
        fraction = (
            f"set data.heldout_fraction={fraction_that_holds_out(least_hash):.2g}, which holds one out"
            if documents[0] > 1
            else "change the fraction"
        )
        also = f", and leaves out {left_out_in_words(left_out, kept_bytes=0)}" if left_out and not kept_bytes else ""
        raise DataError(
            f"data.source = {source!r} gives {documents[0]} training and {documents[1]} held-out documents "
            f"with data.heldout_fraction = {heldout_fraction}{also}. Both need at least one: give more documents "
            f"(a file of text, a line or a row is one), or {fraction}"
        )


def _refuse_large_share(source: str, left_out: list[LeftOutGroup], kept_bytes: int, max_left_out: float) -> None:
    share = share_left_out(left_out, kept_bytes=kept_bytes)
    if share <= max_left_out:
        return
    remedies = [
        remedy
        for reasons, remedy in (
            ({"utf-16"}, "convert UTF-16 with `iconv -f UTF-16 -t UTF-8`"),
            ({"not utf-8"}, "convert what is not UTF-8 with `iconv -f LATIN1 -t UTF-8`, or whatever it is in"),
            ({"unread kind"}, "unpack or convert files of kinds that are not read"),
            ({"beside text"}, "give a glob, such as folder/**/*.json, of the files that are documents"),
            ({"too long"}, "split long documents"),
            ({"no tokens"}, "take a tokenizer that knows the characters of this text"),
        )
        if reasons & {group.reason for group in left_out}
    ]
    # So much is enough: rounded up to a whole percent.
    enough = min(1.0, (int(100 * share) + 1) / 100)
    raise DataError(
        f"data.source = {source!r} would lose {left_out_in_words(left_out, kept_bytes=kept_bytes)}. That is more "
        f"than data.max_left_out = {max_left_out:g}: {'; '.join(remedies) or 'mend the source'}; or set "
        f"data.max_left_out={enough:g} to train without it"
    )


class Progress:
    """Tells at most every TELL_SECONDS, and nothing before."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._next = time.monotonic() + TELL_SECONDS

    def __call__(self, line: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TELL_SECONDS
            self._tell(line)
