"""Blocks shuffled and dealt to lanes: each row once an epoch, few blocks in use, the same from any point on."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raynium.data.order.block_shuffle import BlockShuffle
from raynium.data.order.permutation import shuffled, shuffled_within

pytestmark = pytest.mark.quick


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(1, 3000),
    block_rows=st.integers(1, 100),
    lanes=st.integers(1, 70),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2**20),
)
@example(num_rows=1, block_rows=1, lanes=1, seed=0, epoch=0)
@example(num_rows=64, block_rows=8, lanes=8, seed=0, epoch=0)
@example(num_rows=65, block_rows=8, lanes=8, seed=0, epoch=3)
@example(num_rows=5, block_rows=100, lanes=64, seed=0, epoch=0)
def test_each_row_comes_once_an_epoch(num_rows: int, block_rows: int, lanes: int, seed: int, epoch: int):
    shuffle = BlockShuffle(num_rows, seed=seed, block_rows=block_rows, lanes=lanes)
    rows, epochs = shuffle.rows(np.arange(epoch * num_rows, (epoch + 1) * num_rows))
    assert np.array_equal(np.sort(rows), np.arange(num_rows)) and (epochs == epoch).all()


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 800),
    block_rows=st.integers(1, 40),
    lanes=st.integers(1, 20),
    places=st.lists(st.integers(0, 10_000), min_size=1, max_size=50),
)
def test_any_place_can_be_asked_for_alone(num_rows: int, block_rows: int, lanes: int, places: list[int]):
    shuffle = BlockShuffle(num_rows, seed=5, block_rows=block_rows, lanes=lanes)
    rows, epochs = shuffle.rows(np.array(places))
    for place, row, epoch in zip(places, rows.tolist(), epochs.tolist(), strict=True):
        [alone], [its_epoch] = shuffle.rows(np.array([place]))
        assert (alone, its_epoch) == (row, epoch)


@settings(max_examples=100, deadline=None)
@given(num_rows=st.integers(1, 4000), block_rows=st.integers(1, 60), lanes=st.integers(1, 30))
def test_no_more_blocks_than_lanes_are_in_use_at_any_time(num_rows: int, block_rows: int, lanes: int):
    """A block is in use from its first row to its last."""
    rows, _ = BlockShuffle(num_rows, seed=1, block_rows=block_rows, lanes=lanes).rows(np.arange(num_rows))
    blocks = rows // block_rows
    begins, ends = np.zeros(num_rows + 1, int), np.zeros(num_rows + 1, int)
    for block in np.unique(blocks):
        places = np.flatnonzero(blocks == block)
        begins[places[0]] += 1
        ends[places[-1] + 1] += 1
    assert (np.cumsum(begins) - np.cumsum(ends)).max() <= lanes


def test_a_lane_reads_its_blocks_one_after_the_other():
    num_rows, block_rows, lanes = 10 * 8 * 16 + 37, 16, 8
    shuffle = BlockShuffle(num_rows, seed=2, block_rows=block_rows, lanes=lanes)
    places = np.arange(10 * 8 * 16)
    rows, _ = shuffle.rows(places)
    for lane in range(lanes):
        blocks = (rows[shuffle.lanes(places) == lane] // block_rows).reshape(-1, block_rows)
        assert (blocks == blocks[:, :1]).all() and len(np.unique(blocks[:, 0])) == 10


def test_epochs_seeds_and_blocks_have_orders_of_their_own():
    def order(seed: int, epoch: int) -> np.ndarray:
        shuffle = BlockShuffle(8192, seed=seed, block_rows=256, lanes=4)
        return shuffle.rows(np.arange(epoch * 8192, (epoch + 1) * 8192))[0]

    for first, second in itertools.combinations([order(seed, epoch) for seed in range(2) for epoch in range(2)], 2):
        assert (first == second).mean() < 0.01
    within = [shuffled_within(np.arange(256), np.full(256, block), length=256, seed=0, epoch=0) for block in range(20)]
    for first, second in itertools.combinations([*within, shuffled(np.arange(256), length=256, seed=0, epoch=0)], 2):
        assert (first == second).mean() < 0.05  # chance: 0.004


def test_the_rows_of_a_block_are_shuffled_like_a_random_permutation():
    """Correlation of place with value, and of neighbours, each about normal with deviation 1/sqrt(length)."""
    length, z_scores = 2048, []
    for block in range(60):
        values = shuffled_within(np.arange(length), np.full(length, block), length=length, seed=3, epoch=1)
        places, centred = np.arange(length) - (length - 1) / 2, values - values.mean()
        variance = (centred**2).mean()
        z_scores.append((places * centred).mean() / variance * np.sqrt(length))
        z_scores.append((centred[1:] * centred[:-1]).mean() / variance * np.sqrt(length))
    assert np.abs(z_scores).max() < 5 and 0.7 < np.std(z_scores) < 1.3


def test_a_huge_store_takes_any_place():
    shuffle = BlockShuffle(10**12 + 39, seed=0, block_rows=2048, lanes=64)
    rows, epochs = shuffle.rows(np.array([0, 64, 10**12 + 38, 10**12 + 39]))
    assert epochs.tolist() == [0, 0, 0, 1] and len(set(rows.tolist())) == 4
    assert rows[0] // 2048 == rows[1] // 2048


def test_the_order_is_frozen():
    """Another order would silently change what a resumed run trains on."""
    rows, _ = BlockShuffle(30, seed=0, block_rows=4, lanes=3).rows(np.arange(30))
    assert rows.tolist() == [
        13,
        11,
        5,
        12,
        9,
        4,
        14,
        8,
        6,
        15,
        10,
        7,
        25,
        0,
        18,
        26,
        3,
        17,
        24,
        1,
        19,
        27,
        2,
        16,
        23,
        21,
        22,
        29,
        20,
        28,
    ]
