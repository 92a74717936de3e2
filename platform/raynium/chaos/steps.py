"""The steps that a run has taken, as its ranks write them down for chaos (`rank/armed.py`)."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One step of one life of rank 0: `process` is its pid. loss: all its bits, as `float.hex` writes them.

    held: seconds for which chaos itself kept the rank from taking it.
    """

    step: int
    unix: float
    process: int
    loss: str
    held: float = 0.0


@dataclass
class Steps:
    """All of them so far, oldest first; read on by `look`."""

    file: Path
    taken: list[Step] = field(default_factory=list)
    # The farthest step that any life has taken.
    newest: int = 0
    _read_bytes: int = 0

    def look(self) -> None:
        """Reads what was written since."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        # The last line may be half there.
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode().splitlines():
            step, unix, process, loss, held = line.split()
            self.taken.append(Step(int(step), float(unix), int(process), loss, float(held)))
            self.newest = max(self.newest, int(step))

    def usual_seconds(self) -> float:
        """From one step to the next of the same life, the median."""
        pairs = zip(self.taken, self.taken[1:], strict=False)
        gaps = sorted(
            after.unix - before.unix - after.held for before, after in pairs if before.process == after.process
        )
        return gaps[len(gaps) // 2] if gaps else 0.0

    def losses(self) -> dict[int, set[str]]:
        """Step → every loss that it had. More than one: what was done again came out differently."""
        found: dict[int, set[str]] = {}
        for each in self.taken:
            found.setdefault(each.step, set()).add(each.loss)
        return found


@dataclass(frozen=True)
class Cost:
    """seconds: that the run stood still, over what a step takes. steps: done once more."""

    seconds: float
    steps: int


def cost(steps: Steps, *, struck_unix: float, over_unix: float, ends_ranks: bool, before: int) -> Cost | None:
    """Of a fault at `struck_unix`; None until a step was taken, after it was over, that no life had taken before.

    over_unix: when it was taken back, if it was one that lasts. ends_ranks: the old ranks' steps do not count, one of
    which may have been under way. before: how many entries `steps.taken` had.
    """
    old = steps.taken[:before]
    reached = max((each.step for each in old), default=0)
    process = old[-1].process if old else 0
    again, moved_unix, still = 0, struck_unix, 0.0
    for each in steps.taken[before:]:
        if each.step <= reached:
            again += 1
            continue
        reached, still, moved_unix = each.step, max(still, each.unix - moved_unix - each.held), each.unix
        if each.unix >= over_unix and not (ends_ranks and each.process == process):
            return Cost(max(0.0, still - steps.usual_seconds()), again)
    return None
