"""What the ranks of `test_ranks.py` run in place of training. Imported in their processes by name."""

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from raynium.accelerators.cpu import CpuAccelerator
from raynium.errors import DataError
from raynium.rank.entry import train_plan
from raynium.rank.group import RENDEZVOUS_VARIABLE
from raynium.rank.plan import RankPlan
from raynium.train.loop import Outcome


def finish(plan_json: str, link: Any) -> Outcome:
    """Says a few lines, the last without an end, and finishes at the step that the plan says."""
    link.phase("up", 0)
    sys.stdout.write("to stdout\n")
    sys.stderr.write("to stderr\n")
    sys.stdout.write("ünfinished")
    return Outcome(json.loads(plan_json)["step"], "finished")


def look_around(plan_json: str, link: Any) -> Outcome:
    """Reports this process: its environment, and which libraries it has."""
    found = {
        "environment": {name: os.environ.get(name) for name in json.loads(plan_json)["names"]},
        "loaded": sorted({"ray", "mlflow", "torch", "raynium.rank.build"} & set(sys.modules)),
        "main": sys.modules["__main__"].__name__,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return Outcome(0, "finished")


def stop_when_told(plan_json: str, link: Any) -> Outcome:
    link.phase("up", 0)
    while not link.stop_requested():
        time.sleep(0.001)
    return Outcome(5, "stopped")


def out_of_memory(plan_json: str, link: Any) -> NoReturn:
    sys.stdout.write("last words\n")  # without a flush: the kernel's killer does not wait for one
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def real_time_signal(plan_json: str, link: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGRTMIN + 6)
    raise AssertionError


def crash(plan_json: str, link: Any) -> Outcome:
    """A null pointer in native code."""
    ctypes.string_at(0)
    raise AssertionError


def bad_data(plan_json: str, link: Any) -> NoReturn:
    raise DataError("no documents")


def broken_network(plan_json: str, link: Any) -> NoReturn:
    sys.stdout.write("connecting\n")
    raise RuntimeError("connection reset by peer")


def leave(plan_json: str, link: Any) -> NoReturn:
    os._exit(json.loads(plan_json)["code"])


def hold_the_gil(plan_json: str, link: Any) -> NoReturn:
    """Stuck in native code: no thread of this process runs Python again, so none can notice anything."""
    sys.stdout.write(f"{os.getpid()}\n")
    ctypes.PyDLL(None).sleep(300)
    raise AssertionError


def fail_while_compiling(plan_json: str, link: Any) -> NoReturn:
    """Says the pid of a process of its own, which does not end by itself, and raises; or hangs, as the plan says."""
    compiler = subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sys.stdout.write(f"{compiler.pid}\n")
    if json.loads(plan_json)["hangs"]:
        compiler.wait()
    raise RuntimeError("connection reset by peer")


def compile_for_long(plan_json: str, link: Any) -> NoReturn:
    """Says the pids of a compiler and of its helper, which has none of its environment, and waits for them."""
    command = ["sh", "-c", "env -i sleep 300 & echo $$ $!; wait"]
    compiler = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert compiler.stdout is not None
    sys.stdout.write(compiler.stdout.readline())
    compiler.wait()
    raise AssertionError


def never_end_a_line(plan_json: str, link: Any) -> Outcome:
    """A progress bar."""
    for number in range(4000):
        sys.stdout.write(f"\r{number:-<99}")
    sys.stdout.flush()
    return Outcome(0, "finished")


def write_what_is_there(file: str) -> None:
    """Of a process that was just forked from the template: no program of a rank, but in its place."""
    import torch

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = torch.ones(2**24)  # 64 MiB
    found = {
        "modules": sorted(sys.modules),
        "threads_of_template": len(os.listdir(f"/proc/{os.getppid()}/task")),
        "left_alone_by_gc": gc.get_freeze_count(),
        "bytes_per_fault": memory.nbytes / (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults),
    }
    Path(file).write_text(json.dumps(found))


def train_and_write_modules(plan_json: str, link: Any) -> Outcome:
    """A rank as it is. Writes what it has loaded in the end, except code that the compiler has generated."""
    CpuAccelerator.compile_backend = os.environ["TEST_COMPILE_BACKEND"]
    outcome = train_plan(plan_json, link)
    plan = RankPlan.from_json(plan_json)
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    generated = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    names = sorted(name for name, file in files.items() if not file.startswith(generated))
    Path(plan.image_folder, f"modules-{os.environ['RANK']}.json").write_text(json.dumps(names))
    return outcome


def rehearse_nothing(plan_json: str) -> None:
    pass


def rehearse_and_fail(plan_json: str) -> None:
    raise RuntimeError("no rehearsal")


def rehearse_for_ever(plan_json: str) -> None:
    time.sleep(600)


def tell_place(plan_json: str, link: Any) -> Outcome:
    """Says who this process is, what it was given, and where it may listen; ends when it is told to."""
    descriptor = os.environ.get(RENDEZVOUS_VARIABLE)
    told = {
        "pid": os.getpid(),
        "name": Path("/proc/self/comm").read_text().strip(),
        "generation": os.environ["GENERATION"],
        "plan": plan_json,
        "listens": None if descriptor is None else socket.socket(fileno=int(descriptor)).getsockname(),
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return stop_when_told(plan_json, link)
