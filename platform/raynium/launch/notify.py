"""Tells somebody outside of each incident: a command or a webhook of the user's.

Training waits for neither, and the end of the run for CLOSE_SECONDS.
"""

import json
import os
import queue
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raynium.config.fault import VARIABLE, FaultSection
from raynium.errors import RunInUse, StoreError
from raynium.run.record import RecordKeeper, RunRecord
from raynium.terminal.report import page_of

# Of one command or request.
NOTIFY_SECONDS = 10.0
# Of all that is left to send when the run has ended.
CLOSE_SECONDS = 5.0


class Notifier:
    """From a thread of its own, each incident tried once. What goes wrong is told once a run, without what may be
    secret in it.
    """

    def __init__(
        self,
        fault: FaultSection,
        *,
        notified: Iterable[str],
        environment: Mapping[str, str],
        tell: Callable[[str], None],
    ):
        """notified: keys of incidents that earlier drivers have sent. environment: where the variables stand that the
        config names. tell: a line for the user's terminal.
        """
        self._wanted = bool(fault.notify_command or fault.notify_url)
        words = [environment.get(word[1:]) if re.match(VARIABLE, word) else word for word in fault.notify_command]
        unset = [name for name, word in zip(fault.notify_command, words, strict=True) if word is None]
        self._command = [] if unset else [word for word in words if word is not None]
        self._url = None if fault.notify_url is None else environment.get(fault.notify_url.removeprefix("$"))
        self._tell = tell
        self._failed = self._closed = False
        # Keys of those that were tried, by whichever driver, and of those that wait as well.
        self._tried = set(notified)
        self._heard = set(self._tried)
        self._waiting: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        if fault.notify_url is not None and not (self._url or "").startswith(("http://", "https://")):
            self._fails(f"fault.notify_url is {fault.notify_url}, which holds no http(s) address where the driver runs")
            self._url = None
        if unset:
            self._fails(f"fault.notify_command has the word {unset[0]}, which is not set where the driver runs")
        # The interpreter does not wait for it: an address that is silent must not keep a driver that has ended.
        self._thread = threading.Thread(target=self._send_all, name="notify", daemon=True)
        self._thread.start()

    def hear(self, record: RunRecord) -> None:
        """Sends those of its incidents that were not. Returns at once."""
        for incident in record.incidents or ():
            if incident["key"] in self._heard:
                continue
            self._heard.add(incident["key"])
            if self._command or self._url:
                words = f"{incident['what']} at step {incident['step']:,}: {incident['cause']}"
                message = {"text": f"Raynium run {record.name}: {words}", "run": record.name, "page": page_of(record)}
                self._waiting.put((incident["key"], json.dumps(message | {"incident": incident}).encode()))
            elif not self._wanted:
                # Nobody is told of it later because somebody wants to be from then on.
                self._tried.add(incident["key"])

    def notified(self, incidents: Iterable[Mapping[str, Any]]) -> list[str]:
        """The keys of those that need not be sent any more, for the run record."""
        return [each["key"] for each in incidents if each["key"] in self._tried]

    def close(self) -> None:
        """Sends what waits, within CLOSE_SECONDS; the rest is left, and told."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            left = len(self._heard - self._tried)
            self._tell(f"{left} incident(s) could not be sent within {CLOSE_SECONDS:g} s of the run's end")
        self._closed = True

    def _send_all(self) -> None:
        while (next_one := self._waiting.get()) is not None:
            key, message = next_one
            self._send(message)
            self._tried.add(key)

    def _send(self, message: bytes) -> None:
        if self._command:
            try:
                done = subprocess.run(self._command, input=message, capture_output=True, timeout=NOTIFY_SECONDS)
                if done.returncode:
                    # Its arguments and its output may hold what is secret.
                    self._fails(f"fault.notify_command ended with {done.returncode}")
            except Exception as error:
                self._fails(f"fault.notify_command could not be run: {type(error).__name__}")
        if self._url:
            try:
                request = urllib.request.Request(self._url, message, {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=NOTIFY_SECONDS).close()
            except Exception as error:
                # Whatever an address and its server make of it, the next incident is still to be sent.
                self._fails(f"the webhook of fault.notify_url did not take an incident: {_without_address(error)}")
                if isinstance(error, urllib.error.HTTPError):
                    error.close()

    def _fails(self, problem: str) -> None:
        if not self._failed and not self._closed:
            self._failed = True
            self._tell(f"{problem}. Incidents are in `raynium status` and on the MLflow page")


def notifier_of(fault: FaultSection, keeper: RecordKeeper, tell: Callable[[str], None]) -> Notifier:
    """Of a run that was just claimed. What drivers before this one did not come to send is sent."""
    notifier = Notifier(fault, notified=keeper.record.notified or (), environment=os.environ, tell=tell)
    notifier.hear(keeper.record)
    return notifier


def tell_end(notifier: Notifier, keeper: RecordKeeper, record: RunRecord, tell: Callable[[str], None]) -> None:
    """The run has ended, with this record: what was not sent of it goes out, and the record keeps what did."""
    notifier.hear(record)
    notifier.close()
    notified = notifier.notified(record.incidents or ())
    if notified == (record.notified or []):
        return
    try:
        keeper.update(notified=notified)
    except (StoreError, RunInUse) as error:
        tell(f"incidents may be sent once more when the run goes on, since the record does not show that: {error}")


def _without_address(error: Exception) -> str:
    """What went wrong, in words in which no address stands: those of the system's errors, and nobody else's."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP Error {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, OSError) and not isinstance(cause, urllib.error.URLError):
        return cause.strerror or type(cause).__name__
    return type(cause).__name__ if isinstance(cause, Exception) else type(error).__name__
