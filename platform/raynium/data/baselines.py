"""What a model must be compared with: two compressors that need no training run, on the same held-out documents.

All figures are bits per byte of the documents' UTF-8 text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raynium.data.evaluation import bits_per_byte
from raynium.data.store import OpenStore


@dataclass(frozen=True)
class Baselines:
    # Each token by its frequency in the training stream of its store, add-one smoothed.
    unigram_bits_per_byte: float
    # By zlib, level 9, on each document by itself.
    zlib_bits_per_byte: float
    num_documents: int
    num_bytes: int


def compute_baselines(stores: Sequence[OpenStore], *, max_documents: int | None = None) -> Baselines:
    """On the documents of `evaluation_set` with the same `max_documents`, of all stores; quick, for each has the counts
    of its tokens.
    """
    unigram_nats, zlib_bytes, num_bytes, num_documents = 0.0, 0, 0, 0
    for store in stores:
        documents = store.heldout_documents(max_documents)
        counts = store.train_token_counts() + 1
        nats_of_token = np.log(counts.sum()) - np.log(counts)
        stream = store.heldout_stream()
        for document in documents:
            unigram_nats += float(nats_of_token[stream.read(document.offset, document.num_tokens)].sum())
        zlib_bytes += sum(document.zlib_bytes for document in documents)
        num_bytes += sum(document.utf8_bytes for document in documents)
        num_documents += len(documents)
    return Baselines(
        unigram_bits_per_byte=bits_per_byte(unigram_nats, num_bytes),
        zlib_bits_per_byte=8 * zlib_bytes / num_bytes,
        num_documents=num_documents,
        num_bytes=num_bytes,
    )
