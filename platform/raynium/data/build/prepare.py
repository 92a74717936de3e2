"""The document store that a config asks for: checked before a run is started, and made where there is none."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from raynium.config.schema import Config, DataSection
from raynium.data.access import fetch_store, open_fetched, refuse_small_cache
from raynium.data.build.fit import (
    refuse_other_recipe,
    refuse_other_tokenizer,
    refuse_small_vocabulary,
    refuse_unfit_tokens,
)
from raynium.data.build.store_build import build_from_source
from raynium.data.build.survey import Survey, Tell, survey
from raynium.data.manifest import Recipe, StoreManifest
from raynium.data.mixed import epochs_in_words, refuse_unmixable, refuse_used_up
from raynium.data.packed_index import ensure_index
from raynium.data.records.registry import TEXT, Records, records_of
from raynium.data.remote import find_manifest
from raynium.data.rows import packable, refuse_windows_of_records, stream_rows
from raynium.data.runner import Runner
from raynium.data.store import DocumentStore, OpenStore, no_store, refuse_other_data
from raynium.data.text.left_out import left_out_in_words
from raynium.data.tokenizer import Tokenizer, beside, check_vocab_size
from raynium.errors import DataError

logger = logging.getLogger(__name__)


def check_stores(config: Config, *, tell: Tell) -> Survey | None:
    """`check_data` of each store, and whether those of a mixture go together, by their manifests alone."""
    sections, surveyed = config.data.of_each_store(), None
    for data in sections:
        if config.data.mixture and find_manifest(data.place) is None:
            raise no_store(data.place, in_mixture=True)
        surveyed = check_data(data, model_vocab_size=config.model.vocab_size, tell=tell)
    manifests = [manifest for data in sections if (manifest := find_manifest(data.place)) is not None]
    if len(manifests) == len(sections):
        _refuse_unfit_together(config, manifests)
    return surveyed


def prepare_stores(
    config: Config,
    *,
    cache_dir: str | Path,
    surveyed: Survey | None = None,
    runner: Runner | None = None,
    tell: Tell = logger.info,
) -> list[OpenStore]:
    """`prepare_store` of each store, in the order of the mixture, with the index of its rows where they are packed.

    runner: of the tasks that pack; None: this process.
    """
    stores, num_rows = [], []
    for data, entry in zip(config.data.of_each_store(), config.data.stores, strict=True):
        began = time.monotonic()
        store = prepare_store(
            data,
            model_vocab_size=config.model.vocab_size,
            run=config.run.place,
            cache_dir=cache_dir,
            surveyed=surveyed,
            tell=tell,
        )
        label = f"data: {entry.name}:" if config.data.mixture else "data:"
        for line in _in_words(store.manifest, time.monotonic() - began):
            tell(f"{label} {line}")
        if data.packing == "documents":
            known = packable(store, entry.store, config.run.place)
            index = ensure_index(known, data, runner=runner, tell=tell).index
            tell(f"{label} {index.in_words()}")
            num_rows.append(index.num_rows)
        else:
            num_rows.append(stream_rows(store.manifest, data.seq_len, where=store.place))
        stores.append(store)
    _refuse_unfit_together(config, [store.manifest for store in stores])
    rows_per_sample = stores[0].manifest.documents_per_record
    refuse_used_up(config, num_rows, rows_per_sample=rows_per_sample)
    if config.data.mixture:
        for line in epochs_in_words(config, num_rows, rows_per_sample=rows_per_sample):
            tell(line)
    return stores


def _in_words(manifest: StoreManifest, seconds: float) -> Iterator[str]:
    train, heldout = manifest.train, manifest.heldout
    yield (
        f"{train.documents:,} documents, {train.utf8_bytes / 1e6:.1f} MB, {train.tokens:,} tokens of a "
        f"vocabulary of {manifest.vocab_size:,}; {heldout.documents} documents held out ({seconds:.1f} s)"
    )
    if manifest.left_out:
        yield f"left out {left_out_in_words(manifest.left_out, kept_bytes=train.utf8_bytes + heldout.utf8_bytes)}"


def _refuse_unfit_together(config: Config, manifests: list[StoreManifest]) -> None:
    """Raises DataError if stores that fit the config one by one do not fit together. manifests: of all of them."""
    refuse_unmixable(config, manifests)
    places = [store.store for store in config.data.stores]
    refuse_small_cache(config.data, dict(zip(places, manifests, strict=True)))
    if config.data.packing == "stream":
        rows = [
            stream_rows(manifest, config.data.seq_len, where=place)
            for manifest, place in zip(manifests, places, strict=True)
        ]
        refuse_used_up(config, rows)


def check_data(data: DataSection, *, model_vocab_size: int, tell: Tell) -> Survey | None:
    """All that can be known of the data before anything is written: the store's manifest if there is one, else the
    tokenizer and every document of the source, of which it returns the survey for `prepare_store`.

    Raises DataError if there is neither store nor source, or if they do not fit the config.
    """
    if data.end_of_document is not None and data.tokenizer is None:
        raise DataError(
            f"data.end_of_document = {data.end_of_document!r} names a token of data.tokenizer, which is not set; set "
            "both, or neither: a tokenizer that is trained here has its own"
        )
    manifest = find_manifest(data.place)
    if manifest is not None:
        _refuse_unfit(manifest, data, model_vocab_size=model_vocab_size)
        return None
    if data.source is None:
        raise no_store(data.place)
    records = records_of_data(data)
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer, end_of_document=data.end_of_document)
        refuse_unfit_tokens(tokenizer, data.tokenizer, records)
        refuse_small_vocabulary(model_vocab_size, tokenizer.vocab_size, f"tokenizer {data.tokenizer!r}")
    else:
        check_vocab_size(model_vocab_size)
    found = survey(
        data.source,
        text_field=data.text_field,
        profile=data.aws_profile,
        heldout_fraction=data.heldout_fraction,
        max_left_out=data.max_left_out,
        tell=tell,
        records=records,
    )
    # No tokenizer makes more of a document than a token of each byte, one before it and one after it.
    most_tokens = found.num_train_bytes + 2 * len(found.train_bytes)
    if data.packing == "stream" and most_tokens <= data.seq_len:
        raise DataError(
            f"data.source = {data.source!r} has at most {most_tokens:,} training tokens; one sample takes "
            f"data.seq_len + 1 = {data.seq_len + 1}. Give more text, or a shorter data.seq_len"
        )
    return found


def prepare_store(
    data: DataSection,
    *,
    model_vocab_size: int,
    run: str,
    cache_dir: str | Path,
    surveyed: Survey | None = None,
    tell: Tell = logger.info,
) -> OpenStore:
    """What the driver calls before training: the config's store, built first if it is missing and `source` is given.

    A store at a URL is built there, and then copied to `cache_dir` unless it is streamed. run: see `open_fetched`.
    surveyed: from `check_data`.
    Raises DataError if there is neither store nor source, or if the store does not fit the config.
    """
    if data.source is not None:
        build_from_source(
            data.place,
            source=data.source,
            text_field=data.text_field,
            dedup=data.dedup,
            profile=data.aws_profile,
            vocab_size=model_vocab_size,
            tokenizer_path=data.tokenizer,
            end_of_document=data.end_of_document,
            heldout_fraction=data.heldout_fraction,
            max_left_out=data.max_left_out,
            records=records_of_data(data),
            surveyed=surveyed,
            tell=tell,
        )
    store = open_fetched(data, fetch_store(data, data.place, cache_dir), identity=data.identity, run=run)
    _refuse_unfit(store.manifest, data, model_vocab_size=model_vocab_size)
    if isinstance(store, DocumentStore):
        store.check_sizes()
    return store


def records_of_data(data: DataSection) -> Records | None:
    """As `records_of`, with the template of the tokenizer's folder. None for texts."""
    read, where = (lambda name: None), "the tokenizer that is trained here"
    if data.tokenizer is not None:
        (read, _), where = beside(data.tokenizer), f"tokenizer {data.tokenizer!r}"
    fields = data.fields.model_dump(exclude_none=True) if data.fields else {}
    return records_of(
        data.records, fields=fields, chat_template=data.chat_template, train_on=data.train_on, read=read, where=where
    )


def _refuse_unfit(manifest: StoreManifest, data: DataSection, *, model_vocab_size: int) -> None:
    """Raises DataError if the store is not the one that the config means."""
    refuse_other_data(manifest, data.identity, where=data.place)
    if data.source is not None:
        records = records_of_data(data)
        asked = Recipe(
            sources=[data.source],
            text_field=data.text_field,
            heldout_fraction=data.heldout_fraction,
            dedup=data.dedup,
            records=records.recipe if records else None,
        )
        refuse_other_recipe(manifest, asked, where=data.place)
    built = manifest.recipe.records.format if manifest.recipe.records else TEXT
    if built != data.records:
        raise DataError(
            f"document store {data.place} holds {built}, and data.records is {data.records}: set data.records to "
            f"{built}, with a task that learns from them, or give another data.path"
        )
    refuse_windows_of_records(manifest, data, where=data.place)
    refuse_other_tokenizer(
        manifest,
        model_vocab_size=model_vocab_size,
        path=data.tokenizer,
        end_of_document=data.end_of_document,
        where=data.place,
    )
