"""Every script in benchmarks/ runs, at a size of seconds. What it measures then is not judged."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from raynium.chaos.sessions import kill_started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("bench_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_benchmark_runs_at_a_tiny_size(script: Path, tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), "--tiny"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(540)
        finally:
            kill_started([process])
    printed = (tmp_path / "output").read_text()
    assert code == 0, printed
    assert f"`python tests/benchmarks/{script.name} --tiny`, commit " in printed, "no line for RESULTS.md"


def test_make_bench_runs_every_benchmark() -> None:
    benchmarks = runpy.run_path(str(FOLDER / "run.py"))["BENCHMARKS"]
    assert {script for script, *_ in benchmarks} == {script.name for script in SCRIPTS}
