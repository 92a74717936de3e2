"""Nodes that a verdict has named, remembered in the root that runs share: no driver takes them again for a while.

One object for each host, so that drivers of several runs overwrite nothing of each other's.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from raynium.run.protocol import NodeFault
from raynium.storage.store import Store

# No run may have such a name.
FOLDER = "bad+nodes"


@dataclass(frozen=True)
class BadNode:
    """node_id: Ray's, new in each life of the node. run: whose verdict it was. text: with what to do."""

    host: str
    node_id: str
    action: str
    text: str
    run: str
    unix: float

    def is_this(self, node_id: str, host: str) -> bool:
        """Whether a node of now is still the bad one. Where Ray was started anew it may have been rebooted."""
        return node_id == self.node_id if self.action == "reboot" else host == self.host


def remember(root: Store, found: NodeFault, *, run: str, now_unix: float) -> None:
    """Raises StoreError."""
    bad = BadNode(found.host, found.node_id, found.fault.action, str(found), run, now_unix)
    root.replace(f"{FOLDER}/{found.host}.json", json.dumps(asdict(bad)).encode())


def remembered(root: Store, *, now_unix: float, seconds: float) -> list[BadNode]:
    """Those of the last `seconds`, oldest first; what is older is removed. Raises StoreError."""
    found = []
    for key in root.list(FOLDER).sizes:
        bad = BadNode(**json.loads(root.read(key)))
        if now_unix - bad.unix < seconds:
            found.append(bad)
        else:
            root.delete(key)
    return sorted(found, key=lambda bad: bad.unix)


def forget(root: Store, *, run: str) -> None:
    """Takes back what the verdicts of a run have named. Raises StoreError."""
    for key in root.list(FOLDER).sizes:
        if json.loads(root.read(key))["run"] == run:
            root.delete(key)


def left_out(bad: Collection[BadNode], nodes: Mapping[str, str], *, needed: int) -> tuple[dict[str, BadNode], int]:
    """(id → why) of the nodes that a run does without, and how many bad ones it must take all the same. Pure.

    nodes: id → host of those that it could take. The one that was named last is the first to be left out.
    """
    found = {
        node_id: each
        for each in sorted(bad, key=lambda each: -each.unix)
        for node_id, host in nodes.items()
        if each.is_this(node_id, host)
    }
    spare = max(0, len(nodes) - needed)
    return dict(list(found.items())[:spare]), max(0, len(found) - spare)
