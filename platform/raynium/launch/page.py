"""What the driver keeps current on the run's MLflow page while it runs."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from raynium.errors import TrackingError
from raynium.hardware.catalog import peak_note
from raynium.run.protocol import Status
from raynium.tracking.runs import TrackedRun, set_tags

PAGE_RETRY_SECONDS = 60.0


class Page:
    """Tags of the MLflow run: which peak its MFU is a share of, and each node that a verdict has named.

    A run that MLflow could not be asked to open again is opened here, once it answers.
    """

    def __init__(
        self, mlflow: TrackedRun, *, open_mlflow: Callable[[], TrackedRun], dtype: str, tell: Callable[[str], None]
    ):
        """tell: a line for the user's terminal."""
        self._mlflow = mlflow
        self._open_mlflow = open_mlflow
        self._dtype = dtype
        self._tell = tell
        self._shown: dict[str, str] = {}
        self._peak_told = ""
        # When it is tried again, after MLflow did not answer.
        self._not_before = 0.0 if mlflow.is_open else time.monotonic() + PAGE_RETRY_SECONDS

    def show(self, status: Status, node_faults: Sequence[dict[str, Any]]) -> None:
        """node_faults: of the whole run, as its record keeps them. An MLflow that is away costs the page only."""
        tags = {f"node_fault.{number}": each["text"] for number, each in enumerate(node_faults, start=1)}
        peak_flops = status.metrics.get("throughput/peak_flops_per_rank")
        if peak_flops is not None and status.agents:
            tags["mfu.peak"] = peak_note(peak_flops, dtype=self._dtype, machine=status.agents[0].machine)
            if self._peak_told != tags["mfu.peak"]:
                self._peak_told = tags["mfu.peak"]
                self._tell(f"MFU is a share of {self._peak_told}")
        new = {name: text for name, text in tags.items() if self._shown.get(name) != text}
        if (not new and self._mlflow.is_open) or time.monotonic() < self._not_before:
            return
        try:
            if not self._mlflow.is_open:
                self._mlflow = self._open_mlflow()
                self._tell("MLflow answers again, and shows the run")
            set_tags(self._mlflow.uri, self._mlflow.run_id, new)
        except TrackingError as error:
            # Once for all: it may be away for a day.
            if not self._not_before and self._mlflow.is_open:
                self._tell(f"the MLflow page does not show {', '.join(new)} yet: {error}")
            self._not_before = time.monotonic() + PAGE_RETRY_SECONDS
            return
        self._shown |= new
        self._not_before = 0.0
