"""What the ranks of this node do, asked before they are killed: Python's stacks, and the collectives they have come to.

Python writes the stacks in the handler of a signal, also while the process waits in native code. A process that is
stopped handles none, so it is let go for it, after all others have written theirs: what they wait for may come then.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence

from raynium.node.ranks import RankGroup, RankProcess
from raynium.rank.entry import STACKS_SIGNAL
from raynium.run.protocol import Look
from raynium.storage.process import catches, is_halted, where_it_waits
from raynium.train.link import Collectives, RankMessage, TellCollectives

Handle = Callable[[Sequence[tuple[int, RankMessage]], Sequence[tuple[int, str]]], None]

# For those that run, and again for those that were stopped: training stands meanwhile.
LOOK_SECONDS = 1.0
# The main thread is written last, and this is the end of its outermost frame. Where a dump was cut (at 100 frames, by a
# full pipe) nobody can tell its end, but the process writes at one go: after so long without more, that was all.
LAST_FRAME = b" in <module>\n"
QUIET_SECONDS = 0.25
POLL_SECONDS = 0.01


def look_at(group: RankGroup, handle: Handle) -> dict[int, Look]:
    """Rank → what it was doing, of those that live. handle: for what the ranks say besides. Takes a second at most."""
    halted = [each for each in group.alive() if is_halted(each.process.pid or 0)]
    running = [each for each in group.alive() if each not in halted]
    return _ask(group, running, handle) | _ask(group, halted, handle)


def _ask(group: RankGroup, ranks: Sequence[RankProcess], handle: Handle) -> dict[int, Look]:
    """Of some of the group's ranks, all at once."""
    states = {each.rank: where_it_waits(each.process.pid or 0) for each in ranks}
    asked = [each for each in ranks if _signal(each)]
    for each in ranks:
        group.send(each.rank, TellCollectives())
    stacks: dict[int, bytes] = {each.rank: b"" for each in asked}
    records: dict[int, str] = {}
    deadline = time.monotonic() + LOOK_SECONDS
    # Rank → since when it wrote no more.
    quiet_since: dict[int, float] = {}
    while (now := time.monotonic()) < deadline:
        for each in asked:
            if text := _read(each):
                stacks[each.rank] += text
                quiet_since[each.rank] = now
        written = all(
            stacks[each.rank].endswith(LAST_FRAME) or now - quiet_since.get(each.rank, now) >= QUIET_SECONDS
            for each in asked
        )
        if written and len(records) == len(ranks):
            break
        messages, lines = group.poll(POLL_SECONDS)
        records |= {rank: message.record for rank, message in messages if isinstance(message, Collectives)}
        handle([pair for pair in messages if not isinstance(pair[1], Collectives)], lines)
    return {
        each.rank: Look(
            f"{states[each.rank]}\n{stacks.get(each.rank, b'').decode(errors='replace') or NO_STACKS}",
            records.get(each.rank, ""),
        )
        for each in ranks
    }


NO_STACKS = "no stacks: the process was too young to have a handler, or did not come to it in time\n"


def _signal(each: RankProcess) -> bool:
    """Asks for the stacks, and lets a stopped process go. False: it has no handler yet, and would die of the signal."""
    pid = each.process.pid or 0
    with contextlib.suppress(ProcessLookupError):
        handled = catches(pid, STACKS_SIGNAL)
        if handled:
            os.kill(pid, STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)
        return handled
    return False


def _read(each: RankProcess) -> bytes:
    """What it has written since."""
    text = b""
    while select.select([each.stacks], [], [], 0)[0] and (more := os.read(each.stacks.fileno(), 1 << 16)):
        text += more
    return text
