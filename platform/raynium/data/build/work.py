"""What the tasks of a build are given."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from raynium.data.manifest import Recipe
from raynium.data.records.formats import RecordFormat
from raynium.data.text.documents import Split
from raynium.data.tokenizer import Tokenizer
from raynium.storage.checksum import UNIT_BYTES
from raynium.storage.store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """The same for all tasks of a build. target: the store's place; a folder must be one that every node sees."""

    target: str
    recipe: Recipe
    tokenizer_text: str
    end_of_document: str
    unit_bytes: int
    splits_digest: str
    num_splits: int
    # By which duplicates are looked for; 1 where they are not.
    partitions: int
    # None: of texts.
    format: RecordFormat | None

    @classmethod
    def of(
        cls,
        target: Store,
        recipe: Recipe,
        tokenizer: Tokenizer,
        splits: Sequence[Split],
        *,
        unit_bytes: int = UNIT_BYTES,
        partitions: int = 1,
        format: RecordFormat | None = None,
    ) -> "Work":
        return cls(
            target=target.url,
            recipe=recipe,
            tokenizer_text=tokenizer.file_text,
            end_of_document=tokenizer.end_of_document,
            unit_bytes=unit_bytes,
            splits_digest=_digest([repr(split) for split in splits]),
            num_splits=len(splits),
            partitions=partitions,
            format=format,
        )

    def store(self) -> Store:
        return Store(self.target)

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self.tokenizer_text, self.end_of_document)

    def digest(self, split: Split) -> str:
        """Of all that decides the tokens of a split; of its files the sizes and times, which a changed file differs in.

        Which documents are duplicates depends on all splits.
        """
        others = self.splits_digest if self.recipe.dedup == "exact" else ""
        records = [self.recipe.records.model_dump_json()] if self.recipe.records else []
        return _digest(
            [
                *(repr(split), others, self.recipe.dedup, repr(self.recipe.heldout_fraction)),
                *(self.tokenizer_text, self.end_of_document, str(self.unit_bytes), *records),
            ]
        )


@dataclass(frozen=True)
class NumberedSplit:
    """number: its place among all splits of the build, and so that of its shards."""

    number: int
    split: Split


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=1)
def _tokenizer(file_text: str, end_of_document: str) -> Tokenizer:
    # The largest files take seconds to read, and a worker has many splits.
    return Tokenizer(file_text, "the tokenizer of this build", end_of_document=end_of_document)


def _digest(facts: list[str]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
