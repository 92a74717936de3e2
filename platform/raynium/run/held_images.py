"""Which snapshots a node has in its memory, as agents tell the coordinator and orders tell agents."""

from collections.abc import Sequence
from dataclasses import dataclass

from raynium.config.world import World


@dataclass(frozen=True)
class HeldImages:
    """Snapshots of one generation and step, complete in a node's memory. ranks: short, since all orders name them."""

    generation_id: str
    step: int
    ranks: Sequence[int]
    world: World

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", as_range(self.ranks))


def as_range(ranks: Sequence[int]) -> range | tuple[int, ...]:
    """The same ranks, ascending: those that are neighbours, as a node's are, as a range, which takes no room."""
    if isinstance(ranks, range):
        return ranks
    ordered = tuple(sorted(set(ranks)))
    whole = range(ordered[0], ordered[-1] + 1) if ordered else range(0)
    return whole if len(whole) == len(ordered) else ordered
