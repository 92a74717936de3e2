"""A node whose instance EC2 rebooted for a run is looked at before it runs ranks again, whoever's run that is."""

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence

from raynium.config.schema import Config
from raynium.errors import StoreError
from raynium.health.host import Check
from raynium.health.metadata_service import Instance, this_instance
from raynium.node.preflight import NodeProbe
from raynium.run.bad_nodes import BadNode, lift, mark_of
from raynium.run.last_save import pause_before_next_try
from raynium.storage.store import Store

# A node that does not pass is tried again, at first soon, since it may have been a moment of its start that failed; a
# person or EC2 may also have seen to it. From the first to the second, doubling.
RETRY_SECONDS = 30.0
MOST_RETRY_SECONDS = 300.0
# EC2 takes a node down within so long after it was asked to reboot it.
REBOOT_SECONDS = 300.0
# The check that says nothing of the node's ranks, where the store is away.
STORAGE = "storage"


class Readmission:
    """Of one node and life of its agent, which has not joined yet: spares, or fewer nodes, go on without it."""

    def __init__(
        self,
        config: Config,
        root: Store,
        *,
        host: str,
        node_id: str,
        tell: Callable[[str], object],
        check: Callable[[Config, Store, str], Sequence[Check]] | None = None,
        ask_instance: Callable[[], Instance | None] = this_instance,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        """root: that runs share. node_id: Ray's. tell: a line for the user's terminal. check: see `checked`."""
        self._config, self._root, self._host, self._node_id = config, root, host, node_id
        self._tell, self._check, self._ask_instance = tell, check or checked, ask_instance
        self._sleep, self._clock = sleep, clock

    def wait(self) -> None:
        """Returns once the node may run ranks: at once if no mark says otherwise, else once it passes its preflight."""
        retry_seconds = RETRY_SECONDS
        while (mark := self._mark()) is not None:
            if isinstance(mark, BadNode) and mark.node_id == self._node_id:
                self._tell(f"node {self._host} waits for the reboot that run {mark.run} has asked EC2 for")
                self._sleep(REBOOT_SECONDS)
                continue
            # A run can train for hours without its store, and may lack just this node, which most likely nobody has
            # marked: so the wait for the store has an end, and what then admits the node is what a mark asks for.
            known = isinstance(mark, BadNode)
            what = "was rebooted" if known else "may have been rebooted"
            found = self._check(self._config, self._root, self._host)
            if not (bad := [check for check in found if check.is_bad and (known or check.name != STORAGE)]):
                self._tell(f"node {self._host} {what}, passes its preflight, and is admitted again")
                if known:
                    self._lift()
                return
            remedy = f"terminate {mark.instance_id}" if isinstance(mark, BadNode) else "terminate its instance"
            self._tell(
                f"node {self._host} {what} and does not pass its preflight: {'; '.join(map(str, bad))}. It runs "
                f"no rank, and is tried again in {retry_seconds:.0f} s. To get another, {remedy}"
            )
            self._sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, MOST_RETRY_SECONDS)

    def _mark(self) -> BadNode | StoreError | None:
        """Of an instance that was rebooted, and is this one. The error, if the store says nothing for ten minutes."""
        began, tries = self._clock(), 0
        while True:
            try:
                return self._read_mark()
            except StoreError as error:
                tries += 1
                if (pause := pause_before_next_try(tries, self._clock() - began)) is None:
                    return error
                if tries == 1:
                    self._tell(
                        f"whether node {self._host} was found bad before is not known: it runs no rank until the store "
                        f"says so, or, after ten minutes, until it passes a preflight: {error}"
                    )
                self._sleep(pause)

    def _read_mark(self) -> BadNode | None:
        """Raises StoreError."""
        mark = mark_of(self._root, self._host)
        if mark is None or mark.asked != "reboot":
            return None
        here = self._ask_instance()
        if here is not None and here.id != mark.instance_id:
            # Its address is another instance's now.
            self._lift()
            return None
        return mark

    def _lift(self) -> None:
        try:
            lift(self._root, self._host)
        except StoreError as error:
            self._tell(f"later runs will check node {self._host} again: {error}")


def checked(config: Config, root: Store, host: str) -> list[Check]:
    """What a preflight finds on this node alone: what shows without a rank, and if that is well a trial of its ranks.

    host: this node's address. A store that is away is a check that fails, which says nothing of the ranks.
    """
    folder = f"preflight-{secrets.token_hex(6)}"
    try:
        # Where it cannot be written, the check of the storage fails and says why.
        with contextlib.suppress(StoreError):
            root.replace(f"{folder}/driver", b"driver")
        probe = NodeProbe(config.model_dump(mode="json"), folder)
        found = probe.look()
        if not any(check.is_bad and check.name != STORAGE for check in found):
            found += probe.trial_here(host, config.preflight.seconds)
        return found
    finally:
        # Of no use to anybody, and two small objects.
        with contextlib.suppress(StoreError):
            root.delete_prefix(folder)
