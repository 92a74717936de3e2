"""A real Ray cluster on loopback addresses of this machine, for tests: a head that accepts jobs, and nodes."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from heads import LOOPBACK, running_head
from tiny import build_documents, job_text
from waiting import wait_for

from raynium import Client, Run
from raynium.chaos.sessions import kill_started, start_ray
from raynium.rank.ports import free_port
from raynium.run.record import RunRecord

HEAD = "127.0.0.2"


@dataclass
class Cluster:
    """A head that accepts jobs, on 127.0.0.2. `environment` is what a process needs to reach it."""

    address: str
    environment: dict[str, str]
    folder: Path  # runs, data, and the job file
    job_file: Path
    port: int
    # Address → the node there, without the head.
    nodes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def client(self) -> Client:
        return Client(self.address)

    def start_node(self, host: str, *options: str) -> None:
        """Another loopback address of this machine, with room for one rank."""
        arguments = [
            *(f"--address={HEAD}:{self.port}", f"--node-ip-address={host}", "--num-cpus=1"),
            *(f"--object-store-memory={100 * 2**20}", f"--dashboard-agent-listen-port={free_port(LOOPBACK)}", *options),
        ]
        log = self.folder / f"node-{host}.log"
        self.nodes[host] = start_ray(arguments, os.environ | self.environment, log)

    def kill_node(self, host: str) -> None:
        """All its processes at once, as when its machine is lost."""
        kill_started([self.nodes.pop(host)])


@contextlib.contextmanager
def ray_cluster(
    folder: Path, changes: Mapping[str, Any], *, head_cpus: int, environment: Mapping[str, str] = {}, options: str = ""
) -> Iterator[Cluster]:
    """It asks for a token. changes: of its job file. environment: of its processes. options: of `ray start`."""
    build_documents(folder)
    job_file = folder / "job.yaml"
    job_file.write_text(job_text(changes, root=folder))
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's entrypoint is `python …`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAYNIUM_HOME": str(folder),
    }
    arguments = (f"--num-cpus={head_cpus}", *options.split())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        with running_head(folder / "ray.log", own | dict(environment), *arguments) as head:
            cluster = Cluster(head.address, own | dict(environment), folder, job_file, head.port)
            try:
                yield cluster
            finally:
                kill_started(cluster.nodes.values())


def record_when_saved(run: Run, *, step: int) -> RunRecord:
    """The run's record once it has committed a checkpoint of that step or a later one."""
    wait_for(lambda: any(each.step >= step for each in run.checkpoints()))
    return run.record()


def losses(run: Run) -> dict[int, list[float]]:
    """step → every loss that MLflow holds for it."""
    found: dict[int, list[float]] = {}
    for point in run.metrics("train/loss"):
        found.setdefault(point.step, []).append(point.value)
    return found


def final_state(run: Run) -> dict[str, Any]:
    from raynium.checkpoint.catalog import latest
    from raynium.checkpoint.load import read_tensors
    from raynium.storage.store import Store

    reference = latest(Store(run.url))
    assert reference is not None
    return read_tensors(reference, prefix="model/")


def same_as(run: Run, uninterrupted: Run, *, steps: int) -> None:
    """Every step once in MLflow, with the very same loss, and the same weights at the end."""
    import torch

    ours, theirs = losses(run), losses(uninterrupted)
    assert ours == theirs and set(ours) == set(range(1, steps + 1))
    assert all(len(values) == 1 for values in ours.values())
    for name, tensor in final_state(uninterrupted).items():
        assert torch.equal(final_state(run)[name], tensor), name
