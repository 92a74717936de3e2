"""Which NeuronCores of a node a job's ranks take. Arithmetic on core numbers; no I/O.

Ray says which cores it granted as text, in the order it kept them (Ray Train v1 sorted them as text: "0,1,10,11,2").
A rank's neighbours in its tensor group must be its neighbours on the chip, so the order is made numeric here. Numbers
are of *logical* cores, as everywhere in the runtime: with LNC=2, the default of Trainium2, one is two physical cores.
"""

import re

from raynium.errors import LaunchError

# Set by Ray in the agent, read by the Neuron runtime in the rank.
VISIBLE_CORES = "NEURON_RT_VISIBLE_CORES"
_HOW = "whole numbers and inclusive ranges such as 0-31, separated by commas"


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers in ascending order from "0,1,10,11,2", "0-31" or "0-3,8-11". Raises LaunchError."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise LaunchError(f"{VISIBLE_CORES} is {text!r}, in which {part!r} is no core or range: give {_HOW}")
        first, last = int(match[1]), int(match[2] or match[1])
        cores += range(first, last + 1)
    if len(set(cores)) != len(cores):
        raise LaunchError(
            f"{VISIBLE_CORES} is {text!r}, which names a core twice: a core belongs to one rank; give {_HOW}"
        )
    return tuple(sorted(cores))


def rank_cores(granted: str | None, *, local_world_size: int) -> tuple[int, ...]:
    """Local rank → its logical core.

    granted: NEURON_RT_VISIBLE_CORES as the agent found it; None: nobody granted anything, so the job owns the node
    and takes cores 0 to local_world_size - 1 (torchrun). Raises LaunchError unless they are one aligned block of as
    many cores as ranks: the collectives' routes in hardware exist for no other.
    """
    cores = tuple(range(local_world_size)) if granted is None else parse_cores(granted)
    shown = ",".join(map(str, cores))
    if len(cores) != local_world_size:
        raise LaunchError(
            f"this node's {local_world_size} ranks were given {len(cores)} NeuronCore(s) ({shown}), the rule is one "
            f"each: set cluster.ranks_per_node to {len(cores)}, or give the node {local_world_size} `neuron_cores`"
        )
    if cores != tuple(range(cores[0], cores[0] + len(cores))) or cores[0] % len(cores):
        raise LaunchError(
            f"this node's {local_world_size} ranks were given NeuronCores {shown}: collectives work only in an "
            f"unbroken block of {local_world_size} that begins at a multiple of {local_world_size}. Take whole nodes "
            "(cluster.ranks_per_node = all cores of the node), or wait until the other job on this node has ended"
        )
    return cores
