"""Runs one node agent with real ranks; `test_neuron_twin.py` starts it, with the twin on the path or without.

A process of its own, because the template that ranks are forked from keeps the environment it was started with.
stdin: {"config", "run_folder", "data_folder"}; the last line of stdout: {"ended", "cause", "points", "log"}.
"""

import json
import logging
import sys
from typing import Any

from raynium.accelerators.detect import detect
from raynium.config.schema import Config
from raynium.node.agent import Node, NodeAgent
from raynium.run.coordinator import RunCoordinator
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.tracking.tracker import MemoryTracker


class Lines(logging.Handler):
    """The agent's log, which holds its ranks' output."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    given = json.load(sys.stdin)
    config = Config.model_validate(given["config"])
    log = Lines()
    logging.getLogger("raynium").addHandler(log)
    logging.getLogger("raynium").setLevel(logging.INFO)
    coordinator = CoordinatorOnLoop(RunCoordinator(given["config"], given["run_folder"], 0, 1))
    tracker = MemoryTracker()
    NodeAgent(
        config=config,
        run_url=given["run_folder"],
        node=Node("a", 0, 1, "127.0.0.1"),
        accelerator=detect(config.cluster.accelerator),
        coordinator=coordinator,
        open_tracker=lambda: tracker,
        data_places=lambda: [given["data_folder"]],
    ).run()
    status: Any = coordinator.run(lambda each: each.status(0)).result()
    coordinator.close()
    points = [[point.step, point.metrics] for point in tracker.points]
    found = {"ended": status.ended, "cause": status.cause, "points": points, "log": log.lines}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
