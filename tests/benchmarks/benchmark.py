"""What every benchmark here has: `--tiny`, and the line that stands above its tables in RESULTS.md."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--tiny`: sizes so small that the script is done in seconds. It then judges no figure.

    tests/test_benchmarks.py runs every script that way.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="only show that it runs: a few seconds, nothing is judged")
    return made


def heading() -> None:
    """Prints the command, the commit, the day and the machine."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    commit = described.stdout.strip() or "unknown"
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    print(f"`{command}`, commit {commit}, {datetime.date.today()}; {machine()}; {versions}\n", flush=True)


def machine() -> str:
    """For example "2 × Intel Xeon (AMX), 24 GiB"."""
    with Path("/proc/cpuinfo").open() as file:
        fields = dict(line.strip().partition(":")[::2] for line in file if ":" in line)
    of_cpu = {key.strip(): value.strip() for key, value in fields.items()}
    amx = " (AMX)" if "amx_bf16" in of_cpu.get("flags", "") else ""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} × {of_cpu.get('model name', platform.machine())}{amx}, {gib:.0f} GiB"


def verdict(passed: bool, tiny: bool) -> int:
    """The exit status."""
    return 0 if passed or tiny else 1
