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

SPOT = "spot/instance-action"
REBALANCE = "events/recommendations/rebalance"
MAINTENANCE = "events/maintenance/scheduled"
# A spot instance has two minutes from its notice on.
POLL_SECONDS = 5.0


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
    found = []
    if (page := service.page(f"meta-data/{SPOT}")) is not None:
        fields: dict[str, Any] = json.loads(page)
        found.append(Notice(f"EC2 will {fields['action']} this spot instance", _unix(fields["time"])))
    if (page := service.page(f"meta-data/{MAINTENANCE}")) is not None:
        found += [
            Notice(f"EC2 has scheduled {each['Code']} for this instance", _unix(each["NotBefore"]))
            for each in json.loads(page)
            if each.get("State") == "active"
        ]
    if service.page(f"meta-data/{REBALANCE}") is not None:
        found.append(Notice("EC2 recommends to leave this spot instance", None))
    return found


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
        *,
        poll_seconds: float = POLL_SECONDS,
    ):
        """ask: as `ask_for_notices`. tell: given each notice once."""
        self._ask, self._tell, self._poll_seconds = ask, tell, poll_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(self._poll_seconds)

    def _watch(self) -> None:
        told: set[Notice] = set()
        while True:
            try:
                notices = self._ask()
            except (ValueError, KeyError) as error:
                # Tomorrow's EC2 may say it in other words: what is told then is better than nothing.
                logger.warning("a notice of EC2's could not be read: %s", error)
                notices = []
            if notices is None:
                return
            for notice in notices:
                if notice not in told:
                    told.add(notice)
                    self._tell(notice)
            if self._closing.wait(self._poll_seconds):
                return
