"""Installs Raynium into the environment of the Python that runs this, which `make` does: `python install.py [--dev]`.

On Linux x86-64 without an accelerator: the locked packages and PyTorch's CPU build, and nothing is resolved. Elsewhere,
and where only PyTorch's CUDA build is to be had: whatever suits the machine, at the locked versions where they do.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
LOCKS = {False: ["constraints.txt"], True: ["constraints.txt", "constraints-dev.txt"]}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Kernel interfaces of an NVIDIA and of a Neuron driver.
ACCELERATORS = [Path("/proc/driver/nvidia"), Path("/dev/neuron0")]
INDEX_SECONDS = 5
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=INDEX_SECONDS):
            return True
    except OSError:
        return False


def is_cpu_build(torch: str) -> bool:
    """Whether pip, as it is configured here, would take a torch that brings no CUDA libraries. Downloads no package."""
    dry_run = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", torch]
    (found,) = json.loads(run([*PIP, *dry_run], stdout=subprocess.PIPE))["install"]
    needs = " ".join(found["metadata"].get("requires_dist", []))
    return not any(word in needs for word in ("nvidia", "cuda"))


def commands(*, dev: bool, locked: bool, cpu_index: bool, uv: str | None) -> list[list[str]]:
    """What is run, in order. cpu_index: PyTorch's own answers, and this machine has no accelerator."""
    locks = [str(HERE / lock) for lock in LOCKS[dev]]
    package = f"{HERE}[dev]" if dev else str(HERE)
    # Only with PyTorch's index does uv, which reads none of pip's settings, find the same CPU build.
    if uv and (cpu_index or not locked):
        install = [uv, "pip", "install", "--python", sys.executable, *(["--torch-backend", "cpu"] if cpu_index else [])]
    else:
        # As uv: what is never imported need not be compiled, and what is compiles itself then.
        install = [*PIP, "install", "--quiet", "--no-compile", *(["--extra-index-url", CPU_INDEX] if cpu_index else [])]
    if not locked:
        return [[*install, *(part for lock in locks for part in ("-c", lock)), "-e", package]]
    return [
        [*install, "--no-deps", *(part for lock in locks for part in ("-r", lock))],
        # setuptools, which builds it, is one of the locked packages.
        [*install, "--no-deps", "--no-build-isolation", "-e", str(HERE)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="install Raynium for this Python")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    dev = parser.parse_args().dev
    (torch,) = (line for line in (HERE / LOCKS[False][0]).read_text().splitlines() if line.startswith("torch=="))

    lockable = (sys.platform, platform.machine()) == ("linux", "x86_64") and not any(map(Path.exists, ACCELERATORS))
    cpu_index = lockable and answers(CPU_INDEX)
    locked = lockable and (cpu_index or is_cpu_build(torch))
    uv = shutil.which("uv")
    if locked:
        size = "PyTorch for CPUs; 2.1 GB on disk"
    elif sys.platform == "linux":
        size = "PyTorch with its CUDA libraries, 5.5 GB on disk"
    else:
        size = "2 GB on disk or more"
    print(f"installing into {sys.prefix}: {size}", flush=True)
    for command in commands(dev=dev, locked=locked, cpu_index=cpu_index, uv=uv):
        run(command)


def run(command: list[str], *, stdout: int | None = None) -> str:
    """What it printed, if `stdout` is a pipe. Ends this process if it fails: it has said on stderr why."""
    done = subprocess.run(command, stdout=stdout, text=True)
    if done.returncode:
        sys.exit(f"error: this failed with status {done.returncode}: {' '.join(command)}")
    return done.stdout


if __name__ == "__main__":
    main()
