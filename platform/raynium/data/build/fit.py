"""Whether the store that is there is the one that is asked for."""

from typing import Any

from raynium.data.manifest import Recipe, StoreManifest
from raynium.data.records.registry import Records
from raynium.data.records.template import CHATML, CHATML_TOKENS
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError


def refuse_other_recipe(manifest: StoreManifest, asked: Recipe, *, where: str) -> None:
    """Raises DataError if the store was built from something else than the config asks for now: one source."""
    asked_for = asked.model_dump()
    for field, built_with in manifest.recipe.model_dump().items():
        if built_with != asked_for[field]:
            name, values = field, [built_with, asked_for[field]]
            if field == "sources":
                name, values = "source", [each[0] if len(each) == 1 else each for each in values]
            elif field == "records" and None not in values:
                name, values = _records_apart(*values)
            raise DataError(
                f"document store {where} was built with data.{name} = {values[0]!r}, the config says "
                f"{values[1]!r}; set it back, give another data.path, or delete the folder to build it anew"
            )


def _records_apart(built_with: dict[str, Any], asked_for: dict[str, Any]) -> tuple[str, list[Any]]:
    """The first field of the config in which two recipes of records differ, and its values."""
    names = {"format": "records", "template_sha256": "chat_template"}
    field = next(name for name in built_with if built_with[name] != asked_for[name])
    values = [built_with[field], asked_for[field]]
    if field == "template_sha256":
        values = [None if value is None else f"a template with the sha256 {value[:12]}…" for value in values]
    return names.get(field, field), values


def refuse_other_tokenizer(
    manifest: StoreManifest, *, model_vocab_size: int, path: str | None, end_of_document: str | None, where: str
) -> None:
    """Raises DataError if the model's vocabulary is too small, or the config names another tokenizer or end."""
    if path is not None:
        wanted = Tokenizer.load(path, end_of_document=end_of_document)
        if manifest.tokenizer_sha256 not in wanted.sha256s:
            raise DataError(
                f"document store {where} was tokenised with another tokenizer (sha256 {manifest.tokenizer_sha256}) "
                f"than data.tokenizer = {path!r} (sha256 {wanted.sha256}); remove data.tokenizer to use the store's "
                "own, or give another data.path to build a new store"
            )
        if end_of_document is not None and wanted.end_of_document_id != manifest.end_of_document_id:
            raise DataError(
                f"data.end_of_document = {end_of_document!r} (id {wanted.end_of_document_id}): in document store "
                f"{where} documents end with id {manifest.end_of_document_id}; remove the setting, or give another "
                "data.path to build a new store"
            )
    refuse_small_vocabulary(model_vocab_size, manifest.vocab_size, f"document store {where}")


def refuse_end_in_text(tokenizer: Tokenizer, path: str) -> None:
    """Raises DataError if a text that spells the token that ends documents becomes it."""
    end = tokenizer.end_of_document
    if tokenizer.end_of_document_id in tokenizer.encode(end):
        raise DataError(
            f"tokenizer {path!r} makes {end!r} of a text that spells it, so that a document could end itself: name "
            "another token to end documents with (end_of_document), a special one that its model makes of no text"
        )


def refuse_unfit_tokens(tokenizer: Tokenizer, path: str, records: Records | None) -> None:
    """Raises DataError if a text could end itself, or if ChatML's marks would be letters to the model."""
    refuse_end_in_text(tokenizer, path)
    if records is None or records.template is None or CHATML not in records.template.templates.values():
        return
    if lacking := [token for token in CHATML_TOKENS if len(tokenizer.encode_markup([token])[0][0]) != 1]:
        raise DataError(
            f"data.chat_template is chatml, and tokenizer {path!r} has no token {' and none '.join(lacking)}: set "
            "model.add_tokens to " + " and ".join(map(repr, lacking)) + ", or give a template whose tokens it has"
        )


def refuse_small_vocabulary(model_vocab_size: int, vocab_size: int, holder: str) -> None:
    """Raises DataError if the model lacks tokens that `holder` has; spare ones do no harm."""
    if model_vocab_size < vocab_size:
        raise DataError(
            f"model.vocab_size = {model_vocab_size}: {holder} has token ids up to {vocab_size - 1}; "
            f"set model.vocab_size to {vocab_size} or more"
        )
