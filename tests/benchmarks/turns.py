"""Loops that are compared, each in a process of its own: they take turns, so that what else the machine does falls on
all of them."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@contextmanager
def in_processes(run: Callable[..., None], names: Iterable[str], *arguments: Any) -> Iterator[dict[str, Connection]]:
    """Starts `run(name, *arguments, connection)` for each name, and gives the other ends; all are killed at the end."""
    spawn, connections, processes = multiprocessing.get_context("spawn"), dict[str, Connection](), []
    try:
        for name in names:
            connections[name], there = spawn.Pipe()
            process = spawn.Process(target=run, args=(name, *arguments, there), daemon=True)
            process.start()
            processes.append(process)
            there.close()
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.join()


def by_turns(connections: Mapping[str, Connection], turns: int) -> dict[str, list[Any]]:
    """What each answers to the "go" of each turn, but of the first one, which warms up."""
    answers: dict[str, list[Any]] = {name: [] for name in connections}
    for turn in range(turns + 1):
        for name, connection in connections.items():
            connection.send("go")
            answer = connection.recv()
            if turn > 0:
                answers[name].append(answer)
    return answers


def take_turns(make: Callable[[], Callable[[int], float]], connection: Connection, *, steps: int = 1) -> None:
    """Answers each "go" with the seconds of `steps` steps and the last loss, and "memory" with the peak's bytes.

    make: builds the loop, and gives what takes a step by its number, from 1 on. The peak is that of resident memory in
    steps, over what the process had before: what building took for a while does not count.
    """
    before = _status_bytes("VmRSS")
    step, number, loss = make(), 0, 0.0
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    while True:
        if connection.recv() == "memory":
            connection.send(_status_bytes("VmHWM") - before)
            return
        began = time.perf_counter()
        for _ in range(steps):
            number += 1
            loss = step(number)
        connection.send((time.perf_counter() - began, loss))


def peaks(connections: Mapping[str, Connection]) -> dict[str, int]:
    """Bytes of each; ends them."""
    for connection in connections.values():
        connection.send("memory")
    return {name: connection.recv() for name, connection in connections.items()}


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
