"""The head of a real Ray cluster, on loopback, that accepts jobs."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from waiting import wait_for

from raynium.chaos.sessions import kill_started, start_ray
from raynium.errors import LaunchError
from raynium.launch.jobs import connect_jobs
from raynium.rank.ports import free_port

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Head:
    """address: of the dashboard, which takes jobs. port: for other nodes, on 127.0.0.2."""

    address: str
    port: int
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_head(
    log: Path, environment: Mapping[str, str], *arguments: str, dashboard: int | None = None
) -> Iterator[Head]:
    """Starts it in a session of its own, in which its jobs run too; all of that is killed with the context.

    environment: of it and its jobs. arguments: further ones of `ray start`. dashboard: its port, if it is to be known.
    """
    dashboard, port = dashboard or free_port(LOOPBACK), free_port(LOOPBACK)
    # A short path: those of Unix sockets have a limit.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        command = [
            *("--head", "--node-ip-address=127.0.0.2", f"--port={port}", f"--temp-dir={ray_folder}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={free_port(LOOPBACK)}",
            f"--ray-client-server-port={free_port(LOOPBACK)}",
            *("--num-cpus=4", f"--object-store-memory={100 * 2**20}"),
        ]
        address = f"http://{LOOPBACK}:{dashboard}"
        process = _started([*command, *arguments], os.environ | dict(environment), log, address)
        try:
            yield Head(address, port, process)
        finally:
            kill_started([process])


def _started(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, address: str
) -> "subprocess.Popen[bytes]":
    """On a busy machine one of Ray's processes may give up while the others come up, and Ray ends them all."""
    process = start_ray(arguments, environment, log)
    wait_for(lambda: _answers(address) or process.poll() is not None, pause_seconds=0.5)
    if process.poll() is None:
        return process
    kill_started([process])
    return _started(arguments, environment, log, address)


def _answers(address: str) -> bool:
    with contextlib.suppress(LaunchError, OSError):
        connect_jobs(address).list_jobs()
        return True
    return False
