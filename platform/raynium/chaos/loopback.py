"""A Ray cluster whose nodes are loopback addresses of this machine, to be killed, halted, drained and started again."""

import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raynium.chaos.sessions import kill_started, pids_of_session, signal_sessions, start_ray
from raynium.errors import LaunchError
from raynium.launch.ray_environment import RAY_DEFAULTS, session_parent
from raynium.rank.ports import free_port

# The head has no room for ranks. Ray replaces 127.0.0.1 by the network card's address.
LOOPBACK, HEAD, FIRST_NODE = "127.0.0.1", "127.0.0.2", 3
OBJECT_STORE = f"--object-store-memory={100 * 2**20}"
# A node that does not answer is given up after ten seconds, in place of half a minute: chaos waits for that.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
GIVEN_UP_SECONDS = 20.0
# `ray drain-node`; on a busy machine its import alone takes some.
DRAIN_SECONDS = 120.0


class LoopbackCluster:
    """Use as a context manager: nothing of it lives on. One thread at a time."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *, nodes: int, cpus: int):
        """folder: for logs. environment: all of it, of every process. cpus: of each node, for its ranks."""
        self.address = f"{HEAD}:{free_port(HEAD)}"
        self.environment = {
            **RAY_DEFAULTS,
            **HEALTH,
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        # Host → the process that is its session's leader.
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.hosts = tuple(f"127.0.0.{FIRST_NODE + number}" for number in range(nodes))
        self._head: subprocess.Popen[bytes] | None = None
        self._folder, self._cpus = folder, cpus
        # A short path: those of Unix sockets have a limit.
        self._ray_folder = tempfile.mkdtemp(prefix="ray", dir=session_parent())

    def __enter__(self) -> "LoopbackCluster":
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def start(self) -> None:
        """Head and nodes. Raises LaunchError."""
        port = self.address.rpartition(":")[2]
        own = (f"--node-ip-address={HEAD}", f"--port={port}", f"--ray-client-server-port={free_port(LOOPBACK)}")
        without = ("--num-cpus=0", "--include-dashboard=false")
        self._head = self._start_ray("head", "--head", *own, *without, f"--temp-dir={self._ray_folder}")
        self.start_missing()

    def start_missing(self) -> None:
        """Every node that is not there. Raises LaunchError."""
        for host in self.hosts:
            if host not in self.nodes:
                self.nodes[host] = self._start_ray(
                    host, f"--address={self.address}", f"--node-ip-address={host}", f"--num-cpus={self._cpus}"
                )

    def leaders(self) -> list[int]:
        """Of the sessions of all that is there."""
        return [process.pid for process in self._processes()]

    def kill_node(self, host: str) -> None:
        """All its processes at once, as when its machine is lost."""
        kill_started([self.nodes.pop(host)])

    def kill_head(self) -> None:
        """What runs on it too, but a driver."""
        assert self._head is not None, "it was started"
        kill_started([self._head])
        self._head = None

    def kill(self) -> None:
        kill_started(self._processes())
        self._head = None
        self.nodes.clear()

    def signal_node(self, host: str, number: signal.Signals) -> None:
        signal_sessions([self.nodes[host].pid], number)

    def drain_node(self, host: str, *, seconds: int) -> None:
        """As an operator, or an autoscaler at a notice. seconds: until the node will be taken. Raises LaunchError."""
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={self.address}"]
        command += [f"--node-id={self._node_id(host)}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message=raynium chaos", f"--deadline-remaining-seconds={seconds}"]
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, encoding="utf-8", timeout=DRAIN_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(f"`{' '.join(command)}` did not end within {DRAIN_SECONDS:g} s") from None
        if done.returncode:
            raise LaunchError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")

    def _processes(self) -> "list[subprocess.Popen[bytes]]":
        return [*([self._head] if self._head is not None else []), *self.nodes.values()]

    def _node_id(self, host: str) -> str:
        """As its raylet was told it on its command line."""
        for pid in pids_of_session(self.nodes[host].pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    if word.startswith(b"--node_id="):
                        return word.partition(b"=")[2].decode()
        raise LaunchError(f"the Ray node at {host} has no raylet")

    def _start_ray(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        agent_port = f"--dashboard-agent-listen-port={free_port(LOOPBACK)}"
        return start_ray([*arguments, OBJECT_STORE, agent_port], self.environment, self._folder / f"{name}.log")
