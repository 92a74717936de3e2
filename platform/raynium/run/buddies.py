"""Which node takes copies of which node's snapshots: one that is likely to outlive it. Pure."""

from collections import Counter
from collections.abc import Sequence

from raynium.run.protocol import Address, AgentInfo


def buddies(agents: Sequence[AgentInfo]) -> tuple[Address | None, ...]:
    """By node rank, who takes copies of its snapshots; None where that one takes none, or there is no other.

    Every node is the buddy of one. As many as can be have theirs in another zone, or, where all are in one, in another
    placement group; where nodes do not say where they are, theirs is the next one.
    """
    found: list[Address | None] = [None] * len(agents)
    if len(agents) < 2:
        return tuple(found)
    ring = sorted(range(len(agents)), key=lambda node: (agents[node].zone, agents[node].placement_group))
    turned = _turn([agents[node] for node in ring])
    for place, node in enumerate(ring):
        buddy = agents[ring[(place + turned) % len(ring)]]
        found[node] = (buddy.host, buddy.buddy_port) if buddy.buddy_port else None
    return tuple(found)


def _turn(ring: Sequence[AgentInfo]) -> int:
    """By how many places buddies are apart in a ring that is sorted by zone, and by placement group within it.

    By the size of the largest zone no two of one zone meet, or, if it is more than half of the ring, as few as can.
    """
    size = len(ring)
    zones, groups = Counter(each.zone for each in ring), Counter((each.zone, each.placement_group) for each in ring)
    largest_zone, largest_group = max(zones.values()), max(groups.values())
    turns = {1, largest_group, size - largest_group, largest_zone, size - largest_zone} - {0, size}

    def apart(turn: int) -> tuple[int, int, int]:
        pairs = [(each, ring[(place + turn) % size]) for place, each in enumerate(ring)]
        in_zones = sum(a.zone != b.zone for a, b in pairs)
        in_groups = sum((a.zone, a.placement_group) != (b.zone, b.placement_group) for a, b in pairs)
        return in_zones, in_groups, -turn

    return max(turns, key=apart)
