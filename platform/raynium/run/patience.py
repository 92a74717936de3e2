"""When failures are too many. Pure: what is counted is what failed since the newest checkpoint."""

from raynium.config.fault import FaultSection


class Patience:
    """Of one coordinator's life. A run of months may lose any number of nodes, as long as it gets on in between."""

    def __init__(self, fault: FaultSection):
        self._fault = fault
        self._restarts = 0
        self._nodes = 0

    def progress(self) -> None:
        """A new checkpoint is committed."""
        self._restarts = self._nodes = 0

    def restart(self) -> str | None:
        """A generation failed on nodes that live. Why that was one too many; None: go on."""
        self._restarts += 1
        return _too_many(self._restarts, "failure", "max_restarts", self._fault.max_restarts_without_progress)

    def node_failure(self) -> str | None:
        """A node or its agent was lost, whether or not ranks ran. As `restart`."""
        self._nodes += 1
        limit = self._fault.max_node_failures_without_progress
        return _too_many(self._nodes, "loss of a node agent", "max_node_failures", limit)


def _too_many(count: int, what: str, field: str, limit: int) -> str | None:
    if count <= limit:
        return None
    return (
        f"That is {what} number {count} without a new checkpoint between (fault.{field}_without_progress={limit}). "
        f"Start the run again to go on from its newest checkpoint, and give a higher limit if such failures are to be "
        f"lived with"
    )
