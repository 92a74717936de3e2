"""What a metric point costs, and how fast a backlog leaves. Run: `python tests/benchmarks/bench_tracking.py`."""

import statistics
import tempfile
import time
from pathlib import Path

from benchmark import heading, parser

from raynium.tracking.runs import open_run, read_metric
from raynium.tracking.sender import MlflowTracker

NAMES = (
    *("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "time/step_seconds"),
    *("throughput/tokens_per_second", "throughput/mfu_6n", "time/data_seconds"),
)
NUM_STEPS = 10_000


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    num_steps = 200 if parser(__doc__).parse_args().tiny else NUM_STEPS
    heading()
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"

        def open_new() -> str:
            return open_run(uri, experiment="bench", run_name="b", run_id=None, params={"a": 1}, tags={}).run_id

        print(f"first open_run (import of mlflow, new SQLite file): {seconds_of(open_new):.2f} s")
        print(f"second open_run: {seconds_of(open_new) * 1e3:.0f} ms")

        run_id = open_new()
        tracker = MlflowTracker(Path(folder) / "spool", uri=uri, run_id=run_id)
        values = dict.fromkeys(NAMES, 0.123456789)
        append_seconds = [
            seconds_of(lambda step=step: tracker.append(values, step=step, unix_ms=step)) for step in range(num_steps)
        ]
        quantiles = statistics.quantiles(append_seconds, n=1000)
        print(
            f"append of {len(NAMES)} metrics while the sender works: median {quantiles[499] * 1e6:.0f} µs, "
            f"99.9 % {quantiles[998] * 1e3:.1f} ms, longest {max(append_seconds) * 1e3:.1f} ms"
        )
        seconds = seconds_of(lambda: tracker.close(timeout_seconds=300))
        num_points = num_steps * len(NAMES)
        print(f"backlog of {num_points} points into SQLite: {num_points / seconds:.0f} points/s")

        # A resume that repeats the last 100 steps must read the history of each metric once.
        tracker = MlflowTracker(Path(folder) / "spool-of-another-node", uri=uri, run_id=run_id)
        for step in range(num_steps - 100, num_steps + 100):
            tracker.append(values, step=step, unix_ms=10**9 + step)
        seconds = seconds_of(lambda: tracker.close(timeout_seconds=300))
        print(f"resume 100 steps back after {num_steps} steps: repeats dropped in {seconds:.1f} s (sender's thread)")
        assert len(read_metric(uri, run_id, "train/loss")) == num_steps + 100


if __name__ == "__main__":
    main()
