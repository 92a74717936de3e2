"""Fewer ranks, and more again, go on from memory and not from the store. Agents, ranks and buddies are real; no Ray.

Whatever happens to the nodes, a step's loss must have the bits that it has in runs of the same worlds from checkpoints.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import job_text
from waiting import wait_for

from raynium.accelerators.detect import detect
from raynium.checkpoint.catalog import list_checkpoints
from raynium.config.load import parse_config
from raynium.node.agent import Node, NodeAgent
from raynium.run.coordinator import RunCoordinator
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.run.protocol import Status
from raynium.storage.store import Store
from raynium.tracking.tracker import MemoryTracker

JOB = job_text(
    {
        "optimizer.learning_rate": 3e-3,
        "optimizer.schedule": "constant",
        "train.global_batch_size": 8,
        "evaluate.every_steps": 100_000,
        "evaluate.max_documents": 2,
        "cluster.nodes": 2,
        "cluster.ranks_per_node": 1,
    }
)
FOR_EVER = 100_000


class Nodes:
    """One coordinator, and agents that come and go."""

    def __init__(self, run_folder: Path, document_folder: Path, changes: Mapping[str, Any]):
        self._changes, self._run_folder, self._documents = changes, run_folder, document_folder
        config = parse_config(JOB, changes)
        self.nodes, self.tracker = config.cluster.nodes, MemoryTracker()
        self.coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), str(run_folder), 0, 1))
        self.threads: list[threading.Thread] = []
        # Of each seat, how many agents it has lost.
        self._lost: Counter[int] = Counter()

    def start(self, seat: int) -> None:
        """Agents of one process would share a folder of images, which has the run's name."""
        agent = NodeAgent(
            config=parse_config(JOB, self._changes | {"run.name": f"test-{len(self.threads)}"}),
            run_url=str(self._run_folder),
            node=Node("a", seat, self.nodes, "127.0.0.1", incarnation=self._lost[seat]),
            accelerator=detect("cpu"),
            coordinator=self.coordinator,
            open_tracker=lambda: self.tracker,
            data_places=lambda: [str(self._documents)],
            secret=b"of this run",
        )
        self.threads.append(threading.Thread(target=agent.run))
        self.threads[-1].start()

    def lose(self, seat: int) -> None:
        """As Ray would tell; the agent itself, with all that is in its memory, goes home."""
        self.coordinator.run(lambda each: each.agents_lost("a", {seat: self._lost[seat]})).result()
        self._lost[seat] += 1

    def status(self) -> Status:
        return self.coordinator.run(lambda each: each.status(0)).result()

    def stop(self) -> None:
        life = self.status().ledger.life
        self.coordinator.run(lambda each: each.request_stop(life)).result()

    def finish(self) -> Status:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        status = self.status()
        self.coordinator.close()
        return status

    def losses(self) -> dict[int, float]:
        """Step → its loss, of those who did it last."""
        return dict(self.tracker.values("train/loss"))


@pytest.fixture
def started() -> Iterator[list[Nodes]]:
    """Those that a test which fails has left."""
    nodes: list[Nodes] = []
    yield nodes
    for each in nodes:
        if any(thread.is_alive() for thread in each.threads):
            each.stop()
            each.finish()


def test_every_step_has_the_bits_of_a_run_from_checkpoints_though_no_world_began_with_one(
    tmp_path: Path, document_folder: Path, started: list[Nodes]
) -> None:
    changes = {"cluster.min_nodes": 1, "fault.replace_seconds": 0.1, "train.steps": FOR_EVER}
    changes |= {"fault.buddy_copies": True, "fault.snapshot_every_steps": 3, "checkpoint.every_steps": FOR_EVER}
    ours = Nodes(tmp_path / "ours", document_folder, changes)
    started.append(ours)
    for seat in (0, 1):
        ours.start(seat)
    wait_for(lambda: ours.status().step >= 10)
    ours.lose(1)
    wait_for(lambda: ours.status().generation == 2 and ours.status().step >= 30)
    ours.start(1)
    wait_for(lambda: ours.status().generation == 3 and ours.status().step >= 50)
    ours.stop()
    status = ours.finish()
    told = "\n".join(each.text for each in status.events)
    assert status.ended == "stopped", told
    found = re.findall(r"generation (\d): (\d) ranks on \d node\(s\), from the snapshot of step (\d+) in m", told)
    assert [each[:2] for each in found] == [("2", "1"), ("3", "2")], told
    shrunk, grown = (int(step) for _, _, step in found)
    assert shrunk % 3 == 0 and list_checkpoints(Store(tmp_path / "ours"))[0].step == grown, "none before"

    theirs: dict[int, float] = {}
    last = max(ours.losses())
    for nodes, steps in ((2, shrunk), (1, grown), (2, last)):
        life = Nodes(tmp_path / "theirs", document_folder, {"cluster.nodes": nodes, "train.steps": steps})
        started.append(life)
        for seat in range(nodes):
            life.start(seat)
        assert life.finish().ended == "finished"
        theirs |= life.losses()
    assert ours.losses() == theirs and set(theirs) == set(range(1, last + 1))
