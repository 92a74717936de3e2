"""What follows from a failure: whose fault it was, whether the run goes on, and when. Pure; clocks are handed in."""

from collections.abc import Sequence
from dataclasses import dataclass

from raynium.config.fault import FaultSection
from raynium.health.faults import CORES_TAKEN, Fault
from raynium.run.protocol import NodeFault, RankExit
from raynium.run.verdicts.patience import Patience

# NeuronCores of a killed process come back only after 5 to 10 s (a report from the field, not measured by us). Ranks
# that find them taken try again after a pause, and for a while that is no failure of the run.
CORES_PAUSE_SECONDS = 2.0
CORES_RETURN_SECONDS = 60.0


@dataclass(frozen=True)
class Judgement:
    """What a failed generation means for the run."""

    # Why the run ends; None: another generation follows.
    ends: str | None = None
    pause_seconds: float = 0.0
    # False where the snapshot that the ranks started from cannot be to blame.
    doubts_images: bool = True


class Verdicts:
    """One per life of the coordinator."""

    def __init__(self, fault: FaultSection):
        self.node_faults: list[NodeFault] = []
        self._patience = Patience(fault)
        # Of failures in a row that had no other reason.
        self._cores_taken_since: float | None = None

    def keeps(self, step: int) -> None:
        """See `Patience`."""
        self._patience.keeps(step)

    def agent_lost(self) -> str | None:
        """A node or its agent was lost. Why that ends the run; None: it goes on."""
        too_many = self._patience.node_failure()
        return None if too_many is None else f"a node agent was lost. {too_many}"

    def hung(self, cause: str, *, step: int) -> Judgement:
        """A generation was ended because it hung, after this step."""
        too_many = self._patience.restart(step=step)
        ends = None if too_many is None else f"{cause}. {too_many}"
        return Judgement(ends, pause_seconds=self._patience.pause_seconds(), doubts_images=False)

    def ranks_failed(self, exit: RankExit, *, step: int, now: float) -> Judgement:
        """A generation failed of this exit (see `blamed`) on nodes that live, after this step.

        now: seconds of a steady clock.
        """
        if exit.undo is not None:
            # The ranks count those, and go back to a state that is good.
            return Judgement(doubts_images=False)
        cause = f"rank {exit.rank}: {exit.cause}"
        cores_taken = exit.fault is not None and exit.fault.name == CORES_TAKEN
        self._cores_taken_since = (self._cores_taken_since or now) if cores_taken else None
        if self._cores_taken_since is not None and now - self._cores_taken_since < CORES_RETURN_SECONDS:
            too_many = None
        else:
            too_many = self._patience.restart(step=step)
            too_many = self._patience.repeats(exit, step=step) or too_many
        if not exit.retry:
            return Judgement(cause)
        return Judgement(
            None if too_many is None else f"{cause}. {too_many}",
            pause_seconds=CORES_PAUSE_SECONDS if cores_taken else self._patience.pause_seconds(),
            doubts_images=not cores_taken,
        )

    def of_node(self, host: str, fault: Fault) -> Fault:
        """The fault as it stands for this node: a reset that did not keep it away is not advised again."""
        known = any((each.host, each.fault.name) == (host, fault.name) for each in self.node_faults)
        return fault.again() if known else fault

    def node_fault(self, found: NodeFault) -> bool:
        """Takes it down, once a generation and node. True: somebody has to see to that node, and is to be told."""
        known = any(
            (each.generation, each.node_rank) == (found.generation, found.node_rank) for each in self.node_faults
        )
        if known or not found.fault.names_the_node:
            return False
        self.node_faults.append(found)
        return True


def blamed(exits: Sequence[RankExit]) -> RankExit | None:
    """The exit that explains the others; None if all ended as they should.

    Broken hardware comes before all, since it computes wrong numbers, which its peers then refuse. Then what would
    happen again, then what a rank did itself before what it says of a peer: when a rank ends, its peers fail a moment
    later with a broken connection. Then a signal.
    """
    failed = [each for each in exits if each.cause is not None]
    return min(failed, key=_order) if failed else None


def _order(each: RankExit) -> tuple[bool, bool, bool, bool, int]:
    fault: Fault | None = each.fault
    broken = fault is not None and fault.names_the_node
    return not broken, each.retry, blames_a_peer(each), each.exit_code >= 0, each.rank


def blames_a_peer(exit: RankExit) -> bool:
    """Whether all that is known is that another rank was gone, or did not answer."""
    return exit.fault is not None and exit.fault.guilty == "peer"
