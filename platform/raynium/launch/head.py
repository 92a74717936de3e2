"""Whether the processes of Ray are there that a driver cannot live without: Ray ends it soon after, without a word."""

import socket
import threading
import time

from raynium.errors import ClusterLost

LOOK_SECONDS = 2.0
ANSWER_SECONDS = 5.0
# Ray waits 60 s for its head, which keeps its state in memory and does not come back, and about 10 s for the raylet of
# the driver's own node: the driver needs some of that to write down why it ends.
HEAD_LOST_SECONDS = 30.0
NODE_LOST_SECONDS = 4.0


class ClusterWatch:
    """Looks at the head and at this node's raylet from threads of its own. Use as a context manager."""

    def __init__(self, *, head: str, raylet: str):
        """Addresses, host:port."""
        self._closing = threading.Event()
        now = time.monotonic()
        # Address → what is lost with it, when it was heard last, and what was wrong then.
        self._heard = {head: ("head", now, "no word"), raylet: ("node of this driver", now, "no word")}

    def __enter__(self) -> "ClusterWatch":
        for address in self._heard:
            threading.Thread(target=self._look, args=(address,), name="ray-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()

    def check(self) -> None:
        """Raises ClusterLost once one of them has been silent for too long."""
        now = time.monotonic()
        for address, (what, heard, problem) in list(self._heard.items()):
            if now - heard > (HEAD_LOST_SECONDS if what == "head" else NODE_LOST_SECONDS):
                raise ClusterLost(
                    f"the {what} of the Ray cluster, {address}, has not answered for {now - heard:.0f} s ({problem}): "
                    "its processes were killed, its machine was lost, or this one was cut off. Start the run again: it "
                    "goes on from its newest checkpoint"
                )

    def _look(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        what = self._heard[address][0]
        while not self._closing.wait(LOOK_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
            except ConnectionRefusedError as error:
                self._fails(address, error)
            except OSError as error:
                # A machine that is too busy to answer itself has not lost a process.
                if what == "head":
                    self._fails(address, error)
            else:
                self._heard[address] = what, time.monotonic(), "no word"

    def _fails(self, address: str, error: OSError) -> None:
        what, heard, _ = self._heard[address]
        self._heard[address] = what, heard, error.strerror or str(error)
