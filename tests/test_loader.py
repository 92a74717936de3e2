"""Which tokens a step gets: an exact shuffle, the same at every world size, from the step alone."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raynium.config.load import load_config
from raynium.data.build.store_build import build_store
from raynium.data.loader import SAMPLES_AT_ONCE, Loader
from raynium.data.order import Order, RowShuffle
from raynium.data.order.block_shuffle import BlockShuffle
from raynium.data.order.mixture import Mixture, Weighting
from raynium.data.order.permutation import shuffled
from raynium.data.rows import StreamRows, packed_rows
from raynium.data.store import DocumentStore
from raynium.errors import DataError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    """A few thousand tokens in shards of 101, so that windows cross shards often."""
    folder = tmp_path_factory.mktemp("loader")
    (folder / "source").mkdir()
    for i in range(60):
        (folder / "source" / f"{i}.txt").write_text(f"document {i} says {i * i} and then {i**3}\n" * (i % 7 + 1))
    return build_store(
        folder / "store", source=str(folder / "source"), vocab_size=300, heldout_fraction=0.1, split_bytes=300
    )


def loader_of(store: DocumentStore, **changes: int) -> Loader:
    return tiny.loader_of(store, **{"seq_len": SEQ_LEN, "global_batch_size": 12, "seed": 3, **changes})


@settings(max_examples=150, deadline=None)
@given(length=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**20))
@example(length=1, seed=0, epoch=0)
@example(length=2, seed=0, epoch=0)
@example(length=4096, seed=0, epoch=0)
@example(length=4097, seed=0, epoch=0)
def test_shuffle_is_a_bijection(length: int, seed: int, epoch: int):
    values = shuffled(np.arange(length), length=length, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(values), np.arange(length))


def test_shuffle_differs_by_epoch_and_seed_and_any_position_can_be_asked_for_alone():
    everything = {
        (seed, epoch): shuffled(np.arange(1000), length=1000, seed=seed, epoch=epoch)
        for seed, epoch in itertools.product(range(3), range(3))
    }
    for (first, values), (second, others) in itertools.combinations(everything.items(), 2):
        assert (values == others).mean() < 0.02, (first, second)  # chance: 0.001
    alone = [shuffled(np.array([i]), length=1000, seed=1, epoch=2)[0] for i in range(1000)]
    assert np.array_equal(alone, everything[1, 2])


@pytest.mark.parametrize("length", [100, 1000, 65_537])
def test_shuffle_looks_random(length: int):
    """Against what a random permutation gives, at five standard deviations."""
    places = np.arange(length)
    z_scores = []
    for epoch in range(40):
        values = shuffled(places, length=length, seed=0, epoch=epoch)
        centred_places, centred = places - places.mean(), values - values.mean()
        variance = (centred**2).mean()
        # correlation of place with value, and of neighbours: each about normal with deviation 1/sqrt(length)
        z_scores.append((centred_places * centred).mean() / variance * np.sqrt(length))
        z_scores.append((centred[1:] * centred[:-1]).mean() / variance * np.sqrt(length))
    assert np.abs(z_scores).max() < 5
    assert 0.7 < np.std(z_scores) < 1.3


def test_shuffle_of_a_huge_set_takes_any_position():
    length = 10**12 + 39
    values = shuffled(np.array([0, 1, length - 1]), length=length, seed=0, epoch=0)
    assert ((values >= 0) & (values < length)).all() and len(set(values.tolist())) == 3


def test_shuffle_is_frozen():
    """Another order would silently change what a resumed run trains on."""
    assert shuffled(np.arange(10), length=10, seed=0, epoch=0).tolist() == [5, 4, 1, 7, 3, 9, 8, 2, 0, 6]
    assert shuffled(np.array([0, 12345]), length=10**12, seed=7, epoch=3).tolist() == [30582759394, 65394010825]


def test_each_token_is_a_label_exactly_once_per_epoch(store: DocumentStore):
    loader = loader_of(store, global_batch_size=1)
    stream = store.train_stream().read(0, store.manifest.train.tokens)
    n = len(StreamRows(store, SEQ_LEN))
    assert n == (len(stream) - 1) // SEQ_LEN and len(store.manifest.train_shards) > 10
    for epoch in range(2):
        label_counts = np.zeros(len(stream), dtype=int)
        for step in range(epoch * n + 1, (epoch + 1) * n + 1):
            first = int(loader.samples(step).rows[0]) * SEQ_LEN
            batch = loader.batch(step)
            assert np.array_equal(batch.tokens_BT[0], stream[first : first + SEQ_LEN])
            assert np.array_equal(batch.labels_BT[0], stream[first + 1 : first + SEQ_LEN + 1])
            label_counts[first + 1 : first + SEQ_LEN + 1] += 1
        assert (label_counts[1 : n * SEQ_LEN + 1] == 1).all() and label_counts.sum() == n * SEQ_LEN


def test_batches_are_int64_cpu_tensors(store: DocumentStore):
    batch = loader_of(store, data_size=4).batch(1)
    for tensor in batch.columns().values():
        assert tensor.dtype == torch.int64 and tensor.shape == (3, SEQ_LEN) and tensor.device.type == "cpu"
        assert tensor.is_contiguous()  # engines may call .view


@pytest.mark.parametrize("data_size", [2, 3, 4, 12])
def test_global_batch_is_the_same_at_every_world_size(store: DocumentStore, data_size: int):
    alone = loader_of(store)
    ranks = [loader_of(store, data_rank=rank, data_size=data_size) for rank in range(data_size)]
    epoch_end = len(StreamRows(store, SEQ_LEN)) // 12 + 1  # a step with samples of two epochs
    for step in (1, 2, epoch_end, epoch_end + 1, 3 * epoch_end):
        together = torch.cat([rank.batch(step).tokens_BT for rank in ranks])
        assert torch.equal(together, alone.batch(step).tokens_BT)
        assert np.array_equal(np.concatenate([rank.samples(step).rows for rank in ranks]), alone.samples(step).rows)


def test_a_rank_reads_any_other_ranks_share_of_a_step(store: DocumentStore):
    ranks = [loader_of(store, data_rank=rank, data_size=3) for rank in range(3)]
    for step in (1, 7, 40):
        for rank, other in enumerate(ranks):
            found, wanted = ranks[0].batch_of(step, rank).columns(), other.batch(step).columns()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("data_size", [2, 3, 4, 6])
def test_ranks_keep_their_lanes_and_the_samples_of_a_step_are_the_same_at_every_world_size(
    store: DocumentStore, data_size: int
):
    rows = StreamRows(store, SEQ_LEN)
    shuffle = BlockShuffle(len(rows), seed=3, block_rows=8, lanes=6)

    def block_loader(data_rank: int, data_size: int) -> Loader:
        return Loader([rows], Order([shuffle]), global_batch_size=12, data_rank=data_rank, data_size=data_size)

    alone, ranks = block_loader(0, 1), [block_loader(rank, data_size) for rank in range(data_size)]
    steps = range(1, 2 * len(rows) // 12)
    for step in steps:
        samples = alone.samples(step)
        in_order, _ = shuffle.rows(np.arange(12 * (step - 1), 12 * step))
        assert sorted(samples.rows) == sorted(in_order) and (np.diff(samples.lanes) >= 0).all()
        together = np.concatenate([rank.samples(step).rows for rank in ranks])
        assert np.array_equal(together, samples.rows)
        assert torch.equal(torch.cat([rank.batch(step).tokens_BT for rank in ranks]), alone.batch(step).tokens_BT)
    # What makes no whole round of six blocks of eight is shuffled whole.
    in_rounds = range(1, len(rows) // 48 * 48 // 12 + 1)
    if 6 % data_size == 0:
        for rank in ranks:
            assert len({lane for step in in_rounds for lane in rank.samples(step).lanes}) == 6 // data_size


def test_the_samples_of_a_step_are_named_alike_by_every_rank_and_can_be_looked_up(store: DocumentStore):
    whole, half = loader_of(store), loader_of(store, data_rank=1, data_size=2)
    assert whole.names(3) == half.names(3)
    numbers, _, places = whole.names(3).partition(", store:row ")
    assert numbers == "its samples are 24 to 35 of the run's order"
    rows = np.array([int(place.removeprefix("0:")) for place in places.split(", ")])
    found = StreamRows(store, SEQ_LEN).read(rows)["tokens"].astype(np.int64)
    assert np.array_equal(found, whole.batch(3).tokens_BT.numpy())
    assert loader_of(store, global_batch_size=48).names(1).endswith(" and 16 more")


def test_steps_can_be_asked_for_in_any_order_by_a_fresh_loader(store: DocumentStore):
    first = loader_of(store)
    # more steps than a block of samples, so that batches cross the blocks' borders
    num_steps = 3 * SAMPLES_AT_ONCE // 12
    in_order = [first.samples(step).rows for step in range(1, num_steps + 1)]
    resumed = loader_of(store)
    for step in (num_steps, 1, SAMPLES_AT_ONCE // 12, SAMPLES_AT_ONCE // 12 + 1, 2, 2 * SAMPLES_AT_ONCE // 12 + 1):
        assert np.array_equal(resumed.samples(step).rows, in_order[step - 1])
        assert torch.equal(resumed.batch(step).labels_BT, first.batch(step).labels_BT)


def test_batch_size_does_not_change_the_order_of_samples(store: DocumentStore):
    small, large = loader_of(store, global_batch_size=4), loader_of(store, global_batch_size=12)
    assert np.array_equal(np.concatenate([small.samples(step).rows for step in (4, 5, 6)]), large.samples(2).rows)


def test_epochs_and_seeds_give_other_orders(store: DocumentStore):
    loader = loader_of(store, global_batch_size=1)
    n = len(StreamRows(store, SEQ_LEN))
    epochs = [np.concatenate([loader.samples(e * n + i + 1).rows for i in range(n)]) for e in range(2)]
    assert (epochs[0] == epochs[1]).mean() < 0.1
    assert not np.array_equal(loader_of(store, seed=1).samples(1).rows, loader_of(store, seed=2).samples(1).rows)


def test_one_shard_and_many_hold_the_same_rows(store: DocumentStore, tmp_path: Path):
    many = store.train_stream()
    one = build_store(
        tmp_path / "one", source=store.manifest.recipe.sources[0], vocab_size=300, heldout_fraction=0.1
    ).train_stream()
    assert np.array_equal(one.read(0, len(one)), many.read(0, len(many)))
    starts = np.arange(0, len(many) - SEQ_LEN, 13)
    gathered = one.gather(starts, SEQ_LEN + 1)
    assert np.array_equal(gathered, many.gather(starts, SEQ_LEN + 1))
    assert np.array_equal(gathered[5], many.read(65, SEQ_LEN + 1))
    # longer than a shard of 101 tokens, ending with the last token
    assert np.array_equal(one.gather(np.array([len(many) - 350]), 350), many.gather(np.array([len(many) - 350]), 350))


def test_sequence_longer_than_the_stream_is_refused(store: DocumentStore):
    tokens = store.manifest.train.tokens
    assert len(StreamRows(store, tokens - 1)) == 1
    with pytest.raises(DataError, match=f"data.seq_len = {tokens}: .* set data.seq_len to {tokens - 1} or less"):
        loader_of(store, seq_len=tokens)


def test_one_store_alone_is_gone_through_by_its_shuffle(store: DocumentStore):
    """Another order would silently change what a resumed run trains on."""
    num_rows = len(StreamRows(store, SEQ_LEN))
    expected = [shuffled(np.arange(num_rows), length=num_rows, seed=3, epoch=epoch) for epoch in range(3)]
    samples = Order([RowShuffle(num_rows, seed=3)]).samples(0, 3 * num_rows)
    assert np.array_equal(samples.rows, np.concatenate(expected))
    assert np.array_equal(samples.epochs, np.repeat([0, 1, 2], num_rows)) and not samples.stores.any()
    assert loader_of(store).samples(2).rows.tolist() == expected[0][12:24].tolist()


@pytest.mark.parametrize("kind", ["short windows", "long windows", "documents"])
def test_a_batch_of_several_stores_has_each_row_where_its_sample_is(
    store: DocumentStore, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Rows are taken store by store, or put together as they are stored."""
    if kind == "long windows":
        monkeypatch.setattr("raynium.data.loader.SHORT_TOKENS", SEQ_LEN - 1)
    data = load_config("quickstart", {"data.seq_len": SEQ_LEN, "data.packing": "documents"}).data
    rows = [packed_rows(store, data) if kind == "documents" else StreamRows(store, SEQ_LEN) for _ in range(3)]
    weights = (Fraction(1), Fraction(5), Fraction(2))
    order = Order([RowShuffle(len(rows[0]), seed=seed) for seed in range(3)], Mixture([Weighting(0, weights)]))
    loader = Loader(rows, order, global_batch_size=6, data_rank=0, data_size=1)
    for step in range(1, 20):
        samples, batch = loader.samples(step), loader.batch(step)
        for place, (number, row) in enumerate(zip(samples.stores, samples.rows, strict=True)):
            for name, column in rows[number].read(row[None]).items():
                assert np.array_equal(batch.columns()[name][place], column[0])
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
        assert (batch.documents_BT is not None) == (kind == "documents")


@pytest.mark.parametrize("steps_per_read", [1, 2, 5, 7])
def test_steps_read_together_are_those_read_alone(store: DocumentStore, steps_per_read: int):
    rows = StreamRows(store, SEQ_LEN)
    order = Order([RowShuffle(len(rows), seed=3)])
    together, alone = (
        Loader([rows], order, global_batch_size=4, data_rank=1, data_size=2, steps_per_read=number)
        for number in (steps_per_read, 1)
    )
    # Also out of their order, as after a resume.
    for step in [*range(1, 40), 7, 3, 1000, 999]:
        batch = together.batch(step)
        for name, column in alone.batch(step).columns().items():
            assert torch.equal(batch.columns()[name], column) and batch.columns()[name].is_contiguous()
