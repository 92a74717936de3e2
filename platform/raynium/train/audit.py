"""Looks for silent corruption: in an audited step each data rank computes the gradients of its neighbour's samples too.

The same parameters and samples on the same kind of device give the same bits, so two checksums that differ say that one
of two ranks computes wrong numbers, which no other check sees. Then all ranks compute what is in dispute once more, and
the majority says who. What follows is an exception on the ranks that are wrong, before the step is applied; the others
wait for them until the agents end the generation. Parameters that ranks of a tensor group hold alike are compared too.
What one rank alone holds or adds up is not: the sum over ranks, AdamW's arithmetic, and its moments.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Engine, StepResult, Votes


class SilentCorruption(Exception):
    """This rank's node computes wrong numbers. `health/faults.toml` knows it by name, and the node is left."""


class CorruptionUnsettled(Exception):
    """This rank or another does, on two nodes, and nobody can say which."""


class NotRepeatable(Exception):
    """The same rank computes the same thing differently: nothing can be compared. The same would happen again."""


class Auditable(Protocol):
    """What an engine has whose steps can be audited. All ranks call both, at the same time."""

    def rehearse(self, batch: Batch, *, step: int, data_rank: int) -> int:
        """The checksum that the step of that data rank, whose samples the batch is, would be audited by.

        It changes nothing, and may come inside of `step`, from `audit`, if that raises afterwards.
        """
        ...

    def replicas(self) -> int:
        """A checksum of this rank's parameters that are the same on all ranks of its tensor group."""
        ...


@dataclass(frozen=True)
class Finding:
    """Who is wrong, by rank. settled: else it is one of two. Without ranks: no rank repeats itself."""

    ranks: frozenset[int]
    settled: bool = True


def judge(originals: Mapping[int, Hashable], again: Sequence[Hashable]) -> Finding:
    """Of one dispute. originals: what two ranks, the owner of the samples and its neighbour, first had; they differ.
    again: what every rank has now.
    """
    truth, votes = Counter(again).most_common(1)[0]
    if 2 * votes > len(again):
        wrong = {rank for rank, each in enumerate(again) if each != truth}
        return Finding(frozenset(wrong | {rank for rank, each in originals.items() if each != truth}))
    repeats = frozenset(rank for rank, each in originals.items() if again[rank] == each)
    if len(again) > 2 or not repeats:
        return Finding(frozenset())
    return Finding(repeats, settled=False) if len(repeats) == 2 else Finding(frozenset(originals) - repeats)


class Audits:
    """Takes the loop's steps to an engine, and audits each `every_steps`-th. All ranks have one."""

    def __init__(
        self,
        engine: Engine,
        auditable: Auditable,
        rows: Callable[[int, int], Batch],
        gather: Callable[[Sequence[int]], list[list[int]]],
        *,
        every_steps: int,
        world: World,
    ):
        """auditable: the engine inside of `engine`. rows: of a step and data rank. gather: int32 of all ranks."""
        assert world.pipeline == 1 and world.data > 1
        self._engine, self._auditable, self._rows, self._gather = engine, auditable, rows, gather
        self._every_steps, self._world = every_steps, world

    def step(self, batch: Batch, *, step: int, votes: Votes) -> StepResult:
        if step % self._every_steps:
            return self._engine.step(batch, step=step, votes=votes)
        theirs = self._rehearse(step, (self._engine.data_rank + 1) % self._world.data)
        return self._engine.step(batch, step=step, votes=votes, audit=partial(self._compare, step, theirs))

    def _rehearse(self, step: int, data_rank: int) -> int:
        return self._auditable.rehearse(self._rows(step, data_rank), step=step, data_rank=data_rank)

    def _compare(self, step: int, theirs: int, own: int) -> None:
        own_of, theirs_of, replicas_of = self._of_data_ranks(own, theirs, self._auditable.replicas())
        differ = {rank for rank, values in enumerate(replicas_of) if len(set(values)) > 1}
        if differ:
            self._end(step, Finding(frozenset(differ)), "its tensor group holds copies of a parameter that differ")
        wrong: set[int] = set()
        for owner in range(self._world.data):
            checker = (owner - 1) % self._world.data
            originals = {owner: own_of[owner], checker: theirs_of[checker]}
            if originals[owner] == originals[checker]:
                continue
            (again,) = self._of_data_ranks(self._rehearse(step, owner))
            found = judge(originals, again)
            if not found.ranks or not found.settled:
                self._end(step, found, "")
            wrong |= found.ranks
        if wrong:
            others = f"others of {self._world.data} data ranks found another gradient of the same samples"
            self._end(step, Finding(frozenset(wrong)), others)

    def _of_data_ranks(self, *numbers: int) -> list[list[tuple[int, ...]]]:
        """For each number, of each data rank: those of its tensor group."""
        of_ranks, size = self._gather(numbers), self._world.tensor
        return [
            [tuple(each[place] for each in of_ranks[first : first + size]) for first in range(0, len(of_ranks), size)]
            for place in range(len(numbers))
        ]

    def _end(self, step: int, found: Finding, what: str) -> None:
        """Raises on the ranks that are meant, and waits on the others."""
        if not found.ranks:
            raise NotRepeatable(
                f"step {step}: ranks that computed the gradient of the same samples twice found two: a kernel of this "
                "device, or a task's own, adds in no fixed order, and nothing can be compared; set "
                "fault.audit_every_steps to null"
            )
        ranks = [rank for data_rank in sorted(found.ranks) for rank in self._ranks(data_rank)]
        nodes = {rank // self._world.ranks_per_node for rank in ranks}
        names = ", ".join(f"rank {rank} on node {rank // self._world.ranks_per_node}" for rank in ranks)
        if self._engine.data_rank in found.ranks:
            if found.settled:
                raise SilentCorruption(f"step {step}: {names}: {what}; the step was not applied")
            apart = (
                f"step {step}: {names}: each found another gradient of the same samples, twice, and no third data rank "
                "can say which is wrong; the step was not applied"
            )
            if len(nodes) == 1:
                raise SilentCorruption(apart)
            raise CorruptionUnsettled(f"{apart}: check both nodes (raynium preflight), or take more data ranks")
        while True:
            # Those that are wrong do not come; it fails when they have ended, if the agents are not sooner.
            self._gather([0])

    def _ranks(self, data_rank: int) -> range:
        return range(data_rank * self._world.tensor, (data_rank + 1) * self._world.tensor)
