"""One run that chaos trains: its driver is a process, started again as often as it has to be."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from raynium.chaos.loopback import LoopbackCluster
from raynium.chaos.processes import RunProcesses
from raynium.chaos.sessions import kill_started
from raynium.config.load import dump_yaml
from raynium.config.schema import Config

# After a signal to save and end.
END_SECONDS = 120.0


class DrivenRun:
    """`raynium train` in a process of its own. Use as a context manager: nothing of it lives on."""

    def __init__(
        self, config: Config, folder: Path, environment: Mapping[str, str], cluster: LoopbackCluster | None = None
    ):
        """folder: for the job file and the output. environment: all of it. cluster: else it starts one of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config = config
        self.log = folder / "log"
        self.starts = 0
        self._job = folder / "config.yaml"
        self._job.write_text(dump_yaml(config), encoding="utf-8")
        self._environment = dict(environment if cluster is None else cluster.environment)
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "raynium.cli.app", "train", str(self._job)]
        command += ["--address", self._cluster.address] if self._cluster is not None else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None, "it was started"
        return self._process.poll()

    def wait(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.wait()

    def processes(self) -> RunProcesses:
        return RunProcesses.of(self.pid, self._cluster.leaders() if self._cluster is not None else ())

    def last_lines(self, count: int = 15) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])

    def __enter__(self) -> "DrivenRun":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        if self._process.poll() is None:
            kill_started([self._process])
