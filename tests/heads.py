"""The head of a real Ray cluster, on loopback, that accepts jobs."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sessions import kill_started

from raynium.errors import LaunchError
from raynium.launch.jobs import connect_jobs
from raynium.rank.ports import free_port

LOOPBACK = "127.0.0.1"
# What `ray start --block` says last.
STARTED = b"will now block"


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
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.2", f"--port={port}", f"--temp-dir={ray_folder}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={free_port(LOOPBACK)}",
            f"--ray-client-server-port={free_port(LOOPBACK)}",
            *("--num-cpus=4", f"--object-store-memory={100 * 2**20}"),
        ]
        address = f"http://{LOOPBACK}:{dashboard}"
        # Ray gives a node 30 s to start, which on a busy machine it may need. A service starts it again, too.
        for tries_left in (2, 1, 0):
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [*command, *arguments],
                    env=os.environ | dict(environment),
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            if _answers(address, process, log):
                break
            kill_started([process])
            assert tries_left, log.read_text()[-3000:]
        try:
            yield Head(address, port, process)
        finally:
            kill_started([process])


def _answers(address: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits for it; False if it has ended, or does not answer for minutes.

    The dashboard answers before `ray start` has seen all of its processes, and it may yet give up.
    """
    before, deadline = log.stat().st_size, time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(LaunchError, OSError):
            connect_jobs(address).list_jobs()
            if STARTED in log.read_bytes()[before:]:
                return True
        time.sleep(0.5)
    return False
