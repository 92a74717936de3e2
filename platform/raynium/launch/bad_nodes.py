"""The nodes that verdicts of this run, and of others of its root, have named: kept in the store, and left out."""

import time
from collections.abc import Callable

from raynium.config.schema import Config
from raynium.errors import StoreError
from raynium.launch.nodes import fitting_nodes, node_hosts, node_resources
from raynium.run.bad_nodes import left_out, remember, remembered
from raynium.run.protocol import NodeFault
from raynium.storage.store import Store


class BadNodes:
    """Of one driver."""

    def __init__(self, config: Config, run: Store, tell: Callable[[str], None]):
        """run: whose folder lies in the root. tell: a line for the user's terminal."""
        self._config, self._tell = config, tell
        self._root = Store(run.url.rpartition("/")[0])

    def ids(self) -> list[str]:
        """Of the nodes of now that other drivers found bad, as far as the run can do without them."""
        try:
            bad = remembered(self._root, now_unix=time.time(), seconds=self._config.fault.bad_node_seconds)
        except StoreError as error:
            self._tell(f"nodes that earlier runs found bad are not known: {error}")
            return []
        if not bad:
            return []
        fit = fitting_nodes(node_resources(self._config))
        nodes = {node_id: host for node_id, host in node_hosts().items() if node_id in fit}
        found, kept = left_out(bad, nodes, needed=self._config.cluster.seats)
        for each in found.values():
            self._tell(f"node {each.host} is left out, as run {each.run} found: {each.text}")
        if kept:
            self._tell(f"{kept} node(s) that earlier runs found bad are used: there are no others")
        return list(found)

    def remember(self, found: NodeFault) -> None:
        """A verdict of this run's."""
        try:
            remember(self._root, found, run=self._config.run.name, now_unix=time.time())
        except StoreError as error:
            self._tell(f"other drivers will not know of {found.host}: {error}")
