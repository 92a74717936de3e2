"""How long the command line takes to answer: python tests/benchmarks/bench_cli.py

`raynium --help` as a whole process, against `python -c pass` in the same run. Passes if the median is under 0.3 s.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmark import heading, parser, verdict

MOST_SECONDS = 0.3
RUNS = 15


def main() -> int:
    tiny = parser(__doc__).parse_args().tiny
    heading()
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "raynium --help": [str(Path(sys.executable).parent / "raynium"), "--help"],
        "raynium train --help": [str(Path(sys.executable).parent / "raynium"), "train", "--help"],
        "python -c 'import raynium'": [sys.executable, "-c", "import raynium"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 if tiny else RUNS):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    bare = statistics.median(seconds["python -c pass"])
    print("| command | median, s | smallest, s | times python |")
    print("|---|---|---|---|")
    for name, runs in seconds.items():
        median = statistics.median(runs)
        print(f"| `{name}` | {median:.3f} | {min(runs):.3f} | {median / bare:.1f} |")
    median = statistics.median(seconds["raynium --help"])
    print(f"\nraynium --help takes {median:.3f} s, at most {MOST_SECONDS} s")
    return verdict(median <= MOST_SECONDS, tiny)


if __name__ == "__main__":
    sys.exit(main())
