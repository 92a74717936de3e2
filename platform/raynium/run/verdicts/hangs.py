"""Whether the run hangs, and who holds it up: from each rank's phase, step and stillness. Pure, without a clock.

The rank that is behind is judged, by the phase that it is in: those ahead wait for it in a collective, as still as it.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from raynium.config.fault import FaultSection
from raynium.run.positions import RankPosition
from raynium.run.protocol import Look

# Of the adaptive limit. The least is above the silence of a store that is an error (storage/s3_store.py, 120 s): who
# knows most speaks first.
SLOWEST_STEPS = 10.0
STEPS_KEPT = 100
LEAST_SECONDS = 180.0
# Beyond the time after which a device itself says which execution hangs (accelerators/timeouts.py).
AFTER_THE_DEVICE_SECONDS = 60.0
# What a phase allows in which nobody can know how long it takes. The first steps of a generation compile, on torch-xla
# without a word of it.
LOADING_SECONDS = 1800.0
COMPILING_SECONDS = 3 * 3600.0
# As of the config's own limit.
MOST_SECONDS = 3 * 3600.0
WARM_UP_STEPS = 2

What = Literal["stopped", "data", "collective", "compilation", "loading", "evaluation", "save", "upload"]
_WHAT: dict[str, What] = {
    "fetch": "data",
    "step": "collective",
    "compile": "compilation",
    "evaluate": "evaluation",
    "save": "save",
    "upload": "upload",
}
REMEDIES: dict[What, str] = {
    "stopped": "its process was stopped (SIGSTOP, a debugger, a frozen container): look who does that on its node",
    "data": "its loader gets no data: look whether data.path or data.mixture answer on its node (S3, NFS, the disk)",
    "collective": "its stacks say what it does in place of the collective that the others wait in",
    "compilation": "a compiler does not end: look at its processes and memory; a smaller graph compiles sooner "
    "(engine.compile, engine.activation_checkpointing)",
    "loading": "what it loads does not come: look whether the run's store and the data's answer on its node",
    "evaluation": "its stacks say where it evaluates; evaluate.max_documents and max_questions make that shorter",
    "save": "its copy into shared memory does not end: look at its node's memory",
    "upload": "an upload of its node does not end, and its agent has not given it up: look at both",
}


@dataclass(frozen=True)
class Hang:
    """ranks: that are behind, which all are where `position` says. limit_seconds: that it has been still for longer."""

    what: What
    ranks: tuple[int, ...]
    world_size: int
    position: RankPosition
    limit_seconds: float
    # Of the collective that they have not come to, or that all wait in.
    collective: str = ""

    def names(self, hosts: Mapping[int, str], ranks_per_node: int) -> str:
        """`rank 3 on node 1 (10.0.0.2)`. hosts: by node rank."""
        shown = [
            f"rank {rank} on node {rank // ranks_per_node} ({hosts.get(rank // ranks_per_node, 'unknown')})"
            for rank in self.ranks[:4]
        ]
        more = [f"{len(self.ranks) - 4} more"] if len(self.ranks) > 4 else []
        return " and ".join([", ".join(shown), *more])

    def describe(self, hosts: Mapping[int, str], ranks_per_node: int) -> str:
        """Who is behind, where, since when, and what to do. hosts: by node rank."""
        position, seconds = self.position, self.position.still_seconds
        limit = f"nothing came from there for {seconds:.1f} s (limit {self.limit_seconds:.4g} s, fault.hang_seconds)"
        if len(self.ranks) == self.world_size > 1 and self.what == "collective":
            where = self.collective or "a collective"
            return (
                f"all {self.world_size} ranks are {position}, none of them behind, and wait in {where}: {limit}; look "
                "at the network between the nodes, and at the stacks"
            )
        verb = "is" if len(self.ranks) == 1 else "are"
        missed = f", and has not come to {self.collective}" if self.collective else ""
        others = self.world_size - len(self.ranks)
        waiting = f"; {others} other rank(s) wait" if others else ""
        return f"{self.names(hosts, ranks_per_node)} {verb} {position}{missed}: {limit}{waiting}; {REMEDIES[self.what]}"


class Hangs:
    """Of one generation."""

    def __init__(self, fault: FaultSection, *, world_size: int, resume_step: int):
        self._fault = fault
        self._world_size = world_size
        self._resume_step = resume_step
        self._step_seconds: deque[float] = deque(maxlen=STEPS_KEPT)
        self._positions: dict[int, RankPosition] = {}
        self._device_seconds = 0.0

    def stepped(self, seconds: float) -> None:
        """A step took so long, the wait for its data included."""
        self._step_seconds.append(seconds)

    def seen(self, positions: Mapping[int, RankPosition], *, device_seconds: float) -> Hang | None:
        """Where the ranks of one node are; the verdict, once all nodes have said and the rank behind is too still.

        How long a rank was still counts as its agent told it: time in which nobody looked proves nothing.
        """
        self._positions |= positions
        self._device_seconds = max(self._device_seconds, device_seconds)
        if len(self._positions) < self._world_size:
            return None
        least = min(each.progress for each in self._positions.values())
        behind = {rank: each for rank, each in self._positions.items() if each.progress == least}
        # Of ranks in one place the one that cannot go on by itself is the one that the others wait for.
        halted = {rank: each for rank, each in behind.items() if each.halted}
        behind = halted or behind
        first = min(behind.values(), key=lambda each: each.still_seconds)
        limit = self.limit_seconds(first)
        if first.still_seconds < limit:
            return None
        what: What = "stopped" if halted else _WHAT.get(first.phase, "loading")
        return Hang(what, tuple(sorted(behind)), self._world_size, first, limit)

    def limit_seconds(self, position: RankPosition) -> float:
        """How long a rank may be still where it is."""
        step_seconds = self._limit_of_a_step()
        if position.halted:
            return step_seconds
        match position.phase:
            case "fetch" | "step" if position.step > self._resume_step + WARM_UP_STEPS and self._knows_steps:
                return step_seconds
            case "compile":
                return max(COMPILING_SECONDS, step_seconds)
            case "upload":
                # Its agent gives the upload up first.
                return self._fault.upload_silence_seconds + max(LEAST_SECONDS, step_seconds)
            case _:
                return max(LOADING_SECONDS, step_seconds)

    @property
    def _knows_steps(self) -> bool:
        """A coordinator that was started again has been told of none."""
        return bool(self._step_seconds) or self._fault.hang_seconds is not None

    def _limit_of_a_step(self) -> float:
        if self._fault.hang_seconds is not None:
            return self._fault.hang_seconds
        after_device = self._device_seconds + AFTER_THE_DEVICE_SECONDS if self._device_seconds else 0.0
        adapted = min(SLOWEST_STEPS * max(self._step_seconds, default=0.0), MOST_SECONDS)
        return max(LEAST_SECONDS, after_device, adapted)


def folder_of(generation: int) -> str:
    """Among the run's artifacts: of what its ranks did when it hung."""
    return f"hangs/generation-{generation:05d}"


def artifacts_of(generation: int, looks: Mapping[int, Mapping[int, Look]]) -> dict[str, str]:
    """Path → text. looks: by node rank and rank."""
    each = {rank: (node, look) for node, of_node in sorted(looks.items()) for rank, look in sorted(of_node.items())}
    stacks = [f"==== rank {rank}, node {node}: {look.stacks}" for rank, (node, look) in each.items()]
    records = {rank: json.loads(look.collectives) for rank, (_, look) in each.items() if look.collectives}
    folder = folder_of(generation)
    return {f"{folder}/stacks.txt": "\n".join(stacks)} | (
        {f"{folder}/collectives.json": json.dumps(records)} if records else {}
    )


def with_looks(hang: Hang, looks: Mapping[int, Look]) -> Hang:
    """The verdict again, now that it is known which collectives each rank has come to. Pure.

    Who has come to fewer of its group's than another is behind: phases alone cannot tell ranks of one step apart.
    """
    if hang.what != "collective":
        return hang
    # Group → rank → number and kind of the last collective that it has come to.
    came: dict[str, dict[int, tuple[int, str]]] = {}
    for rank, look in looks.items():
        for group, collective in _last_of_each_group(look.collectives).items():
            came.setdefault(group, {})[rank] = collective
    if not came:
        return hang
    newest = max(each for ranks in came.values() for each in ranks.values())
    # An interpreter that answers nobody is stuck in native code, which a wait for a collective is not.
    missing = [rank for rank in hang.ranks if not any(rank in ranks for ranks in came.values())]
    for ranks in () if missing else came.values():
        newest = max(ranks.values())
        missing = [rank for rank in hang.ranks if rank in ranks and ranks[rank][0] < newest[0]]
        if missing:
            break
    if not missing:
        return replace(hang, collective=f"the same collective ({newest[1]})")
    return replace(hang, ranks=tuple(missing), collective=f"collective {newest[0]:,} of its group ({newest[1]})")


def _last_of_each_group(record: str) -> dict[str, tuple[int, str]]:
    """Group's name → number and kind of the last collective that the rank has come to."""
    found: dict[str, tuple[int, str]] = {}
    entries: Sequence[Mapping[str, Any]] = json.loads(record).get("entries", ()) if record else ()
    for entry in entries:
        if not entry["is_p2p"]:
            name = entry["process_group"][0]
            found[name] = max(found.get(name, (0, "")), (entry["collective_seq_id"], entry["profiling_name"]))
    return found
