"""Learning-rate schedules by whole sequences."""

import subprocess
import sys

import pytest

from raynium.config.schema import OptimizerSection
from raynium.engines.optim import decays, learning_rate

pytestmark = pytest.mark.quick


def rates(total_steps: int, **settings: object) -> list[float]:
    optimizer = OptimizerSection.model_validate({"learning_rate": 1.0, "final_learning_rate_ratio": 0.2, **settings})
    return [learning_rate(optimizer, step=step, total_steps=total_steps) for step in range(1, total_steps + 1)]


def test_warm_up_then_constant() -> None:
    assert rates(6, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_at_the_end_of_warm_up_to_the_final_ratio() -> None:
    half_root = 0.8 * (1 + 2**-0.5) / 2
    expected = [0.5, 1.0, 0.2 + half_root, 0.6, 1.0 - half_root, 0.2]
    assert rates(6, schedule="cosine", warmup_steps=2) == pytest.approx(expected)


def test_wsd_holds_the_peak_and_then_falls_in_a_line() -> None:
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(10, schedule="wsd", warmup_steps=2, decay_fraction=0.4) == pytest.approx(expected)


def test_wsd_without_decay_is_constant() -> None:
    assert rates(3, schedule="wsd", decay_fraction=0.0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule: str) -> None:
    assert rates(3, schedule=schedule, warmup_steps=4) == [0.25, 0.5, 0.75]


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert rates(2, schedule="cosine", warmup_steps=2) == [0.5, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_warm_up_the_first_step_is_near_the_peak_and_the_last_at_the_final_rate(schedule: str) -> None:
    sequence = rates(1000, schedule=schedule)
    assert sequence[0] == pytest.approx(1.0, abs=1e-4)
    assert sequence[-1] == pytest.approx(0.2)
    assert sequence == sorted(sequence, reverse=True)


def test_a_step_outside_the_run_is_our_own_mistake() -> None:
    for step in (0, 11):
        with pytest.raises(AssertionError, match=f"step {step} of 10"):
            learning_rate(OptimizerSection(), step=step, total_steps=10)


def test_matrices_decay_and_norms_do_not() -> None:
    assert decays((64, 32)) and not decays((32,))


def test_importing_the_schedules_loads_no_torch() -> None:
    modules = (
        "raynium.engines.optim, raynium.models.flops, raynium.models.plan, raynium.models.names, raynium.accelerators"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
