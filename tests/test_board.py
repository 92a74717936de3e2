"""What the coordinator shows: who is behind when no step comes."""

import pytest

from raynium.run.board import Board
from raynium.run.positions import RankPosition

pytestmark = pytest.mark.quick


def texts(board: Board) -> list[str]:
    return [each.text for each in board.events(after=0)]


def test_a_line_says_after_2_4_and_8_minutes_that_no_step_came_and_a_step_begins_anew() -> None:
    board = Board(now=0)
    board.generation_begins(54, now=10)
    board.positions({0: RankPosition(56), 1: RankPosition(55)})
    for second in range(10, 600):
        board.check_silence(now=second)
    assert texts(board) == ["no step for 2:00: rank 1 is in step 55", "no step for 4:00: rank 1 is in step 55",
                            "no step for 8:00: rank 1 is in step 55"]  # fmt: skip
    board.report(55, {}, now=600)
    board.check_silence(now=719)
    assert len(texts(board)) == 3
    board.check_silence(now=721)
    assert texts(board)[3].startswith("no step for 2:01: ")


@pytest.mark.parametrize(
    "positions, said",
    [
        ({}, "no rank has said where it is"),
        ({0: RankPosition(4), 1: RankPosition(4)}, "all 2 ranks are in step 4"),
        ({0: RankPosition(1_204)}, "rank 0 is in step 1,204"),
        ({0: RankPosition(4), 1: RankPosition(0, "start")}, "rank 1 is starting"),
        ({0: RankPosition(4, "save"), 1: RankPosition(4, "evaluate")}, "rank 1 is evaluating after step 4"),
        ({0: RankPosition(4, "save"), 1: RankPosition(5)}, "rank 0 is saving step 4"),
        ({0: RankPosition(4), 1: RankPosition(4, halted=True)}, "rank 1 is in step 4, stopped by a signal"),
        ({0: RankPosition(9, "compile"), 1: RankPosition(10)}, "rank 0 is compiling in step 9"),
        ({0: RankPosition(9, "fetch"), 1: RankPosition(9)}, "rank 0 is waiting for the data of step 9"),
        ({0: RankPosition(9, still_seconds=3.0), 1: RankPosition(9, still_seconds=4.0)}, "all 2 ranks are in step 9"),
        ({0: RankPosition(9, "dance"), 1: RankPosition(10)}, "rank 0 is in phase 'dance'"),
        (
            {rank: RankPosition(7 if rank < 6 else 8) for rank in range(8)},
            "ranks 0, 1, 2, 3 and 2 more are in step 7",
        ),
    ],
)
def test_the_rank_that_is_behind_is_named(positions: dict[int, RankPosition], said: str) -> None:
    board = Board(now=0)
    board.positions(positions)
    board.check_silence(now=120)
    assert texts(board) == [f"no step for 2:00: {said}"]
