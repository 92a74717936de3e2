"""Who may still write for a run: the claims in its store, whose numbers are fencing tokens. No ray, no torch.

A claim is created exclusively and never taken back, so the highest number is the owner's, and whoever holds a lower one
is fenced for ever, however it was kept from noticing. Whoever writes for the run looks for the next claim right before
it does: the driver before each record, and every few seconds for its page, the coordinator before each manifest, the
agent of rank 0 before each batch of metrics. No clocks are compared, and one that cannot look does not write.
"""

import json
import threading
import time
from collections.abc import Callable

from raynium.errors import RunInUse, StoreError
from raynium.storage.backend import KeyMissing
from raynium.storage.process import Owner
from raynium.storage.store import Store

CLAIMS = "claims"
# How often an agent looks whose coordinator may be frozen together with its driver.
LOOK_SECONDS = 10.0


def claim_key(number: int) -> str:
    return f"{CLAIMS}/{number:06d}.json"


class Fence:
    """One claim, in the hands of the driver that made it or of a process that works for it. Threads may share it."""

    def __init__(self, store: Store, number: int):
        self.number = number
        self._store = store

    def check(self) -> None:
        """Raises RunInUse once a newer claim was made, StoreError if the store does not say; one small request."""
        try:
            text = self._store.read(claim_key(self.number + 1))
        except KeyMissing:
            return
        owner = Owner(**json.loads(text))
        raise RunInUse(
            f"the run at {self._store.url} was taken over by process {owner.pid} on {owner.host} while this driver "
            "could not be heard. Nothing is lost: follow the run there, with `raynium status`"
        )


class FenceWatch:
    """Looks at a fence from a thread of its own, and calls `on_taken` once, with the cause, when the run is taken over.

    For whoever is to end then, though nobody tells it. Use as a context manager.
    """

    def __init__(
        self,
        fence: Fence,
        on_taken: Callable[[str], None],
        *,
        look_seconds: float = LOOK_SECONDS,
        is_its_turn: Callable[[], bool] = lambda: True,
    ):
        """is_its_turn: asked before each look; of many that could look, one does."""
        self._fence, self._on_taken, self._look_seconds = fence, on_taken, look_seconds
        self._is_its_turn = is_its_turn
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="claims-watch", daemon=True)

    def __enter__(self) -> "FenceWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(self._look_seconds):
            if not self._is_its_turn():
                continue
            try:
                self._fence.check()
            except StoreError:
                # A store that is away says nothing of a takeover, which it would hinder, too.
                continue
            except RunInUse as error:
                self._on_taken(str(error))
                return


def steady() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
