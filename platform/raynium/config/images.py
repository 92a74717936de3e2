"""How many images of ranks' states lie in a node's shared memory: one answer for ranks, agents, plan and preflight."""

from raynium.config.fault import FaultSection
from raynium.config.schema import Config

# Of one rank at least: one is being uploaded, or kept for a restart, while the other is written.
IMAGE_SLOTS = 2
# Of one rank of another node: the newest copy that is complete, and the one that comes in.
COPY_SLOTS = 2


def image_slots(fault: FaultSection) -> int:
    """Images of each rank. Snapshots between checkpoints need one more, while an older one is being uploaded."""
    return IMAGE_SLOTS + (fault.snapshot_every_steps is not None)


def copy_slots(config: Config) -> int:
    """Images of each rank of another node, as many ranks as a node has: every node holds those of one."""
    return COPY_SLOTS if config.fault.buddy_copies and config.cluster.nodes > 1 else 0
