"""What a node's Neuron devices report about themselves, read by its agent while the ranks train.

AWS's `neuron-monitor` prints one JSON report per line every five seconds (its user guide, SDK 2.29). Where it is
missing or ends, the driver's files in sysfs are read, which know memory and errors but not utilisation. Neither was
seen on hardware: the tests replay reports and a tree of files made after AWS's documents.
"""

import json
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEVICE_FOLDER = Path("/dev")
SYSFS = Path("/sys/devices/virtual/neuron_device")
# AWS's packages put their tools here; it is often not on the PATH.
MONITOR_FOLDER = Path("/opt/aws/neuron/bin")
PERIOD_SECONDS = 5.0
STOP_SECONDS = 5.0

# Kinds of device memory that are metrics of their own. sysfs knows more; those are in the sum.
MEMORY_KINDS = ("tensors", "constants", "model_code", "model_shared_scratchpad", "runtime_memory")
EXECUTION_ERRORS = ("completed_with_err", "completed_with_num_err", "incorrect_input", "failed_to_queue")
# sysfs: directories under stats/status; each of the first two had another name in older drivers
STATUS_ERRORS = {
    *("execute_completed_with_error", "execute_completed_with_num_error", "execute_failed_to_queue"),
    *("infer_completed_with_error", "infer_completed_with_num_error", "infer_failed_to_queue"),
    *("exec_bad_input", "generic_error", "hw_error"),
}


@dataclass(frozen=True)
class DeviceSample:
    """One node's devices at one moment. Plain data: it travels to the coordinator.

    utilization_ratios: of each logical core in use; empty where it is not known. flops_per_second: of all its cores.
    memory_bytes: kind → bytes, of the fullest core. All else is counted since the agent started; uncorrected errors
    include repairable ones, and execution errors the executions that could not start.
    """

    utilization_ratios: tuple[float, ...] = ()
    flops_per_second: float | None = None
    memory_bytes: Mapping[str, int] | None = None
    ecc_corrected_errors: int = 0
    ecc_uncorrected_errors: int = 0
    execution_errors: int = 0
    execution_timeouts: int = 0

    def plus(self, other: "DeviceSample", times: int = 1) -> "DeviceSample":
        """This one, with the counts of another added (or, at -1 times, taken away)."""
        sums = {name: getattr(self, name) + times * getattr(other, name) for name in COUNTS}
        return replace(self, **sums)


COUNTS = ("ecc_corrected_errors", "ecc_uncorrected_errors", "execution_errors", "execution_timeouts")


def metrics(samples: Iterable[DeviceSample]) -> dict[str, float]:
    """The newest sample of each node → metrics of the job, under names of tracking/metrics.py. Empty if there is none.

    Ratios are means over all cores of all nodes, with the lowest and the highest core; FLOP/s and counts are sums;
    memory is that of the core that has most.
    """
    known = list(samples)
    if not known:
        return {}
    found = {f"device/{name}": float(sum(getattr(each, name) for each in known)) for name in COUNTS}
    found["device/reporting_nodes"] = float(len(known))
    if ratios := [ratio for each in known for ratio in each.utilization_ratios]:
        found["device/utilization_ratio"] = sum(ratios) / len(ratios)
        found["device/lowest_utilization_ratio"] = min(ratios)
        found["device/highest_utilization_ratio"] = max(ratios)
    if all(each.flops_per_second is not None for each in known):
        found["device/flops_per_second"] = sum(each.flops_per_second or 0.0 for each in known)
    if memories := [each.memory_bytes for each in known if each.memory_bytes]:
        fullest = max(memories, key=lambda memory: sum(memory.values()))
        found["device/memory_used_bytes"] = float(sum(fullest.values()))
        found |= {f"device/memory_{kind}_bytes": float(fullest[kind]) for kind in MEMORY_KINDS if kind in fullest}
    return found


def read_report(report: Mapping[str, Any], *, run_name: str, before: DeviceSample) -> DeviceSample:
    """One report of neuron-monitor → the node's sample. Counts in a report are of its period: they add to `before`.

    Only ranks of this run count (NEURON_PROCESS_TAG is "<run>/rank-<rank>"), and of each the groups that have no error;
    ECC errors are the devices', whoever used them. Raises ValueError if the report is not made as AWS documents it.
    """
    ratios: list[float] = []
    flops = 0.0
    memory_of_core: dict[str, dict[str, int]] = {}
    errors, timeouts, corrected, uncorrected = 0, 0, 0, 0
    try:
        for process in report["neuron_runtime_data"] or ():
            if not str(process["neuron_runtime_tag"]).startswith(f"{run_name}/") or process.get("error"):
                continue
            groups = process["report"]
            memory: Mapping[str, Mapping[str, Any]] = {}
            if not (group := groups["memory_used"]).get("error"):
                memory = group["neuron_runtime_used_bytes"]["usage_breakdown"]["neuroncore_memory_usage"] or {}
            for number, kinds in memory.items():
                sums = memory_of_core.setdefault(number, {})
                for kind, size in kinds.items():
                    sums[kind] = sums.get(kind, 0) + int(size)
            if not (group := groups["neuroncore_counters"]).get("error"):
                cores = group["neuroncores_in_use"] or {}
                for number, core in cores.items():
                    # Some versions list all cores of the machine in each process, with zeros for those of others.
                    if len(cores) == 1 or core["neuroncore_utilization"] or any(memory.get(number, {}).values()):
                        ratios.append(float(core["neuroncore_utilization"]) / 100)
                        flops += float(core.get("flops") or 0)
            if not (group := groups["execution_stats"]).get("error"):
                errors += sum(int(group["execution_summary"][name]) for name in EXECUTION_ERRORS)
                timeouts += int(group["execution_summary"]["timed_out"])
        for device in report["system_data"]["neuron_hw_counters"]["neuron_devices"] or ():
            corrected += int(device["mem_ecc_corrected"]) + int(device["sram_ecc_corrected"])
            uncorrected += int(device["mem_ecc_uncorrected"]) + int(device["sram_ecc_uncorrected"])
            uncorrected += int(device.get("mem_ecc_repairable_uncorrected") or 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"neuron-monitor's report has another form than AWS documents: {error!r}") from error
    fullest = max(memory_of_core.values(), key=lambda kinds: sum(kinds.values()), default=None)
    counts = (corrected, uncorrected, errors, timeouts)
    return DeviceSample(tuple(ratios), flops if ratios else None, fullest, *counts).plus(before)


def read_sysfs(folder: Path = SYSFS) -> DeviceSample:
    """The driver's own counts, since it was loaded, over all devices of the node and whoever uses them.

    Files are looked for by name, since driver 2.31 moved several to other folders. Raises OSError if a file that is
    there cannot be read, ValueError if it holds no number, or if the driver shows no device or none of these files:
    counts of nothing would read as health.
    """
    if not any(folder.glob("neuron*")):
        raise ValueError("it has no neuron* folder: is the Neuron driver loaded?")
    names = ("mem_ecc_uncorrected", "mem_ecc_repairable_uncorrected", "sram_ecc_uncorrected")
    ecc = [path for name in names for path in folder.glob(f"neuron*/**/{name}") if path.is_file()]
    statuses = list(folder.glob("neuron*/**/status/*/total"))
    if not ecc and not statuses:
        raise ValueError("no neuron* folder in it has ECC or status counts: this driver keeps them elsewhere")
    uncorrected = sum(_number(path) for path in ecc)
    errors, timeouts = 0, 0
    for total in statuses:
        if total.parent.name in STATUS_ERRORS:
            errors += _number(total)
        elif total.parent.name == "timeout":
            timeouts += _number(total)
    memories = [
        {path.parent.name: _number(path) for path in core.glob("*/total")}
        for core in folder.glob("neuron*/**/device_mem")
    ]
    return DeviceSample(
        memory_bytes=max(memories, key=lambda kinds: sum(kinds.values()), default=None),
        ecc_uncorrected_errors=uncorrected,
        execution_errors=errors,
        execution_timeouts=timeouts,
    )


def _number(path: Path) -> int:
    return int(path.read_text(encoding="utf-8").strip())


def has_devices(folder: Path = DEVICE_FOLDER) -> bool:
    """Whether the Neuron driver shows a device on this machine."""
    return any(folder.glob("neuron[0-9]*"))


class DeviceMonitor:
    """Reads this node's devices in a thread of its own until `close()`. It never raises and never stops the training.

    A monitor that is missing, ends or cannot be understood is said once, in the log; then sysfs is read instead.
    """

    def __init__(
        self,
        *,
        run_name: str,
        publish: Callable[[DeviceSample], None],
        command: str = "neuron-monitor",
        sysfs: Path = SYSFS,
        period_seconds: float = PERIOD_SECONDS,
    ):
        """publish: is given each new sample, in this thread. command: the program's name on the PATH, or its path."""
        self._run_name = run_name
        self._publish = publish
        self._command = command
        self._sysfs = sysfs
        self._period_seconds = period_seconds
        self._last = DeviceSample()
        self._closing = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        executable = shutil.which(command) or shutil.which(command, path=str(MONITOR_FOLDER))
        if executable is None:
            logger.warning("%s is not installed: device metrics come from %s, without utilisation", command, sysfs)
        else:
            self._start(executable)
        self._thread = threading.Thread(target=self._run, name="device-monitor", daemon=True)
        self._thread.start()

    def pid(self) -> int | None:
        """Of the monitor's process while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def close(self) -> None:
        """Ends the monitor's process and the thread."""
        self._closing.set()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._thread.join()

    def _start(self, executable: str) -> None:
        nowhere = subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [executable], stdin=nowhere, stdout=subprocess.PIPE, stderr=nowhere, encoding="utf-8"
            )
        except OSError as error:
            logger.warning("%s cannot be started (%s): device metrics come from %s", executable, error, self._sysfs)

    def _run(self) -> None:
        if self._process is not None:
            self._follow(self._process)
        if not self._closing.is_set():
            self._poll_sysfs()

    def _follow(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        told = False
        with process.stdout:
            for line in process.stdout:
                try:
                    sample = read_report(json.loads(line), run_name=self._run_name, before=self._last)
                # JSON's errors are ValueErrors too.
                except ValueError as error:
                    if not told:
                        logger.warning("a report of %s is left out, as will be all like it: %s", self._command, error)
                    told = True
                    continue
                self._last = sample
                self._publish(sample)
        if not self._closing.is_set():
            code = process.wait()
            logger.warning("%s ended with exit code %d: device metrics come from sysfs now", self._command, code)

    def _poll_sysfs(self) -> None:
        counted = self._last
        try:
            first = read_sysfs(self._sysfs)
            while not self._closing.wait(self._period_seconds):
                self._publish(read_sysfs(self._sysfs).plus(first, -1).plus(counted))
        except (OSError, ValueError) as error:
            logger.warning("no more device metrics: %s cannot be read: %s", self._sysfs, error)
