"""The machines of a run: what they are, how many, and how few will do."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from raynium.config.section import Accepts, Nodes, Ranks, Section, Unit


def _as_time(text: str | None) -> str | None:
    if text is not None:
        datetime.strptime(text, "%Y-%m-%dT%H:%MZ")
    return text


class ClusterSection(Section):
    """The machines. One Ray Train worker (the node agent) per node forks `ranks_per_node` ranks."""

    accelerator: Literal["auto", "cpu", "cuda", "neuron", "neuron_xla"] = "auto"
    """What the ranks compute on. auto: what the nodes have, best first (`raynium doctor`)."""
    instance_type: str | None = None
    """EC2's name of the nodes, e.g. trn2.48xlarge: cores and memory are checked. null: unchecked."""
    nodes: Nodes = 1
    """Machines that train."""
    min_nodes: Nodes | None = None
    """With so many the run starts, or goes on, where others did not come, or did not replace a lost one, within
    fault.replace_seconds: on the largest number that shares the batch evenly, until there are more. Samples and their
    order stay. null: it waits for cluster.nodes."""
    spares: Annotated[int, Field(ge=0), Unit("nodes")] = 0
    """Machines beside those, held ready: one takes the place of a lost one at once."""
    ends_at: Annotated[str | None, AfterValidator(_as_time), Accepts("UTC, as 2026-12-01T11:30Z")] = None
    """When the machines are taken away, of a Capacity Block 30 minutes before its end: fault.stop_seconds earlier the
    run saves and stops. null: nobody says. EC2's own notices, and `ray drain-node`, are heard in any case."""
    ranks_per_node: Ranks = 1
    """Processes on each: one per NeuronCore, GPU, or CPU slot."""

    @property
    def seats(self) -> int:
        """Machines that the run takes: those that train and the spares."""
        return self.nodes + self.spares
