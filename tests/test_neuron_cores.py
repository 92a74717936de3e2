"""Which cores a node's ranks take, from what Ray said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynium.accelerators.cores import parse_cores, rank_cores
from raynium.errors import LaunchError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0,1,10,11,2,3,4,5,6,7,8,9", tuple(range(12))),  # as Ray Train v1 sorted them
        ("0-31", tuple(range(32))),
        ("8-11,0-3", (0, 1, 2, 3, 8, 9, 10, 11)),
        (" 5 ", (5,)),
    ],
)
def test_cores_are_numbers_in_numeric_order(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


@given(st.sets(st.integers(0, 200), min_size=1))
def test_any_order_of_the_same_cores_is_the_same(cores: set[int]) -> None:
    assert parse_cores(",".join(sorted(map(str, cores)))) == tuple(sorted(cores))


@pytest.mark.parametrize("text", ["", "a", "1,,2", "3-1", "1-2-3", "-1", "0x1"])
def test_text_that_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="no core or range: give whole numbers and inclusive ranges such as 0-31"):
        parse_cores(text)


def test_a_core_belongs_to_one_rank() -> None:
    with pytest.raises(LaunchError, match="names a core twice"):
        parse_cores("0-3,3")


def test_ranks_take_neighbouring_cores_in_order() -> None:
    assert rank_cores("0,1,10,11,2,3,4,5,6,7,8,9", local_world_size=12) == tuple(range(12))
    assert rank_cores("12,13,14,15", local_world_size=4) == (12, 13, 14, 15)
    assert rank_cores("3", local_world_size=1) == (3,)


def test_without_a_grant_the_job_owns_the_node() -> None:
    assert rank_cores(None, local_world_size=4) == (0, 1, 2, 3)


@pytest.mark.parametrize("granted", ["0-11", "0"])
def test_one_core_a_rank(granted: str) -> None:
    with pytest.raises(LaunchError, match=r"2 ranks were given \d+ NeuronCore\(s\) .* set cluster.ranks_per_node to"):
        rank_cores(granted, local_world_size=2)


@pytest.mark.parametrize("granted", ["2-5", "0,1,4,5"])
def test_a_block_is_unbroken_and_aligned(granted: str) -> None:
    with pytest.raises(LaunchError, match="unbroken block of 4 that begins at a multiple of 4"):
        rank_cores(granted, local_world_size=4)
