"""Loops that are compared, each in a process of its own: they take turns, so that what else the machine does falls on
all of them."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
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
