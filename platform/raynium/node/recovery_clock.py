"""Where the time of a recovery goes: from a rank's death, as its agent sees it, to the next finished step. Pure."""

# What node 0 does until its ranks run; the phases after these are what rank 0 says (`rank/build.py`).
# settle: the dead rank's peers may know why. drain: the others are ended, and all they left is read. agree: the other
# nodes come as far, and the coordinator says from where to go on.
SETTLE, DRAIN, AGREE, FORK = "settle", "drain", "agree", "fork"


class RecoveryClock:
    """Of one agent. `now` is in seconds of its steady clock. A failure within a recovery prolongs it."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    def failed(self, now: float) -> None:
        if self._phase is None:
            self._since = now
        self._enter(SETTLE, now)

    def begins(self, phase: str, now: float) -> None:
        """The phase before it has ended. Nothing happens while there is nothing to recover from."""
        if self._phase is not None:
            self._enter(phase, now)

    def stepped(self, now: float) -> str | None:
        """A step is done; what to tell if it ends a recovery."""
        if self._phase is None:
            return None
        self._enter("step", now)
        seconds, self._seconds, self._phase = self._seconds, {}, None
        parts = ", ".join(f"{phase} {spent:.3f}" for phase, spent in seconds.items())
        return f"the next step was done {sum(seconds.values()):.2f} s after the failure was seen: {parts}"

    def _enter(self, phase: str, now: float) -> None:
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
