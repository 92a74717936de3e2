"""What EC2 says beforehand of an instance that it will take away, stop or reboot: watched in its metadata service."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from raynium.health.metadata_service import ADDRESS, Session

logger = logging.getLogger(__name__)

# A spot instance has two minutes from its notice on.
POLL_SECONDS = 5.0
# A page may be missing once.
POLLS_WITHOUT = 3


@dataclass(frozen=True)
class Notice:
    """What will become of this instance, and when (Unix time); None: EC2 does not say, it may be minutes or never."""

    what: str
    unix: float | None

    def __str__(self) -> str:
        if self.unix is None:
            return self.what
        return f"{self.what} at {datetime.fromtimestamp(self.unix, UTC):%Y-%m-%d %H:%M:%S} UTC"


def ask_for_notices(address: str = ADDRESS) -> list[Notice] | None:
    """Those that stand now, the most urgent kind first; None where no metadata service answers, as outside of EC2."""
    service = Session.open(address)
    if service is None:
        return None
    found = list[Notice]()
    for path, read in READERS.items():
        if (page := service.page(f"meta-data/{path}")) is None:
            continue
        try:
            found += read(page)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # Tomorrow's EC2 may say it in other words: what is told then, and what the other pages say, is better than
            # nothing.
            logger.warning("a notice of EC2's could not be read: %s: %r (%s)", path, page, error)
    return found


def _spot(page: str) -> list[Notice]:
    fields: dict[str, Any] = json.loads(page)
    return [Notice(f"EC2 will {fields['action']} this spot instance", _unix(fields["time"]))]


def _maintenance(page: str) -> list[Notice]:
    return [
        Notice(f"EC2 has scheduled {each['Code']} for this instance", _unix(each["NotBefore"]))
        for each in json.loads(page)
        if each.get("State") == "active"
    ]


def _rebalance(page: str) -> list[Notice]:
    return [Notice("EC2 recommends to leave this spot instance", None)]


# Each page is there while its notice stands. The most urgent kind is first.
READERS: dict[str, Callable[[str], list[Notice]]] = {
    "spot/instance-action": _spot,
    "events/maintenance/scheduled": _maintenance,
    "events/recommendations/rebalance": _rebalance,
}


def _unix(text: str) -> float:
    """Of `2026-11-30T08:22:00Z`, or `30 Nov 2026 08:22:00 GMT`."""
    parsed = datetime.fromisoformat(text) if text[:4].isdigit() and "T" in text else parsedate_to_datetime(text)
    return parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp()


class NoticeWatch:
    """In a thread of its own, which ends by itself where nobody could give a notice."""

    def __init__(
        self,
        ask: Callable[[], list[Notice] | None],
        tell: Callable[[Notice], object],
        withdrawn: Callable[[], object],
        *,
        poll_seconds: float = POLL_SECONDS,
    ):
        """ask: as `ask_for_notices`. tell: given each notice again at each poll while it stands.

        So also a coordinator that was started again hears of it, or one that an agent joins later. withdrawn: called
        when none stands any more, as of a maintenance that was cancelled.
        """
        self._ask, self._tell, self._withdrawn, self._poll_seconds = ask, tell, withdrawn, poll_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(self._poll_seconds)

    def _watch(self) -> None:
        # polls: since one stood; None: none has.
        answered, polls = False, None
        while True:
            notices = self._ask()
            if notices is None and not answered:
                return
            # One that has answered once is only slow, or busy, when it does not.
            answered = True
            if notices:
                polls = 0
                for notice in notices:
                    self._tell(notice)
            elif notices is not None and polls is not None:
                polls += 1
                if polls == POLLS_WITHOUT:
                    self._withdrawn()
                    polls = None
            if self._closing.wait(self._poll_seconds):
                return
