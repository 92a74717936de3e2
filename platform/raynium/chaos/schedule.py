"""Which fault happens when, from a seed alone. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from raynium.errors import ConfigError


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule: the `number`-th from 1 on, of this kind, once the run has taken `step` steps.

    seed: of what the kind itself leaves to chance, such as which rank.
    """

    number: int
    step: int
    kind: str
    seed: int


def schedule(
    kinds: Sequence[str], *, faults: int, steps: int, seed: int, not_before: Mapping[str, int] = {}
) -> list[Fault]:
    """`faults` of them over a run of `steps` steps, in the order in which they happen.

    Kinds are dealt like cards, a shuffled deck after the other: each comes as often as any other, or once more. The
    last steps of the run are left in peace, to heal in. not_before: the first step at which a kind may come; one that
    was dealt too early changes places with the next that may come there, or is left out if there is none.
    """
    dice = Random(seed)
    dealt: list[str] = []
    while len(dealt) < faults:
        dealt += dice.sample(kinds, len(kinds))
    share = steps / (faults + 1)
    rolled = [(1 + int(share * (number + dice.random())), dice.getrandbits(32)) for number in range(faults)]
    for place, (step, _) in enumerate(rolled):
        first = not_before.get(dealt[place], 0)
        if step < first:
            late = [other for other in range(place, faults) if rolled[other][0] >= first]
            if other := next((other for other in late if dealt[other] not in not_before), None):
                dealt[place], dealt[other] = dealt[other], dealt[place]
    planned = [Fault(place + 1, step, dealt[place], own_seed) for place, (step, own_seed) in enumerate(rolled)]
    return [fault for fault in planned if fault.step >= not_before.get(fault.kind, 0)]


def beside_audits(planned: Sequence[Fault], *, every_steps: int, flips: str, spoils: Collection[str]) -> list[Fault]:
    """The same, where each multiple of `every_steps` is audited: `flips` only there, and nothing else that spoils a
    gradient, which an audit would find as well.
    """
    moved = []
    for fault in planned:
        beyond = fault.step % every_steps
        if fault.kind == flips and beyond:
            fault = replace(fault, step=fault.step + every_steps - beyond)
        elif fault.kind in spoils and not beyond:
            fault = replace(fault, step=fault.step + 1)
        moved.append(fault)
    return moved


def healing_steps(checkpoint_every: int) -> int:
    """In which a run certainly commits another checkpoint, wherever it is."""
    return 2 * checkpoint_every


def refuse_crowd(*, faults: int, steps: int, checkpoint_every: int) -> None:
    """Raises ConfigError where the run has too few steps to heal between faults: it would give up, and rightly so."""
    # A fault that lasts, and one after which ranks come twice, let the run take those steps more than once.
    needed = (faults + 1) * 2 * healing_steps(checkpoint_every)
    if needed > steps:
        problem = (
            f"{faults} faults in train.steps = {steps} steps with checkpoint.every_steps = {checkpoint_every}: between "
            f"two faults a run must get from one checkpoint to the next. Set train.steps={needed} or more, a lower "
            "checkpoint.every_steps, or fewer --faults"
        )
        raise ConfigError([problem])
