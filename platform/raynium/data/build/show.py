"""What a store holds, in words, from its manifest and the beginnings of a few shards, wherever it lies."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from raynium.data.manifest import Recipe, StoredFile, StoreManifest
from raynium.data.records.flags import begins_document, is_label, token_ids
from raynium.data.remote import find_manifest
from raynium.data.store import no_store
from raynium.data.text.left_out import left_out_in_words
from raynium.data.tokenizer import TOKENIZER_NAME, Tokenizer
from raynium.errors import DataError, StoreError
from raynium.storage.store import Store
from raynium.storage.verify import wrong_units

SAMPLES = 3
SAMPLE_TOKENS, SAMPLE_TOKENS_OF_RECORD = 60, 400


def describe(place: str) -> list[tuple[str, str]]:
    """Rows of a name and a value. Raises DataError if there is no store, or what is shown of it is damaged."""
    manifest = find_manifest(place)
    if manifest is None:
        raise no_store(place)
    train, heldout, recipe, lengths = manifest.train, manifest.heldout, manifest.recipe, manifest.lengths
    rows = [
        ("documents", f"{train.documents:,} to train on, {heldout.documents:,} held out"),
        ("tokens", f"{train.tokens:,} to train on, {heldout.tokens:,} held out"),
        ("bytes per token", f"{train.utf8_bytes / train.tokens:.2f} of {train.utf8_bytes / 1e6:,.1f} MB"),
        (
            "document length",
            f"{lengths.least:,} to {lengths.most:,} tokens; 10 % have at most {lengths.p10:,}, half {lengths.p50:,}, "
            f"90 % {lengths.p90:,}, 99 % {lengths.p99:,}",
        ),
        ("vocabulary", f"{manifest.vocab_size:,} tokens; id {manifest.end_of_document_id} ends a document"),
        ("source", ", ".join(recipe.sources)),
        (
            "recipe",
            f"{_in_words(recipe)}, {recipe.heldout_fraction:g} held out, duplicates "
            f"{'kept' if recipe.dedup == 'none' else 'dropped'}",
        ),
        ("files", f"{len(manifest.files):,}, {sum(file.size_bytes for file in manifest.files) / 1e6:,.1f} MB"),
        ("identity", manifest.identity),
    ]
    kept_bytes = train.utf8_bytes + heldout.utf8_bytes
    left_out = left_out_in_words(manifest.left_out, kept_bytes=kept_bytes) if manifest.left_out else "nothing"
    rows.append(("left out", left_out))
    try:
        rows += [("sample", text) for text in _samples(Store(place), manifest)]
    except StoreError as error:
        raise DataError(f"document store {place} cannot be read: {error}") from error
    return rows


def _samples(store: Store, manifest: StoreManifest) -> Iterator[str]:
    """The beginnings of the first documents of shards that are spread over the stream; of a record, [[what is learned]]
    stands in brackets.
    """
    [file] = [file for file in manifest.files if file.name == TOKENIZER_NAME]
    tokenizer = Tokenizer(
        b"".join(
            _unit(store, manifest, file, unit) for unit in range(-(-file.size_bytes // manifest.unit_bytes))
        ).decode(),
        store.uri(TOKENIZER_NAME),
        end_of_document=manifest.end_of_document_id,
    )
    shards = manifest.train_shards
    for index in sorted({index * len(shards) // SAMPLES for index in range(SAMPLES)}):
        stored = np.frombuffer(_unit(store, manifest, shards[index], 0), manifest.numpy_dtype)
        if manifest.flagged:
            yield repr(_marked(tokenizer, stored))
            continue
        tokens = stored[:SAMPLE_TOKENS]
        ends = np.flatnonzero(tokens == manifest.end_of_document_id)
        yield repr(tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens))


def _marked(tokenizer: Tokenizer, stored: np.ndarray) -> str:
    """The first document of a record's store."""
    begins = np.flatnonzero(begins_document(stored))
    of_first = stored[: min([*begins[1:2].tolist(), SAMPLE_TOKENS_OF_RECORD])]
    learned = is_label(of_first)
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(of_first)]
    text = ""
    for begin, end in pairwise(edges):
        piece = tokenizer.decode(token_ids(of_first[begin:end]))
        text += f"[[{piece}]]" if learned[begin] else piece
    return text


def _in_words(recipe: Recipe) -> str:
    if (records := recipe.records) is None:
        return f"field {recipe.text_field!r}"
    fields = ", ".join(f"{name} from {' + '.join(columns)}" for name, columns in records.fields.items())
    return f"{records.format} ({fields}), {records.train_on} answers learned"


def _unit(store: Store, manifest: StoreManifest, file: StoredFile, unit: int) -> bytes:
    expected = file.units(store.read(file.units_name), manifest.unit_bytes, where=store.url)
    content = store.read_range(file.name, unit * manifest.unit_bytes, expected.unit_length(unit))
    if wrong_units(memoryview(content), expected, range(unit, unit + 1)):
        raise DataError(
            f"{store.uri(file.name)} is damaged in unit {unit} of {manifest.unit_bytes:,} bytes, so it is not shown; "
            f"`raynium data verify {store.url}` finds all damage"
        )
    return content
