"""Numbers of nodes that a run may come down to (cluster.min_nodes)."""

from collections.abc import Iterator

from raynium.config.schema import Config
from raynium.config.world import World


def fewer_nodes(config: Config) -> list[int]:
    """The numbers of nodes that a run may come down to, the fewest first; none without cluster.min_nodes."""
    least, nodes = config.cluster.min_nodes, config.cluster.nodes
    return [] if least is None else [number for number in range(least, nodes) if World.fits(config, nodes=number)]


def nodes_with_room(config: Config, room: int) -> int | None:
    """On how many of so many nodes the run can train: the most that share the batch evenly; None: on none, it waits."""
    nodes = [*fewer_nodes(config), config.cluster.nodes]
    return max((number for number in nodes if number <= room), default=None)


def min_nodes(config: Config) -> Iterator[str]:
    least, nodes = config.cluster.min_nodes, config.cluster.nodes
    if least is None or least == nodes:
        return
    if least > nodes:
        yield (
            f"cluster.min_nodes is {least} and cluster.nodes {nodes}: a run comes down from nodes to min_nodes; set "
            f"{nodes} or less, or null"
        )
    elif World.fits(config, nodes=nodes) and not fewer_nodes(config):
        yield (
            f"cluster.min_nodes is {least}, but no number of nodes from {least} to {nodes - 1} shares "
            f"train.global_batch_size {config.train.global_batch_size} evenly (micro_batch_size "
            f"{config.train.micro_batch_size}, {config.cluster.ranks_per_node} rank(s) a node): set a "
            "global_batch_size that one of them divides, a lower min_nodes, or null"
        )
