"""Text to document store: cut into splits, tokenise each on its own, and last the manifest.

One process needs to call it; more may, on any nodes: one builds, the others wait and use its store. What a build that
died has finished of its splits is used by the next one of the same text, recipe and tokenizer.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from raynium.data.build.commit import finish
from raynium.data.build.dedup import mark_duplicates, num_partitions
from raynium.data.build.fit import refuse_other_recipe, refuse_other_tokenizer, refuse_small_vocabulary
from raynium.data.build.lease import BEGUN, BUILDING, CLAIMS, only_builder
from raynium.data.build.survey import TELL_SECONDS, Survey, Tell, survey
from raynium.data.build.tokenise import PARTS, Done, part_key, tokenise_split
from raynium.data.build.work import NumberedSplit, Work
from raynium.data.manifest import MANIFEST_NAME, Recipe, StoreManifest
from raynium.data.records.registry import Records
from raynium.data.records.template import CHATML_TOKENS
from raynium.data.remote import find_manifest
from raynium.data.runner import Runner, in_this_process
from raynium.data.store import DocumentStore, open_store
from raynium.data.text.documents import Document
from raynium.data.text.left_out import LeftOut
from raynium.data.text.sources import MOST_SPLIT_BYTES, Source, open_source, plan_splits, probe
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError, StoreError, some
from raynium.storage.backend import KeyExists
from raynium.storage.checksum import UNIT_BYTES
from raynium.storage.store import Store

logger = logging.getLogger(__name__)

# BPE on 8 MB of the standard library takes 2 s on two cores and costs 1 % more tokens than on all 30 MB (5 s)
TOKENIZER_SAMPLE_BYTES = 8_000_000
# A run evaluates on them, one node's disk holds them, and their index is one file.
MOST_HELDOUT_BYTES = 20 * 10**9


class _Plan(NamedTuple):
    """What a build reads, and with what."""

    recipe: Recipe
    tokenizer: Tokenizer
    sources: list[Source]
    records: Records | None


class _How(NamedTuple):
    """All else that a build is told."""

    split_bytes: int
    unit_bytes: int
    max_left_out: float
    runner: Runner
    tell: Tell


def build_from_source(
    place: str | Path,
    *,
    source: str,
    text_field: str = "text",
    dedup: Literal["none", "exact"] = "none",
    profile: str | None = None,
    vocab_size: int,
    tokenizer_path: str | None = None,
    end_of_document: str | None = None,
    heldout_fraction: float = 0.05,
    max_left_out: float = 0.1,
    records: Records | None = None,
    surveyed: Survey | None = None,
    tell: Tell = logger.info,
    split_bytes: int = MOST_SPLIT_BYTES,
    tokenizer_sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    unit_bytes: int = UNIT_BYTES,
) -> StoreManifest:
    """Build the store of a run at `place`, in this process, or find the one that is there.

    source, text_field, profile: see `sources.open_source`. max_left_out: see `survey`; surveyed: what that gave, if it
    was called already. tokenizer_path: a tokenizer.json to use; None trains one of `vocab_size` tokens on training
    documents, taken in the order of a hash of their names until `tokenizer_sample_bytes` are reached. end_of_document:
    the token of the former that ends a document; None: see `Tokenizer.load`. tell: gets a line before what takes long,
    and every ten seconds. split_bytes: most bytes of the source in one shard. unit_bytes: that have a checksum of their
    own, a multiple of 8.

    A crash at any point leaves no store, and the next call goes on. Raises DataError for unusable text or tokenizer,
    a store there that was built from something else, and a place that cannot be written.
    """
    recipe = Recipe(
        sources=[source],
        text_field=text_field,
        heldout_fraction=heldout_fraction,
        dedup=dedup,
        records=records.recipe if records else None,
    )

    def plan() -> _Plan:
        found = surveyed or survey(
            source,
            text_field=text_field,
            profile=profile,
            heldout_fraction=heldout_fraction,
            max_left_out=max_left_out,
            tell=tell,
            records=records,
        )
        if tokenizer_path is None:
            tokenizer = _trained_tokenizer(found, vocab_size, tokenizer_sample_bytes, tell, records)
        else:
            tokenizer = Tokenizer.load(tokenizer_path, end_of_document=end_of_document)
            refuse_small_vocabulary(vocab_size, tokenizer.vocab_size, f"tokenizer {tokenizer_path!r}")
        return _Plan(recipe, tokenizer, [found.source], records)

    how = _How(split_bytes, unit_bytes, max_left_out, in_this_process, tell)
    manifest = _there_or_built(place, plan, how)
    refuse_other_recipe(manifest, recipe, where=str(place))
    refuse_other_tokenizer(
        manifest,
        model_vocab_size=vocab_size,
        path=tokenizer_path,
        end_of_document=end_of_document,
        where=str(place),
    )
    return manifest


def build_store(path: str | Path, **how: Any) -> DocumentStore:
    """`build_from_source` in a local folder, opened. how: its keyword arguments."""
    build_from_source(path, **how)
    return open_store(path)


def build_from_recipe(
    place: str | Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    runner: Runner,
    tell: Tell,
    records: Records | None = None,
    profile: str | None = None,
    max_left_out: float = 0.1,
    split_bytes: int = MOST_SPLIT_BYTES,
    unit_bytes: int = UNIT_BYTES,
) -> StoreManifest:
    """Build the store of a recipe at `place`, or find it there; the texts are read once, by the tasks.

    runner: of the tasks; any gives the same bytes. profile: see `sources.open_source`. Raises DataError as
    `build_store`, and as `read_split` from a task; what is left out is judged once all is tokenised.
    """

    def plan() -> _Plan:
        columns = records.columns if records else ()
        sources = [
            open_source(each, text_field=recipe.text_field, columns=columns, profile=profile) for each in recipe.sources
        ]
        for source in sources:
            probe(source)
        _refuse_read_twice(recipe, sources)
        num_bytes = sum(file.num_bytes for source in sources for file in source.files)
        if num_bytes * recipe.heldout_fraction > MOST_HELDOUT_BYTES:
            enough = MOST_HELDOUT_BYTES / num_bytes
            raise DataError(
                f"{num_bytes / 1e9:,.0f} GB with heldout_fraction = {recipe.heldout_fraction} would hold out more than "
                f"{MOST_HELDOUT_BYTES / 1e9:.0f} GB, which no run evaluates on: set it to {enough:.1g} or less"
            )
        return _Plan(recipe, tokenizer, sources, records)

    manifest = _there_or_built(place, plan, _How(split_bytes, unit_bytes, max_left_out, runner, tell))
    asked = recipe.model_dump()
    for name, built_with in manifest.recipe.model_dump().items():
        if built_with != (asked_for := asked[name]):
            raise DataError(
                f"document store {place} was built with {name} = {built_with!r}, and is asked for with {asked_for!r}: "
                "give the new one another name or place, or delete the store to build it anew"
            )
    if manifest.tokenizer_sha256 not in tokenizer.sha256s:
        raise DataError(
            f"document store {place} was tokenised with another tokenizer (sha256 {manifest.tokenizer_sha256}) than "
            f"the one asked for (sha256 {tokenizer.sha256}): give the new one another name or place"
        )
    if manifest.end_of_document_id != tokenizer.end_of_document_id:
        raise DataError(
            f"in document store {place} documents end with token {manifest.end_of_document_id}, and it is asked for "
            f"with {tokenizer.end_of_document_id}, {tokenizer.end_of_document!r} (end_of_document): give the new one "
            "another name or place"
        )
    return manifest


def _refuse_read_twice(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raises DataError if two sources have a file in common: under two names it could be trained on and held out."""
    source_of: dict[str, str] = {}
    for name, source in zip(recipe.sources, sources, strict=True):
        for file in source.files:
            if file.place in source_of:
                raise DataError(
                    f"{file.place} is in the source {source_of[file.place]!r} and in the source {name!r}: each file "
                    "may be in one of them only. Leave one source out, or name its files by a glob"
                )
            source_of[file.place] = name


def _there_or_built(place: str | Path, plan: Callable[[], _Plan], how: _How) -> StoreManifest:
    manifest = find_manifest(place)
    if manifest is None:
        try:
            store = Store(place)
            _refuse_foreign(store, place)
            with only_builder(store, how.tell) as check:
                # Looked at again now that nobody else builds: another process may have been faster.
                if find_manifest(place) is None:
                    # Whoever built before is dead, or is to fail.
                    store.discard_unfinished(older_than_unix=time.time())
                    _build(store, plan(), how, check)
            store.delete_prefix(BUILDING)
        except StoreError as error:
            raise DataError(
                f"document store {place} cannot be built: {error}; "
                "check permissions and free space, or set another data.path"
            ) from error
        manifest = find_manifest(place)
        assert manifest is not None
    return manifest


def _refuse_foreign(store: Store, place: str | Path) -> None:
    """Raises DataError if somebody's own files are there: a build writes and deletes under names of its own."""
    listing = store.list(recursive=False)
    # On a file system the folder of an earlier claim stays.
    folders = [each for each in listing.folders if each != BUILDING or store.list(BUILDING).sizes]
    foreign = [*listing.sizes, *(f"{folder}/" for folder in folders)]
    # The manifest is asked for last: a build that ended meanwhile has written it before it took away the rest.
    if foreign and not (store.exists(BEGUN) or store.list(CLAIMS).sizes or store.exists(MANIFEST_NAME)):
        raise DataError(
            f"{place} is not empty and holds no document store, but {some(foreign)}: a build would write over "
            "files there, and delete some. Give the store a place of its own"
        )


def _build(store: Store, plan: _Plan, how: _How, check: Callable[[], None]) -> None:
    """The caller holds the store, which `check` makes sure of."""
    started, recipe, tell = time.monotonic(), plan.recipe, how.tell
    splits = [split for source in plan.sources for split in plan_splits(source, most_bytes=how.split_bytes)]
    partitions = num_partitions(splits)
    records = plan.records
    work = Work.of(
        store,
        recipe,
        plan.tokenizer,
        splits,
        unit_bytes=how.unit_bytes,
        partitions=partitions,
        format=records.format if records else None,
    )
    numbered = [NumberedSplit(number, split) for number, split in enumerate(splits)]
    keys = {part_key(work, each): each for each in numbered}
    there = set(store.list(PARTS).sizes)
    # A part stands for the shards of its number, so one of other text must go before they are written anew.
    for stale in there - keys.keys():
        store.delete(stale)
    missing = [each for key, each in keys.items() if key not in there]
    store.replace(BEGUN, b"")
    if recipe.dedup == "exact":
        num_bytes = sum(split.num_bytes for split in splits)
        tell(f"data: looking for duplicates in {num_bytes / 1e6:,.1f} MB")
        mark_duplicates(work, numbered, how.runner)
    if len(missing) < len(numbered):
        tell(f"data: going on with {len(numbered) - len(missing)} of {len(numbered)} splits tokenised before")
    _tokenise(work, missing, how.runner, tell)
    listed: list[LeftOut] = [item for source in plan.sources for item in source.left_out]
    template = records.template if records else None
    manifest = finish(work, numbered, listed, max_left_out=how.max_left_out, template=template)
    check()
    try:
        # Dying before this line leaves no store, after it a whole one.
        store.write_new(MANIFEST_NAME, manifest.to_json())
    except KeyExists as error:
        if find_manifest(store.url) != manifest:
            raise DataError(
                f"document store {store.url}: another one was put there meanwhile; give another data.path"
            ) from error
    logger.info(
        "built document store %s in %.1f s: %d + %d held-out documents, %d training tokens, %.2f bytes per token",
        store.url,
        time.monotonic() - started,
        manifest.train.documents,
        manifest.heldout.documents,
        manifest.train.tokens,
        manifest.train.utf8_bytes / manifest.train.tokens,
    )


def _tokenise(work: Work, missing: Sequence[NumberedSplit], runner: Runner, tell: Tell) -> None:
    """Tells every ten seconds how far it is, how fast, and how long it will take."""
    began, told = time.monotonic(), time.monotonic()
    total_bytes, sum_of = sum(each.split.num_bytes for each in missing), Done(0, 0, 0)
    with closing(runner(tokenise_split, work, missing)) as results:
        for done in results:
            sum_of = sum_of.plus(done)
            now = time.monotonic()
            if now - told < TELL_SECONDS or not sum_of.source_bytes:
                continue
            told, seconds = now, now - began
            left = seconds * (total_bytes / sum_of.source_bytes - 1)
            tell(
                f"data: {sum_of.source_bytes / 1e6:,.0f} MB of {total_bytes / 1e6:,.0f} MB tokenised: "
                f"{sum_of.documents:,} documents, {sum_of.tokens / 1e6:,.1f} million tokens, "
                f"{sum_of.tokens / seconds:,.0f} tokens/s; about {_duration(left)} left"
            )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _trained_tokenizer(
    found: Survey, vocab_size: int, sample_bytes: int, tell: Tell, records: Records | None
) -> Tokenizer:
    sample = found.tokenizer_sample(sample_bytes)
    taken_bytes = sum(found.train_bytes[name] for name in sample)
    tell(f"data: a tokenizer of {vocab_size:,} tokens learns from {taken_bytes / 1e6:.1f} MB")
    items = (item for item in found.source.items() if isinstance(item, Document) and item.name in sample)
    if records is None:
        return Tokenizer.train((item.text for item in items), vocab_size=vocab_size)
    rendered = (each for item in items for each in records.format.render(json.loads(item.text)))
    return Tokenizer.train((each.text for each in rendered), vocab_size=vocab_size, special_tokens=CHATML_TOKENS)
