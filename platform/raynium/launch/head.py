"""Whether the processes of Ray are there that a driver cannot live without: Ray ends it soon after, without a word."""

import socket
import threading
import time

from raynium.errors import ClusterLost

LOOK_SECONDS = 2.0
ANSWER_SECONDS = 5.0
# Ray waits 60 s for its head, which keeps its state in memory and does not come back, and about 10 s for the raylet of
# the driver's own node: the driver needs some of that to write down why it ends. Counted from the first look that
# failed: on a busy machine looks themselves are late.
HEAD_LOST_SECONDS = 30.0
NODE_LOST_SECONDS = 3.0


class ClusterWatch:
    """Looks at the head and at this node's raylet from threads of its own. Use as a context manager."""

    def __init__(self, *, head: str, raylet: str):
        """Addresses, host:port."""
        self._closing = threading.Event()
        self._names = {head: "head", raylet: "node of this driver"}
        # Address → since when looks fail, and why the last did. Those that were answered are not there.
        self._failing: dict[str, tuple[float, str]] = {}

    def __enter__(self) -> "ClusterWatch":
        for address in self._names:
            threading.Thread(target=self._look, args=(address,), name="ray-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()

    def check(self) -> None:
        """Raises ClusterLost once one of them has been silent for too long."""
        now = time.monotonic()
        for address, (since, problem) in list(self._failing.items()):
            what = self._names[address]
            if now - since > (HEAD_LOST_SECONDS if what == "head" else NODE_LOST_SECONDS):
                raise ClusterLost(
                    f"the {what} of the Ray cluster, {address}, has not answered for {now - since:.0f} s ({problem}): "
                    "its processes were killed, its machine was lost, or this one was cut off. Start the run again: it "
                    "goes on from its newest checkpoint"
                )

    def _look(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        while not self._closing.wait(LOOK_SECONDS):
            began = time.monotonic()
            try:
                socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
            except OSError as error:
                # A machine that is too busy to answer itself has not lost a process.
                if self._names[address] == "head" or isinstance(error, ConnectionRefusedError):
                    since, _ = self._failing.get(address, (began, ""))
                    self._failing[address] = since, error.strerror or str(error)
            else:
                self._failing.pop(address, None)
