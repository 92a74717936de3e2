"""The world of one generation: its ranks, and how they share the work. Made anew for each generation, since the config
says how many nodes are wanted, and the roster how many there are."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raynium.config.schema import Config
from raynium.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Ranks are numbered node by node; the mesh is data × pipeline × tensor, tensor groups being neighbours.

    tensor, pipeline: the parallel degrees. num_micro_batches: forward passes of one data-parallel rank in a step.
    """

    nodes: int
    ranks_per_node: int
    tensor: int
    pipeline: int
    num_micro_batches: int

    @classmethod
    def of(cls, config: Config, *, nodes: int | None = None) -> "World":
        """nodes: how many there are; None: as many as the config asks for.

        Raises ConfigError where the ranks cannot share the model or the batch evenly. For the config's own number of
        nodes `planning.rules` has said so before, with what to set.
        """
        nodes = config.cluster.nodes if nodes is None else nodes
        per_node, parallel, train = config.cluster.ranks_per_node, config.parallel, config.train
        size, group = nodes * per_node, parallel.tensor * parallel.pipeline
        if size % group:
            raise ConfigError(
                [
                    f"{size} ranks ({nodes} node(s) × cluster.ranks_per_node {per_node}) are no whole number of groups "
                    f"of {group} (parallel.tensor {parallel.tensor} × parallel.pipeline {parallel.pipeline}): give the "
                    "run as many nodes as make whole groups"
                ]
            )
        samples_at_once = size // group * train.micro_batch_size
        if train.global_batch_size % samples_at_once:
            raise ConfigError(
                [
                    f"train.global_batch_size {train.global_batch_size} is no multiple of {samples_at_once}, the "
                    f"samples of one forward pass on {nodes} node(s) ({size // group} data-parallel ranks × "
                    f"train.micro_batch_size {train.micro_batch_size}): give the run as many nodes as share it evenly"
                ]
            )
        micro_batches = train.global_batch_size // samples_at_once
        return cls(nodes, per_node, parallel.tensor, parallel.pipeline, micro_batches)

    @classmethod
    def fits(cls, config: Config, *, nodes: int) -> bool:
        """Whether so many nodes can share the model and the batch evenly."""
        try:
            cls.of(config, nodes=nodes)
        except ConfigError:
            return False
        return True

    @property
    def size(self) -> int:
        """Number of ranks over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        """Number of ranks that see different samples."""
        return self.size // (self.tensor * self.pipeline)

    def degrees(self) -> dict[str, int]:
        """The degrees that state is cut by; for people, since any layout reads any other."""
        return {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}

    def ranks_of(self, node_rank: int) -> range:
        """The ranks that run on one node."""
        return range(node_rank * self.ranks_per_node, (node_rank + 1) * self.ranks_per_node)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "World":
        return cls(**fields)
