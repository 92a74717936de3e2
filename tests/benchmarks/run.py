"""Runs every benchmark as RESULTS.md has them, and prints what goes there: python tests/benchmarks/run.py  (make bench)

One fails that misses what it requires, or that takes longer than the minutes given here: twice what it took on two
quiet cores, or more. The others run all the same.
"""

import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
# Script, options → minutes at most.
BENCHMARKS = {
    ("bench_cli.py",): 2,
    ("bench_quickstart.py",): 20,
    ("bench_loop.py",): 15,
    ("bench_loader.py",): 4,
    ("bench_mixture.py",): 4,
    ("bench_packed_attention.py",): 4,
    ("bench_lora.py",): 6,
    ("bench_head.py", "--turns", "1"): 15,
    ("bench_sft.py",): 6,
    ("bench_sampling.py",): 6,
    ("bench_streaming.py",): 10,
    ("bench_tokenising.py",): 12,
    ("bench_tracking.py",): 5,
    ("bench_recovery.py",): 15,
    ("bench_audit.py",): 3,
    ("bench_nodes.py",): 30,
    ("bench_coordinator.py",): 1,
    ("bench_init.py",): 5,
    ("bench_manifest.py",): 12,
    ("bench_checkpoint_stall.py", "--gib", "1"): 12,
    ("bench_checkpoint_storage.py", "--gib", "1", "--turns", "2"): 15,
    ("bench_checkpoint_load.py", "--gib", "1", "--loads", "2"): 12,
}


def main() -> int:
    failed = []
    for (script, *options), minutes in BENCHMARKS.items():
        began = time.monotonic()
        print(f"## {script}: at most {minutes} minutes\n", flush=True)
        try:
            code = subprocess.run([sys.executable, str(FOLDER / script), *options], timeout=60 * minutes).returncode
        except subprocess.TimeoutExpired:
            code = 124
        print(f"\n{script} ended with {code} after {(time.monotonic() - began) / 60:.1f} minutes\n", flush=True)
        if code:
            failed.append(script)
    print(f"failed: {', '.join(failed)}" if failed else "all reached what they require")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
