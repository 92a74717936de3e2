"""How long the last checkpoint is tried."""

import pytest

from raynium.run.last_save import LAST_SAVE_SECONDS, pause_before_next_try

pytestmark = pytest.mark.quick


def test_pauses_grow_to_a_minute_and_end_after_the_time_that_is_told() -> None:
    pauses: list[float] = []
    while (pause := pause_before_next_try(len(pauses) + 1, sum(pauses))) is not None:
        pauses.append(pause)
    assert pauses == [2, 4, 8, 16, 32, *[60] * 8, 58]
    assert sum(pauses) == LAST_SAVE_SECONDS == 600
