"""How long a run that is at its end goes on trying to save its last checkpoint. Pure."""

# The nodes are paid for meanwhile. What ends in this time is S3 that is throttled or down, a policy or a password that
# somebody corrects; what does not, would hardly end in an hour.
LAST_SAVE_SECONDS = 600.0
LONGEST_PAUSE_SECONDS = 60.0


def pause_before_next_try(tries: int, waited_seconds: float) -> float | None:
    """Seconds to wait after `tries` failed ones, the first of them `waited_seconds` ago; None: give up."""
    left = LAST_SAVE_SECONDS - waited_seconds
    return min(2.0**tries, LONGEST_PAUSE_SECONDS, left) if left > 0 else None
