"""Documents of records as a store keeps them: rendered, tokenised, and with flags that say what is learned."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from raynium.data.records.flags import flagged
from raynium.data.records.formats import RecordError, RecordFormat, Rendered
from raynium.data.text.documents import Document, Split
from raynium.data.text.sources import place_of
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError


class Learnable(NamedTuple):
    """One document of a record. name, text: of the record's, and what was rendered. stored: flagged tokens."""

    name: str
    text: str
    stored: np.ndarray


def render(format: RecordFormat, document: Document, split: Split) -> list[Rendered]:
    """A record's documents. Raises DataError that says where the record stands."""
    try:
        rendered = format.render(json.loads(document.text))
        if len(rendered) != format.sequences:
            raise RecordError(f"the format makes {len(rendered)} documents of it, and says {format.sequences}")
        return rendered
    except RecordError as error:
        raise DataError(f"{place_of(split, document.name)}: {error}") from error


def learnable(
    format: RecordFormat, documents: Sequence[Document], split: Split, tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[Learnable]:
    """Of all records, in their order. Raises DataError for one without a token that is learned."""
    pairs = [(document.name, each) for document in documents for each in render(format, document, split)]
    for markup, group in groupby(pairs, key=lambda pair: pair[1].markup):
        of_group = list(group)
        encoded = tokenizer.encode_markup([rendered.text for _, rendered in of_group], markup=markup)
        for (name, rendered), (tokens, places) in zip(of_group, encoded, strict=True):
            labels = np.zeros(len(tokens), bool)
            for begin, end in rendered.labels:
                labels |= (places[:, 0] < end) & (places[:, 1] > begin)
            if rendered.ends:
                tokens, labels = np.append(tokens, tokenizer.end_of_document_id), np.append(labels, True)
            # The first is context alone.
            if not labels[1:].any():
                raise DataError(
                    f"{place_of(split, name)}: of its {len(tokens)} tokens none is learned, since what is learned is "
                    "empty, or has nothing before it: leave it out"
                )
            yield Learnable(name, rendered.text, flagged(tokens, labels, dtype))
