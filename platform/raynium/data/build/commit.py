"""All parts of a build to one store: what they say is added up, what they wrote is there, the manifest comes last."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from raynium.data.build.lengths import LengthCounts
from raynium.data.build.survey import refuse_unusable
from raynium.data.build.tokenise import Part, SplitSubset, part_key, unpacked_counts
from raynium.data.build.work import NumberedSplit, Work
from raynium.data.manifest import (
    MANIFEST_NAME,
    Shards,
    SmallFile,
    StoredFile,
    StoreManifest,
    Subset,
    token_dtype_for,
    units_content,
)
from raynium.data.records.template import OWN_NAME, ChatTemplate
from raynium.data.store import HELDOUT_INDEX_NAME, TOKEN_COUNT_DTYPE, TOKEN_COUNTS_NAME, HeldoutDocument
from raynium.data.text.documents import name_hash
from raynium.data.text.left_out import LeftOut, LeftOutGroup, Tally
from raynium.data.tokenizer import TOKENIZER_NAME
from raynium.errors import DataError
from raynium.storage.checksum import checksum_units, list_to_text, to_text
from raynium.storage.store import Store
from raynium.storage.verify import stored

logger = logging.getLogger(__name__)

# Requests in flight for small things.
READERS = 16
_SHARD = re.compile(r"(train|heldout)-\d+\.(bin|crc)")


def finish(
    work: Work,
    splits: Sequence[NumberedSplit],
    listed_left_out: Iterable[LeftOut],
    *,
    max_left_out: float,
    template: ChatTemplate | None = None,
) -> StoreManifest:
    """Writes all but the manifest, which is returned. Every split has its part.

    Raises DataError if too much was left out, one of both kinds of documents is missing, or a shard is.
    """
    store, tokenizer = work.store(), work.tokenizer()
    with ThreadPoolExecutor(READERS, thread_name_prefix="data-parts") as pool:
        keys = [part_key(work, each) for each in splits]
        parts = list(pool.map(lambda key: Part.parse(store.read(key), store.uri(key)), keys))
    left_out = _left_out(listed_left_out, parts)
    heldout_documents = _heldout_documents(parts)
    source = work.recipe.sources[0] if len(work.recipe.sources) == 1 else ", ".join(work.recipe.sources)
    refuse_unusable(
        source,
        left_out,
        documents=(sum(part.train.documents for part in parts), len(heldout_documents)),
        least_hash=min(part.least_hash for part in parts),
        kept_bytes=sum(part.train.utf8_bytes + part.heldout.utf8_bytes for part in parts),
        heldout_fraction=work.recipe.heldout_fraction,
        max_left_out=max_left_out,
    )
    if num_altered := sum(part.num_altered for part in parts):
        logger.warning(
            "the tokenizer does not give back the text of %d of %d held-out documents: bits per byte is approximate",
            num_altered,
            sum(part.num_checked for part in parts),
        )
    lengths = LengthCounts()
    for part in parts:
        lengths.update(LengthCounts(part.lengths))
    counts = np.sum([unpacked_counts(part.token_counts) for part in parts], axis=0, dtype=np.int64)
    index = json.dumps([document._asdict() for document in heldout_documents], indent=0)
    small_files = [
        _small_file(store, name, content, work.unit_bytes)
        for name, content in (
            (HELDOUT_INDEX_NAME, index.encode()),
            (TOKEN_COUNTS_NAME, counts.astype(TOKEN_COUNT_DTYPE).tobytes()),
            (TOKENIZER_NAME, tokenizer.file_text.encode()),
            *([(OWN_NAME, template.to_json())] if template is not None else []),
        )
    ]
    manifest = StoreManifest.of(
        recipe=work.recipe,
        left_out=left_out,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document_id=tokenizer.end_of_document_id,
        token_dtype=token_dtype_for(tokenizer.vocab_size, flagged=work.format is not None),
        train=_subset([part.train for part in parts]),
        heldout=_subset([part.heldout for part in parts]),
        lengths=lengths.quantiles(),
        unit_bytes=work.unit_bytes,
        small_files=small_files,
    )
    _settle(store, manifest)
    return manifest


def _left_out(listed: Iterable[LeftOut], parts: Sequence[Part]) -> list[LeftOutGroup]:
    tally = Tally()
    for item in listed:
        tally.add(item)
    for part in parts:
        for group in part.left_out:
            tally.add(group)
    return tally.groups()


def _heldout_documents(parts: Sequence[Part]) -> list[HeldoutDocument]:
    """By hash of name; offsets are those in the whole held-out stream."""
    begins = accumulate((part.heldout.tokens for part in parts), initial=0)
    documents = [
        document._replace(offset=begin + document.offset)
        for begin, part in zip(begins, parts, strict=False)
        for document in part.heldout_documents
    ]
    return sorted(documents, key=lambda document: name_hash(document.name))


def _subset(subsets: Sequence[SplitSubset]) -> Subset:
    shards = [(number, each) for number, each in enumerate(subsets) if each.tokens]
    return Subset(
        documents=sum(each.documents for each in subsets),
        tokens=sum(each.tokens for each in subsets),
        utf8_bytes=sum(each.utf8_bytes for each in subsets),
        shards=Shards(
            numbers=[number for number, _ in shards],
            tokens=[each.tokens for _, each in shards],
            crc64nvme=list_to_text([each.crc for _, each in shards]),
        ),
    )


def _small_file(store: Store, name: str, content: bytes, unit_bytes: int) -> SmallFile:
    checksums = checksum_units(content, unit_bytes)
    store.replace(name, content)
    store.replace(StoredFile(name, checksums.size, checksums.crc).units_name, units_content(checksums))
    return SmallFile.of(name, checksums)


def _settle(store: Store, manifest: StoreManifest) -> None:
    """Sees that all shards are there, as the store itself knows them, and removes those of an earlier build."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="data-shards") as pool:
        found = list(pool.map(lambda file: stored(store, file.name), manifest.files))
    for file, there in zip(manifest.files, found, strict=True):
        if there is None or there[0] != file.size_bytes or there[1] not in (None, to_text(file.crc)):
            raise DataError(
                f"{store.uri(file.name)} is not what its task wrote there ({file.size_bytes:,} bytes). With several "
                "nodes a store must lie on a file system that all of them mount, or in S3; see also who else writes "
                f"there. {MANIFEST_NAME} is not written: nobody takes this for a store"
            )
    expected = {name for file in manifest.files for name in (file.name, file.units_name)}
    for key in store.list(recursive=False).sizes:
        if _SHARD.fullmatch(key) and key not in expected:
            store.delete(key)
