"""Tells somebody outside of each incident: a command or a webhook of the user's. Nobody waits for either."""

import json
import logging
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raynium.config.fault import FaultSection

logger = logging.getLogger(__name__)

# Of one command or request.
NOTIFY_SECONDS = 10.0


class Notifier:
    """From a thread of its own. What goes wrong is told once a run, without what may be secret in it."""

    def __init__(self, fault: FaultSection, *, environment: Mapping[str, str], tell: Callable[[str], None]):
        """environment: where the variables stand that the config names. tell: a line for the user's terminal."""
        self._command = list(fault.notify_command)
        self._url = None if fault.notify_url is None else environment.get(fault.notify_url.removeprefix("$"))
        self._tell = tell
        self._failed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="notify")
        if fault.notify_url is not None and not (self._url or "").startswith(("http://", "https://")):
            self._fails(f"fault.notify_url is {fault.notify_url}, which holds no http(s) address where the driver runs")
            self._url = None

    def send(self, run: str, page: str | None, incident: Mapping[str, Any]) -> None:
        """Returns at once."""
        if self._command or self._url:
            text = f"Raynium run {run}: {incident['what']} failed at step {incident['step']:,}: {incident['cause']}"
            message = {"text": text, "run": run, "page": page, "incident": dict(incident)}
            self._thread.submit(self._send, json.dumps(message).encode())

    def close(self) -> None:
        """What was not sent within one try's time is left."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _send(self, message: bytes) -> None:
        if self._command:
            try:
                done = subprocess.run(self._command, input=message, capture_output=True, timeout=NOTIFY_SECONDS)
                if done.returncode:
                    # Its arguments and its output may hold what is secret.
                    self._fails(f"fault.notify_command ended with {done.returncode}")
            except (OSError, subprocess.TimeoutExpired) as error:
                self._fails(f"fault.notify_command could not be run: {type(error).__name__}")
        if self._url:
            try:
                request = urllib.request.Request(self._url, message, {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=NOTIFY_SECONDS).close()
            except (OSError, ValueError) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                # In the words of a ValueError stands the address.
                words = error if isinstance(error, OSError) else type(error).__name__
                self._fails(f"the webhook of fault.notify_url did not take an incident: {words}")

    def _fails(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            self._tell(f"{problem}. Incidents are in `raynium status` and on the MLflow page")
