"""Where a rank is, as its node agent tells it: which is behind, and in what words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankPosition:
    """Where a rank is: the step it works on, or the phase it is in. halted: its process was stopped by a signal.
    still_seconds: since it last told anything, or, halted, since it was stopped, as far as its agent could look.
    """

    step: int
    phase: str = "step"
    halted: bool = False
    still_seconds: float = 0.0

    @property
    def progress(self) -> tuple[int, int]:
        """Less is farther behind."""
        order = ("start", "group", "build", "restore", "data", "fetch", "compile", "step", "evaluate", "save", "upload")
        return self.step, order.index(self.phase) if self.phase in order else 0

    @property
    def done(self) -> int:
        """The newest step that it has done, or goes on from."""
        return self.step - 1 if self.phase in ("fetch", "compile", "step", "evaluate") else self.step

    def __str__(self) -> str:
        places = {"start": "starting", "group": "meeting the other ranks", "build": "building its engine"}
        places |= {"restore": "loading its state", "data": "opening its data"}
        places |= {
            "fetch": f"waiting for the data of step {self.step:,}",
            "compile": f"compiling in step {self.step:,}",
        }
        places |= {"upload": f"waiting with the save of step {self.step:,} for an earlier one's upload"}
        places |= {"evaluate": f"evaluating after step {self.step:,}"}
        places |= {"step": f"in step {self.step:,}", "save": f"saving step {self.step:,}"}
        place = places.get(self.phase, f"in phase {self.phase!r}")
        return f"{place}, stopped by a signal" if self.halted else place
