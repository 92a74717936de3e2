"""Nodes that a verdict has named, remembered in the root that runs share: no driver takes them again for a while.

One object for each host, so that drivers of several runs overwrite nothing of each other's.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from raynium.run.protocol import NodeFault
from raynium.storage.backend import KeyMissing
from raynium.storage.store import Store

# What EC2 can be asked to do with an instance.
EC2Call = Literal["reboot", "terminate"]

# No run may have such a name.
FOLDER = "bad+nodes"


@dataclass(frozen=True)
class BadNode:
    """node_id: Ray's, new in each life of the node. run: whose verdict it was. text: with what to do.

    instance_id: EC2's, "" if it has none that the run knew. asked: what EC2 was asked to do with it, "" for nothing.
    """

    host: str
    node_id: str
    action: str
    text: str
    run: str
    unix: float
    instance_id: str = ""
    asked: EC2Call | Literal[""] = ""

    def is_this(self, node_id: str, host: str) -> bool:
        """Whether a node of now is still the bad one. Where Ray was started anew it may have been rebooted.

        One that EC2 rebooted for us is until it passes a preflight; the address of one that it ended goes to others.
        """
        if self.asked == "reboot":
            return host == self.host
        return node_id == self.node_id if self.asked or self.action == "reboot" else host == self.host

    def is_back(self, node_id: str, host: str) -> bool:
        """Whether EC2 rebooted it for us, and this is its next life."""
        return self.asked == "reboot" and host == self.host and node_id != self.node_id


def remember(root: Store, found: NodeFault, *, run: str, now_unix: float, asked: EC2Call | None = None) -> None:
    """asked: what EC2 has agreed to do with its instance. Raises StoreError."""
    instance_id = "" if found.instance is None else found.instance.id
    bad = BadNode(found.host, found.node_id, found.fault.action, str(found), run, now_unix, instance_id, asked or "")
    root.replace(_key(found.host), json.dumps(asdict(bad)).encode())


def mark_of(root: Store, host: str) -> BadNode | None:
    """None if nobody has named it. Raises StoreError."""
    try:
        return BadNode(**json.loads(root.read(_key(host))))
    except KeyMissing:
        return None


def lift(root: Store, host: str) -> None:
    """The node is good again. Raises StoreError."""
    root.delete(_key(host))


def remembered(root: Store, *, now_unix: float, seconds: float) -> list[BadNode]:
    """Those of the last `seconds`, and who has yet to pass a preflight, oldest first; what is older is removed.

    Raises StoreError.
    """
    found = []
    for key in root.list(FOLDER).sizes:
        bad = BadNode(**json.loads(root.read(key)))
        if now_unix - bad.unix < seconds or bad.asked == "reboot":
            found.append(bad)
        else:
            root.delete(key)
    return sorted(found, key=lambda bad: bad.unix)


def forget(root: Store, *, run: str) -> None:
    """Takes back what the verdicts of a run have named. Raises StoreError."""
    for key in root.list(FOLDER).sizes:
        if json.loads(root.read(key))["run"] == run:
            root.delete(key)


def _key(host: str) -> str:
    return f"{FOLDER}/{host}.json"


def left_out(bad: Collection[BadNode], nodes: Mapping[str, str], *, needed: int) -> tuple[dict[str, BadNode], int]:
    """(id → why) of the nodes that a run does without, and how many bad ones it must take all the same. Pure.

    nodes: id → host of those that it could take. The one that was named last is the first to be left out. A host counts
    once: of two nodes there, one is of a life that is over, which Ray notices within a minute.
    """
    found = {
        node_id: each
        for each in sorted(bad, key=lambda each: -each.unix)
        for node_id, host in nodes.items()
        if each.is_this(node_id, host)
    }
    spare = max(0, len(set(nodes.values())) - needed)
    hosts = list(dict.fromkeys(nodes[node_id] for node_id in found))
    gone = {node_id: each for node_id, each in found.items() if nodes[node_id] in hosts[:spare]}
    return gone, max(0, len(hosts) - spare)
