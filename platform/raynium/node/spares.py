"""Processes that wait to be the ranks of the next generation, so that a restart neither forks nor builds from nothing.

Each is forked from the template once the ranks that run have taken a step, and rehearses (`rank/rehearsal.py`). It has
its pipes, no process group, no state of the run and no image; it dies with the agent as ranks do.
"""

import logging
import os
import socket
from multiprocessing import reduction

from raynium.node.ranks import RankGroup, RankProcess, fork_rank
from raynium.rank import entry as rank_entry
from raynium.storage.process import is_halted

logger = logging.getLogger(__name__)

# Of what one has written before it died.
LAST_BYTES = 4000


class Spares:
    """Of one node and generation. One thread calls the methods."""

    def __init__(self, group: RankGroup, *, rehearsal: "rank_entry.Rehearsal" = rank_entry.rehearse_plan):
        """group: the ranks that run now. OSError or EOFError where this node lacks what it takes."""
        self._waiting: dict[int, RankProcess] = {}
        try:
            for rank, environment in group.environments.items():
                self._waiting[rank] = fork_rank(
                    rank, rank_entry.spare, environment, group.plan_json, group.program, rehearsal
                )
        except BaseException:
            self.close()
            raise

    def are_ready(self) -> bool:
        """All of them, and each to become a rank: for tests."""
        return all(each.connection.poll() for each in self._waiting.values())

    def pids(self) -> list[int]:
        return [each.process.pid or 0 for each in self._waiting.values()]

    def take(
        self, rank: int, environment: dict[str, str], plan_json: str, rendezvous: socket.socket | None
    ) -> RankProcess | None:
        """Makes it this rank, as `RankGroup` is told to; None if there is none that can be."""
        each = self._waiting.pop(rank, None)
        if each is None:
            return None
        try:
            # One that does not read would hold up whoever writes to it.
            if each.connection.poll() and not is_halted(each.process.pid or 0):
                assert each.connection.recv_bytes() == rank_entry.SPARE_IS_READY
                each.connection.send((environment, plan_json, rendezvous is not None))
                if rendezvous is not None:
                    reduction.send_handle(each.connection, rendezvous.fileno(), each.process.pid)
                return each
            logger.info("the spare of rank %d has not rehearsed to the end, or is stopped: another is forked", rank)
        except (EOFError, OSError):
            words = _left_in(each)
            logger.warning("the spare of rank %d has died: another is forked. Its last words: %s", rank, words)
        each.close()
        return None

    def close(self) -> None:
        """Ends those that nobody took."""
        for each in self._waiting.values():
            each.close()
        self._waiting.clear()


def _left_in(each: RankProcess) -> str:
    os.set_blocking(each.output.fileno(), False)
    try:
        return os.read(each.output.fileno(), LAST_BYTES).decode(errors="replace").strip() or "none"
    except BlockingIOError:
        return "none"
