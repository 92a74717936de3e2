"""On how many nodes a run starts where not all of them come (cluster.min_nodes), and when it may take more."""

import time
from collections.abc import Callable, Collection

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raynium.config.schema import Config
from raynium.launch.nodes import free_nodes, label_selector, node_resources, patient
from raynium.planning.fewer_nodes import nodes_with_room


class Seats:
    """Of one driver. number: of the agents that Ray Train is to place; nodes: of those that then train."""

    def __init__(self, config: Config, *, tell: Callable[[str], None]):
        """tell: a line for the user's terminal."""
        self._config, self._tell = config, tell
        self._resources = node_resources(config)
        self.number, self.nodes = config.cluster.seats, config.cluster.nodes
        # For the nodes that lack, while the run trains on fewer; of this start of the run's alone.
        self._asked: PlacementGroup | None = None
        # How many had room when the run last left its nodes for more: no others are waited for.
        self._found: int | None = None

    @property
    def config(self) -> Config:
        """The run's, with the nodes that it starts on."""
        cluster = self._config.cluster
        fewer = {"nodes": self.nodes, "spares": self.number - self.nodes}
        return self._config.model_copy(update={"cluster": cluster.model_copy(update=fewer)})

    def wait(self, *, besides: Collection[str], go_on: Callable[[], bool]) -> None:
        """Until all nodes have room for the run at a time, or it can begin on those that have after
        fault.replace_seconds, or `go_on`, which is asked every second, says no. Without cluster.min_nodes nobody waits
        here. besides: ids of nodes that the run does without.
        """
        cluster = self._config.cluster
        if cluster.min_nodes is None:
            return
        # Also where it is gone already, with all that a dead controller held: see `release_nodes`.
        self._drop_request()
        self.number, self.nodes = cluster.seats, cluster.nodes
        waits = patient(self._config, go_on=go_on, tell=self._tell, besides=besides)
        limit = time.monotonic() + self._config.fault.replace_seconds
        # Asking is also what makes an autoscaler start nodes. What waits holds nothing.
        group = _ask(self._resources, cluster.seats, besides)
        try:
            while not group.wait(1) and waits():
                room = len(free_nodes(self._resources, besides=besides))
                enough = time.monotonic() >= limit or (self._found is not None and room >= self._found)
                nodes = nodes_with_room(self._config, room)
                if enough and nodes is not None:
                    self.number, self.nodes = min(room, cluster.seats), nodes
                    why = f"no more have come within {self._config.fault.replace_seconds:g} s (fault.replace_seconds)"
                    self._tell(
                        f"the run starts on {nodes} of {cluster.nodes} nodes (cluster.min_nodes {cluster.min_nodes}): "
                        f"{why if self._found is None else 'there are no more yet'}"
                    )
                    return
        finally:
            self._found = None
            remove_placement_group(group)

    def may_grow(self, *, besides: Collection[str]) -> bool:
        """Whether a run that started on fewer nodes than wanted would find room for more if it started again.

        Asks Ray for those that lack. besides: ids of the nodes that it does without, or runs on.
        """
        lacking = self._config.cluster.seats - self.number
        if self.nodes == self._config.cluster.nodes:
            return False
        if self._asked is None:
            self._asked = _ask(self._resources, lacking, besides)
        more = lacking if self._asked.wait(0) else len(free_nodes(self._resources, besides=besides))
        nodes = nodes_with_room(self._config, self.number + more)
        if nodes is None or nodes <= self.nodes:
            return False
        self._drop_request()
        self._found = self.number + more
        return True

    def _drop_request(self) -> None:
        if self._asked is not None:
            remove_placement_group(self._asked)
            self._asked = None


def _ask(resources: dict[str, float], number: int, besides: Collection[str]) -> PlacementGroup:
    """So many nodes at a time."""
    selector = [label_selector(sorted(besides))] * number if besides else None
    strategy = "STRICT_SPREAD" if number > 1 else "PACK"
    return placement_group([resources] * number, strategy=strategy, bundle_label_selector=selector)  # pyright: ignore[reportArgumentType]
