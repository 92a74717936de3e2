"""Held-out bits per byte: each token counted once, on any number of ranks, beside two baselines."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from raynium.config.load import load_config
from raynium.config.world import World
from raynium.data.baselines import compute_baselines
from raynium.data.batch import IGNORED_LABEL
from raynium.data.build.store_build import build_store
from raynium.data.evaluation import EvaluationSet, bits_per_byte, evaluation_set
from raynium.data.store import DocumentStore
from raynium.rank.evaluation import rows_of_call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Döcument {i} of sixty, {i * 37}\n" * (i % 11 + 1))
    (folder / "short.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return build_store(
        tmp_path_factory.mktemp("evaluation"),
        source=str(source),
        vocab_size=300,
        heldout_fraction=0.25,
        split_bytes=300,
    )


def counted(evaluation: EvaluationSet) -> list[tuple[int, int]]:
    """(token, label) wherever a label counts, in order."""
    pairs = []
    for batch in evaluation.batches:
        mask_BT = batch.labels_BT != IGNORED_LABEL
        pairs += list(zip(batch.tokens_BT[mask_BT].tolist(), batch.labels_BT[mask_BT].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("seq_len", [1, 7, 16, 10_000])
def test_each_token_of_each_document_is_counted_once_given_the_one_before(store: DocumentStore, seq_len: int):
    evaluation = evaluation_set(store, seq_len=seq_len, batch_size=4, data_rank=0, data_size=1)
    stream, expected = store.heldout_stream(), []
    for document in store.heldout_documents():
        tokens = stream.read(document.offset, document.num_tokens).tolist()
        expected += zip([store.manifest.end_of_document_id, *tokens], tokens, strict=False)
    assert counted(evaluation) == expected
    assert evaluation.num_tokens == len(expected) == store.manifest.heldout.tokens
    assert evaluation.num_bytes == store.manifest.heldout.utf8_bytes
    assert evaluation.num_documents == store.manifest.heldout.documents > 3
    for tensor in (tensor for batch in evaluation.batches for tensor in batch.columns().values()):
        assert tensor.dtype == torch.int64 and tensor.shape == (4, seq_len) and tensor.is_contiguous()


@pytest.mark.parametrize("data_size", [2, 3, 7])
def test_ranks_make_equally_many_calls_on_the_same_rows(store: DocumentStore, data_size: int):
    alone = evaluation_set(store, seq_len=16, batch_size=1, data_rank=0, data_size=1)
    ranks = [
        evaluation_set(store, seq_len=16, batch_size=2, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    assert len({len(rank.batches) for rank in ranks}) == 1
    # rows of call 0 over the ranks, then of call 1, … are the rows of one rank, then padding
    rows = torch.cat([rank.batches[call].labels_BT for call in range(len(ranks[0].batches)) for rank in ranks])
    expected = torch.cat([batch.labels_BT for batch in alone.batches])
    assert torch.equal(rows[: len(expected)], expected)
    assert (rows[len(expected) :] == IGNORED_LABEL).all() and len(rows) - len(expected) < 2 * data_size
    assert all(rank.num_bytes == alone.num_bytes and rank.num_tokens == alone.num_tokens for rank in ranks)


def test_fewer_rows_than_ranks_still_give_every_rank_a_call(store: DocumentStore):
    ranks = [
        evaluation_set(store, seq_len=10_000, batch_size=1, data_rank=rank, data_size=5, max_documents=2)
        for rank in range(5)
    ]
    assert [len(rank.batches) for rank in ranks] == [1] * 5
    assert [len(counted(rank)) > 0 for rank in ranks] == [True, True, False, False, False]


def test_max_documents_takes_the_first_by_hash(store: DocumentStore):
    evaluation = evaluation_set(store, seq_len=16, batch_size=4, data_rank=0, data_size=1, max_documents=3)
    documents = store.heldout_documents()[:3]
    assert evaluation.num_documents == 3
    assert evaluation.num_bytes == sum(document.utf8_bytes for document in documents)
    assert len(counted(evaluation)) == evaluation.num_tokens == sum(document.num_tokens for document in documents)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8)


@pytest.mark.parametrize("max_documents", [None, 4])
def test_baselines_on_the_evaluated_documents(store: DocumentStore, source: Path, max_documents: int | None):
    baselines = compute_baselines([store], max_documents=max_documents)
    evaluation = evaluation_set(store, seq_len=16, batch_size=4, data_rank=0, data_size=1, max_documents=max_documents)
    assert (baselines.num_documents, baselines.num_bytes) == (evaluation.num_documents, evaluation.num_bytes)
    # the unigram model by another road: cross-entropy of constant logits on the evaluation batches
    stream = store.train_stream().read(0, store.manifest.train.tokens)
    counts = np.bincount(stream, minlength=store.manifest.vocab_size) + 1
    logits_V = torch.from_numpy(np.log(counts))
    nats = sum(
        float(
            torch.nn.functional.cross_entropy(
                logits_V.expand(labels_BT.numel(), -1), labels_BT.flatten(), reduction="sum", ignore_index=IGNORED_LABEL
            )
        )
        for labels_BT in (batch.labels_BT for batch in evaluation.batches)
    )
    assert baselines.unigram_bits_per_byte == pytest.approx(bits_per_byte(nats, evaluation.num_bytes), rel=1e-9)
    texts = [(source / document.name).read_bytes() for document in store.heldout_documents(max_documents)]
    zlib_bits = 8 * sum(len(zlib.compress(text, 9)) for text in texts)
    assert baselines.zlib_bits_per_byte == zlib_bits / sum(map(len, texts))


@pytest.mark.parametrize(("pipeline", "rows"), [(1, 4), (2, 8)])
def test_a_pipeline_is_evaluated_with_as_many_rows_as_it_trains(pipeline: int, rows: int):
    """Its stages have agreed on the shapes of a step; without stages a micro-batch needs the least memory."""
    config = load_config("quickstart", [f"parallel.pipeline={pipeline}"])  # 8 rows a step on 2 ranks, 4 at a time
    assert rows_of_call(config, World.of(config)) == rows
