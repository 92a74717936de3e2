"""Named tokens that a run adds to the tokenizer and the weights that it begins with: `model.add_tokens`."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import tokenizers
import torch
from safetensors.torch import save

from raynium.checkpoint.base import Base, BaseFile, BaseRef
from raynium.checkpoint.format.blocks import Block
from raynium.checkpoint.format.image import TORCH_DTYPES
from raynium.checkpoint.format.manifest import TensorEntry
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.state import MODEL_PREFIX, Chunk
from raynium.config.schema import ModelSection
from raynium.convert.description import RunText
from raynium.data.tokenizer import Tokenizer
from raynium.errors import ConfigError
from raynium.storage.checksum import UNIT_BYTES, checksum_units, list_to_text, to_text
from raynium.storage.store import Store

# Of the run: the rows that it adds to what it begins with.
ROWS_NAME = "added-rows.safetensors"
_TABLES = (f"{MODEL_PREFIX}embedding.weight", f"{MODEL_PREFIX}head.weight")
_ROWS_AT_ONCE = 4096


def with_tokens(text: RunText, added: Sequence[str]) -> RunText:
    """The same with these tokens in the tokenizer, after all others, and the least vocabulary that holds them.

    ConfigError for one that it has, or that is named twice.
    """
    if not added:
        return text
    had = text.tokenizer
    known = json.loads(had.file_text).get("added_tokens") or []
    vocabulary = tokenizers.Tokenizer.from_str(had.file_text)
    problems = [
        f"model.add_tokens names {token!r}, which the tokenizer has, with the id {vocabulary.token_to_id(token)}: take "
        "it out"
        for token in added
        if vocabulary.token_to_id(token) is not None
    ]
    problems += [
        f"model.add_tokens names {token!r} twice: take one out" for token in {*added} if added.count(token) > 1
    ]
    if problems:
        raise ConfigError(problems)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [{"id": had.vocab_size + number, "content": token} | flags for number, token in enumerate(added)]
    fields = json.loads(had.file_text) | {"added_tokens": [*known, *more]}
    made = Tokenizer(
        json.dumps(fields, ensure_ascii=False, indent=2),
        "the tokenizer with model.add_tokens",
        end_of_document=had.end_of_document,
    )
    model = text.model.model_copy(update={"vocab_size": max(text.model.vocab_size, made.vocab_size)})
    return replace(text, tokenizer=made, model=model)


def with_rows(base: Base, model: ModelSection, store: Store, *, first: int, num_tokens: int) -> Base:
    """The weights with rows for the tokens from id `first` on, kept in the run at `store`, and for room at the end.

    A row is the mean of those of all tokens before, as transformers has it where it makes room for tokens, less its
    noise of a billionth. What the weights had there before is left out: rows that no token of theirs has.
    """
    before = base.model["vocab_size"]
    assert isinstance(before, int)
    # What is made: the rows of the tokens, and those that the weights do not have.
    made = sorted({*range(first, first + num_tokens), *range(before, model.vocab_size)})
    runs = [(made[0], made[0])]
    for row in made:
        runs[-1] = (runs[-1][0], row + 1) if row <= runs[-1][1] else runs[-1]
        if row >= runs[-1][1]:
            runs.append((row, row + 1))
    tables = [entry for entry in base.tensors if entry.name in _TABLES]
    rows = {entry.name: _mean_row(base, entry, first).expand(len(made), -1).contiguous() for entry in tables}
    content = save(rows)
    store.replace(ROWS_NAME, content)
    sums = checksum_units(content, UNIT_BYTES)
    file = BaseFile(
        store=store.url,
        key=ROWS_NAME,
        size=len(content),
        crc64nvme=to_text(sums.crc),
        unit_bytes=UNIT_BYTES,
        unit_crc64nvme=list_to_text(sums.unit_crcs),
    )
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begins = {name: 8 + length + header[name]["data_offsets"][0] for name in rows}

    def grown(entry: TensorEntry) -> TensorEntry:
        if entry.name not in rows:
            return entry
        blocks = [part for block in entry.blocks for part in _outside(block, runs, entry.blocks.item_bytes)]
        row_bytes, number, begin = entry.global_shape[1] * entry.blocks.item_bytes, len(base.shards), begins[entry.name]
        for low, high in runs:
            blocks.append(Block(number, (low, 0), (high - low, entry.global_shape[1]), begin, 0))
            begin += (high - low) * row_bytes
        return TensorEntry(
            name=entry.name,
            dtype=entry.dtype,
            global_shape=(model.vocab_size, entry.global_shape[1]),
            shards=np.array([block.shard for block in blocks]),
            offsets=tuple(np.array([block.offsets[dim] for block in blocks]) for dim in (0, 1)),
            shapes=tuple(np.array([block.shape[dim] for block in blocks]) for dim in (0, 1)),
            begins=np.array([block.begin for block in blocks]),
        )

    return Base(
        place=base.place,
        model=model.model_dump(mode="json"),
        shards=(*base.shards, file),
        tensors=tuple(map(grown, base.tensors)),
    )


def _outside(block: Block, runs: Sequence[tuple[int, int]], item_bytes: int) -> list[Block]:
    """The parts of a block of a matrix whose rows are in none of the runs."""
    (first, column), (num_rows, width) = block.offsets, block.shape
    kept, low = [], first
    for begin, end in [*runs, (first + num_rows, first + num_rows)]:
        high = min(begin, first + num_rows)
        if high > low:
            start = block.begin + (low - first) * width * item_bytes
            kept.append(Block(block.shard, (low, column), (high - low, width), start, 0))
        low = max(low, end)
    return kept


def _mean_row(base: Base, entry: TensorEntry, num_rows: int) -> torch.Tensor:
    """[D], of the first rows, in the dtype of the weights."""
    width, dtype = entry.global_shape[1], TORCH_DTYPES[entry.dtype]
    total = torch.zeros(width, dtype=torch.float64)
    for begin in range(0, num_rows, _ROWS_AT_ONCE):
        part = torch.empty(min(_ROWS_AT_ONCE, num_rows - begin), width, dtype=dtype)
        chunk = Chunk(entry.name, entry.global_shape, (begin, 0), part, saved_here=False)
        load_checkpoint(BaseRef(base), [chunk])
        total += part.double().sum(0)
    return (total / num_rows).to(dtype)
