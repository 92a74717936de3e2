"""One life of the run's node agents (mostly one) and their coordinator as a process, so that a test may kill all of it.

    python _agent_process.py FOLDER        FOLDER/job.yaml, and FOLDER/arguments.json:
                                           {"run_url", "data_folder", "changes", "last_save_seconds"}, and
                                           "preload": modules of its template, if it needs more

Writes FOLDER/losses.jsonl ([step, loss] as they are reported), FOLDER/artifacts/, FOLDER/pids.json (node 0's {"ranks",
"uploader"}, as they change) and, when the run has ended, FOLDER/status.json.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raynium.accelerators import cpu
from raynium.accelerators.detect import detect
from raynium.config.load import parse_config
from raynium.node import ranks
from raynium.node.agent import Node, NodeAgent
from raynium.run import last_save
from raynium.run.coordinator import RunCoordinator
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.tracking.tracker import MemoryTracker


class LossFile(MemoryTracker):
    """Keeps losses where they outlive this process."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def append(self, metrics: Mapping[str, float], *, step: int, unix_ms: int, again: bool = False) -> dict[str, float]:
        accepted = super().append(metrics, step=step, unix_ms=unix_ms, again=again)
        if "train/loss" in metrics:
            with self._path.open("a") as file:
                file.write(json.dumps([step, metrics["train/loss"]]) + "\n")
        return accepted

    def artifact(self, path: str, text: str) -> None:
        file = self._path.parent / "artifacts" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    job = (folder / "job.yaml").read_text()
    config = parse_config(job, arguments["changes"])
    last_save.LAST_SAVE_SECONDS = arguments["last_save_seconds"]
    ranks.PRELOADED_MODULES = (*ranks.PRELOADED_MODULES, "small_parts", *arguments.get("preload", ()))
    cpu.usable_cores = lambda: 1  # on busy cores, threads of a small model mostly wait for each other
    coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), arguments["run_url"], 0, 1))
    agents = [
        NodeAgent(
            # Agents of one process would share a folder of images, which has the run's name
            config=parse_config(job, arguments["changes"] | {"run.name": f"test-{node_rank}"}),
            run_url=arguments["run_url"],
            node=Node(f"attempt-{os.getpid()}", node_rank, config.cluster.nodes, "127.0.0.1"),
            accelerator=detect("cpu"),
            coordinator=coordinator,
            open_tracker=lambda: LossFile(folder / "losses.jsonl"),
            data_places=lambda: [arguments["data_folder"]],
        )
        for node_rank in range(config.cluster.nodes)
    ]
    threading.Thread(target=_show_pids, args=(agents[0], folder / "pids.json"), daemon=True).start()
    with ThreadPoolExecutor(len(agents)) as pool:
        list(pool.map(NodeAgent.run, agents))
    status = coordinator.run(lambda each: each.status(0)).result()
    events = [event.text for event in status.events]
    (folder / "status.json").write_text(json.dumps({"ended": status.ended, "cause": status.cause, "events": events}))


def _show_pids(agent: NodeAgent, path: Path) -> None:
    while True:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({"ranks": agent.rank_pids(), "uploader": agent.uploader_pid()}))
        temporary.replace(path)
        time.sleep(0.03)


if __name__ == "__main__":
    main()
