"""What a driver does at a signal: the run saves and ends, and nobody who is in a hurry has to wait for that."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

# Whoever stops a group of processes may signal one of them twice in a moment, and means one stop.
SECOND_SIGNAL_SECONDS = 2.0


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """First Ctrl-C, SIGTERM, `ray job stop` or closed terminal: save and end.

    The second Ctrl-C ends at once, and so does a SIGTERM that comes SECOND_SIGNAL_SECONDS after the first signal.
    """

    def first(signal_number: int, frame: Any) -> None:
        request_stop(signal.Signals(signal_number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        began = time.monotonic()

        def second(signal_number: int, frame: Any) -> None:
            if time.monotonic() - began >= SECOND_SIGNAL_SECONDS:
                raise SystemExit(128 + signal_number)

        signal.signal(signal.SIGTERM, second)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    numbers = [signal.SIGTERM, signal.SIGINT]
    # With `nohup` the run is to outlive its terminal.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, first) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
