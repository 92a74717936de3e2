"""Which store a sample comes from: by weight within two samples, over all stages, and any sample by itself."""

from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.data.loader import Loader
from raynium.data.mixed import epochs_in_words, refuse_used_up
from raynium.data.order import Order, RowShuffle, seed_of_store
from raynium.data.order.block_shuffle import BlockShuffle
from raynium.data.order.mixture import SAMPLES_AT_ONCE, Mixture, Weighting, mixture_of
from raynium.errors import DataError

FAR = 10**12
NUM_SAMPLES = 3000

# Decimals over twelve orders of magnitude, token counts, and equal ones.
decimals = st.builds(
    lambda digits, power: Fraction(digits) * Fraction(10) ** power, st.integers(1, 999), st.integers(-6, 3)
)
weights_of_one_kind = st.sampled_from([decimals, st.integers(1, 10**13).map(Fraction), st.just(Fraction(1))])


@st.composite
def mixtures(draw: st.DrawFn, *, most_stores: int = 64, most_stages: int = 8) -> list[Weighting]:
    num_stores = draw(st.integers(1, most_stores))
    lengths = [0, *draw(st.lists(st.integers(1, 400), max_size=most_stages - 1))]
    stages = []
    for first in np.cumsum(lengths).tolist():
        weights = draw(st.lists(draw(weights_of_one_kind), min_size=num_stores, max_size=num_stores))
        if first > 0:
            present = draw(st.lists(st.booleans(), min_size=num_stores, max_size=num_stores))
            if any(present):
                weights = [weight * here for weight, here in zip(weights, present, strict=True)]
        stages.append(Weighting(first, tuple(weights)))
    return stages


def of_weights(*weights: float | str) -> Mixture:
    return Mixture([Weighting(0, tuple(Fraction(str(each)) for each in weights))])


def expected(stages: Sequence[Weighting], samples: int) -> list[Fraction]:
    """Of each store in the first `samples`: its weights, summed exactly."""
    sums = [Fraction(0)] * len(stages[0].weights)
    ends = [*(stage.first_sample for stage in stages[1:]), None]
    for stage, end in zip(stages, ends, strict=True):
        length = max(0, (samples if end is None else min(end, samples)) - stage.first_sample)
        total = sum(stage.weights)
        sums = [each + length * weight / total for each, weight in zip(sums, stage.weights, strict=True)]
    return sums


def shares_in(stage: Weighting) -> list[float]:
    total = sum(stage.weights)
    return [float(weight / total) for weight in stage.weights]


def most_astray(stages: Sequence[Weighting], stores: np.ndarray) -> float:
    """The farthest that any store is from its weights in any beginning of the order."""
    num_stores = len(stages[0].weights)
    counts = np.cumsum(stores[:, None] == np.arange(num_stores), axis=0)
    shares = np.empty((len(stores), num_stores))
    for stage in stages:
        shares[stage.first_sample :] = shares_in(stage)
    return float(np.abs(counts - np.cumsum(shares, axis=0)).max())


@settings(max_examples=120, deadline=None)
@given(stages=mixtures())
@example(stages=[Weighting(0, (Fraction(1),) * 64)])
@example(stages=[Weighting(0, tuple(Fraction(2) ** -k for k in range(64)))])
@example(stages=[Weighting(0, tuple(Fraction(k) for k in (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)))])
def test_every_beginning_holds_each_store_by_its_weights_within_two_samples(stages: list[Weighting]):
    mixture = Mixture(stages)
    stores, places = mixture.deal(0, NUM_SAMPLES)
    assert most_astray(stages, stores) < 2
    for store in range(mixture.num_stores):
        assert np.array_equal(places[stores == store], np.arange((stores == store).sum()))
    # A trillion samples on: exact counts there, and from there sample by sample.
    counts = np.array(mixture.counts(FAR))
    astray = np.array([float(count - share) for count, share in zip(counts, expected(stages, FAR), strict=True)])
    far_stores, far_places = mixture.deal(FAR, 200)
    steps = (far_stores[:, None] == np.arange(mixture.num_stores)) - shares_in(stages[-1])
    assert np.abs(astray + np.cumsum(steps, axis=0)).max() < 2 and np.abs(astray).max() < 2
    for store in range(mixture.num_stores):
        found = far_places[far_stores == store]
        assert np.array_equal(found, counts[store] + np.arange(len(found)))
    assert mixture.counts(FAR + 200) == (counts + np.bincount(far_stores, minlength=len(counts))).tolist()


@settings(max_examples=100, deadline=None)
@given(stages=mixtures(most_stores=6), starts=st.lists(st.integers(0, NUM_SAMPLES - 1), min_size=1, max_size=20))
def test_any_sample_can_be_asked_for_alone(stages: list[Weighting], starts: list[int]):
    stores, places = Mixture(stages).deal(0, NUM_SAMPLES)
    resumed = Mixture(stages)
    for start in starts:
        for number in (0, 1, 7):
            number = min(number, NUM_SAMPLES - start)
            found = resumed.deal(start, number)
            assert np.array_equal(found[0], stores[start : start + number])
            assert np.array_equal(found[1], places[start : start + number])
        assert resumed.counts(start) == np.bincount(stores[:start], minlength=resumed.num_stores).tolist()


def test_more_samples_than_are_dealt_at_once_are_the_same_ones():
    mixture = of_weights(0.7, 0.2, 0.1)
    number = 3 * SAMPLES_AT_ONCE + 5
    stores, places = mixture.deal(11, number)
    halves = [mixture.deal(11, number // 2), mixture.deal(11 + number // 2, number - number // 2)]
    assert np.array_equal(stores, np.concatenate([half[0] for half in halves]))
    assert np.array_equal(places, np.concatenate([half[1] for half in halves]))


@settings(max_examples=60, deadline=None)
@given(stages=mixtures(), later=mixtures())
def test_a_later_stage_changes_nothing_before_it(stages: list[Weighting], later: list[Weighting]):
    begins = stages[-1].first_sample + 300
    weights = (later[0].weights * 64)[: len(stages[0].weights)]
    before, after = Mixture(stages), Mixture([*stages, Weighting(begins, weights)])
    assert np.array_equal(before.deal(0, begins), after.deal(0, begins))


@settings(max_examples=60, deadline=None)
@given(stages=mixtures())
def test_a_store_without_weight_is_absent(stages: list[Weighting]):
    stores, _ = Mixture(stages).deal(0, NUM_SAMPLES)
    ends = [*(stage.first_sample for stage in stages[1:]), NUM_SAMPLES]
    for stage, end in zip(stages, ends, strict=True):
        absent = [store for store, weight in enumerate(stage.weights) if weight == 0]
        assert not np.isin(stores[stage.first_sample : end], absent).any()


def test_weights_are_exact_however_large_they_are():
    """1 sample in 10^12 + 1, where a weight rounded to 30 bits would have none or a thousand."""
    mixture = of_weights(10**12, 1)
    assert mixture.counts(10**15) == [10**15 - 1000, 1000]
    assert mixture.counts((10**12 + 1) * 10**6) == [10**18, 10**6]


@pytest.mark.parametrize("scale", [1, 10, Fraction(1, 7)])
def test_only_the_ratio_of_weights_counts(scale: Fraction):
    weights = [Fraction(3), Fraction(2), Fraction(1, 3)]
    one = Mixture([Weighting(0, tuple(weights))])
    other = Mixture([Weighting(0, tuple(weight * scale for weight in weights))])
    assert np.array_equal(one.deal(0, 1000), other.deal(0, 1000))


def test_the_order_of_stores_is_frozen():
    """Another order would silently change what a resumed run trains on."""
    stages = [
        Weighting(0, (Fraction(5), Fraction(3), Fraction(2))),
        Weighting(20, (Fraction(1), Fraction(0), Fraction(3))),
    ]
    mixture = Mixture(stages)
    expected = "010201020101020102012022202220"
    assert "".join(map(str, mixture.deal(0, 30)[0])) == expected
    assert mixture.counts(10**9) == [250_000_005, 6, 749_999_989]


@settings(max_examples=40, deadline=None)
@given(
    stages=mixtures(most_stores=8),
    seed=st.integers(0, 2**40),
    lengths=st.lists(st.integers(1, 50), min_size=8, max_size=8),
)
def test_each_row_comes_once_in_an_epoch_of_its_store(stages: list[Weighting], seed: int, lengths: tuple[int, ...]):
    lengths = lengths[: len(stages[0].weights)]
    order = Order([RowShuffle(rows, seed=seed_of_store(seed, k)) for k, rows in enumerate(lengths)], Mixture(stages))
    samples = order.samples(0, NUM_SAMPLES)
    for store, length in enumerate(lengths):
        rows, epochs = samples.rows[samples.stores == store], samples.epochs[samples.stores == store]
        for epoch in range(len(rows) // length):
            assert np.array_equal(np.sort(rows[epoch * length : (epoch + 1) * length]), np.arange(length))
        assert np.array_equal(epochs, np.arange(len(rows)) // length)


def test_stores_of_one_size_are_shuffled_each_on_its_own():
    order = Order([RowShuffle(1000, seed=seed_of_store(7, store)) for store in range(3)], of_weights(1, 1, 1))
    samples = order.samples(0, 3000)
    rows = [samples.rows[samples.stores == store] for store in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (rows[one] == rows[other]).mean() < 0.02
    assert np.array_equal(rows[0], RowShuffle(1000, seed=7).rows(np.arange(1000))[0])


# ------------------------------------------------------------------------------------------------- of a config


def config_of(*, steps: int = 100, batch: int = 4, stages: str = "[]", more: Sequence[str] = ()) -> Config:
    mixture = "data.mixture=[{store: web, weight: 0.7}, {store: /data/code, weight: 0.3}]"
    sizes = [f"train.steps={steps}", f"train.global_batch_size={batch}"]
    return load_config("quickstart", ["data.source=null", mixture, f"data.stages={stages}", *sizes, *more])


def test_a_stage_begins_with_the_first_sample_of_its_step():
    stages = "[{from_step: 11, weights: {code: 1, web: 0}}]"
    stores, _ = mixture_of(config_of(stages=stages).data, 4).deal(0, 80)
    assert (stores[:40] == 0).sum() == 28 and (stores[40:] == 1).all()


def test_weights_are_read_as_they_are_written():
    """As floats 0.7 + 0.3 is no 1, and 0.3 is 0.299999999999999988897769753748."""
    assert mixture_of(config_of().data, 4).counts(10**17) == [7 * 10**16, 3 * 10**16]


def test_a_stage_from_the_first_step_takes_the_place_of_the_weights():
    mixture = mixture_of(config_of(stages="[{from_step: 1, weights: {code: 1, web: 0}}]").data, 4)
    assert mixture.counts(100) == [0, 100]


@pytest.mark.parametrize(("most", "step"), [("1", 72), ("1.5", 108), ("0.004", 1)])
def test_the_step_at_which_a_store_runs_out_is_told_exactly(most: str, step: int):
    config = config_of(steps=1000, more=[f"data.max_epochs={most}"])
    with pytest.raises(DataError) as raised:
        refuse_used_up(config, [200, 10**6])
    assert str(raised.value) == (
        f"data.max_epochs is {most}: store web runs out at step {step} of 1,000: it has 200 rows, and the run takes "
        "2,800 (14 epochs). Raise data.max_epochs, lower train.steps or the weight, give a stage that leaves the store "
        "out, or add text"
    )
    counts = [mixture_of(config.data, 4).counts(4 * each)[0] for each in (step - 1, step)]
    assert counts[0] <= int(float(most) * 200) < counts[1]
    refuse_used_up(
        config_of(steps=step - 1 or 1, more=[f"data.max_epochs={most}"]), [200 if step > 1 else 10**5, 10**6]
    )


def test_a_stage_that_leaves_a_store_out_keeps_it_from_running_out():
    stages = "[{from_step: 72, weights: {code: 1, web: 0}}]"
    refuse_used_up(config_of(steps=1000, stages=stages, more=["data.max_epochs=1"]), [200, 10**6])


def test_epochs_are_counted_by_the_decimal_that_was_given():
    def config(most: str, steps: int) -> Config:
        return load_config(
            "quickstart",
            [
                f"data.max_epochs={most}",
                f"train.steps={steps}",
                "train.global_batch_size=1",
                "optimizer.warmup_steps=1",
            ],
        )

    refuse_used_up(config("0.29", 29), [100])
    with pytest.raises(DataError, match="runs out at step 30 of 30"):
        refuse_used_up(config("0.29", 30), [100])
    refuse_used_up(config("1e308", 29), [100])


def test_one_store_alone_may_run_out_too():
    config = load_config("quickstart", ["train.steps=10", "train.global_batch_size=4", "data.max_epochs=1"])
    with pytest.raises(DataError, match="runs out at step 3 of 10: it has 8 rows, and the run takes 40"):
        refuse_used_up(config, [8])
    refuse_used_up(config, [40])


def test_what_a_run_takes_of_each_store_is_told():
    assert list(epochs_in_words(config_of(steps=1000), [200, 10**6])) == [
        "data: web: 70.0% of the samples, 14 epochs",
        "data: code: 30.0% of the samples, 0.0012 epochs",
    ]


@settings(max_examples=30, deadline=None)
@given(
    stages=mixtures(most_stores=5),
    data_size=st.integers(1, 64),
    rows_per_rank=st.integers(1, 3),
    blocks=st.booleans(),
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_the_samples_of_a_step_are_the_same_at_every_world_size(
    stages: list[Weighting], data_size: int, rows_per_rank: int, blocks: bool, steps: list[int]
):
    """Also from a step on that another world size came to."""
    batch = data_size * rows_per_rank

    def loader(data_rank: int, size: int) -> Loader:
        shuffles = [
            BlockShuffle(97, seed=store, block_rows=8, lanes=4) if blocks else RowShuffle(97, seed=store)
            for store in range(len(stages[0].weights))
        ]
        rows: list[Any] = [SimpleNamespace(rows_per_sample=1)] * len(shuffles)
        order = Order(shuffles, Mixture(stages))
        return Loader(rows, order, global_batch_size=batch, data_rank=data_rank, data_size=size)

    alone = loader(0, 1)
    ranks = [loader(rank, data_size) for rank in range(data_size)]
    for step in steps:
        together = [np.concatenate(column) for column in zip(*(rank.samples(step) for rank in ranks), strict=True)]
        assert np.array_equal(together, alone.samples(step))
