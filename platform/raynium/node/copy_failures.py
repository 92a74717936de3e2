"""When it is told that snapshots are not copied to another node. Pure."""

import errno

# Snapshots of one rank in a row, before the user is told. One is nothing: its rank wrote it again while it was sent, or
# a generation ended.
FAILURES_TOLD = 3
WRITTEN_AGAIN = (
    "its rank writes that image again before all of the node's are sent: raise fault.buddy_megabytes_per_second, or "
    "save less often"
)


class CopyFailures:
    """Of the copies that one agent sends."""

    def __init__(self) -> None:
        # Rank → how many of its newest snapshots in a row.
        self._in_a_row: dict[int, int] = {}
        self._told = False

    def failed(self, rank: int) -> bool:
        """Whether that is to be told: once, until every rank's snapshots are copied again."""
        self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1
        news = not self._told and self._in_a_row[rank] >= FAILURES_TOLD
        self._told = self._told or news
        return news

    def copied(self, rank: int) -> None:
        """A snapshot of this rank has arrived whole."""
        self._in_a_row.pop(rank, None)
        self._told = self._told and max(self._in_a_row.values(), default=0) >= FAILURES_TOLD


def why_not_kept(error: Exception) -> str:
    """For who sent the copy, and, if it comes to that, for the user."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
        remedy = "enlarge it (`raynium preflight` says to what), or set fault.buddy_copies to false"
        return f"its shared memory has no room for them; {remedy}"
    return str(error)


def told(rank: int, host: str, holder: str, problem: str) -> str:
    """The line for the user. host: of the rank; holder: of the copies."""
    return (
        f"the last snapshots of rank {rank} on {host} could not be copied to {holder}: {problem}. Until they can, a "
        "lost node costs the steps since the newest checkpoint"
    )
