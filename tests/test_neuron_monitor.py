"""Device metrics from replayed reports of neuron-monitor and from a copy of the driver's files."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raynium.health.neuron_monitor import (
    MEMORY_KINDS,
    DeviceMonitor,
    DeviceSample,
    has_devices,
    metrics,
    read_report,
    read_sysfs,
)
from raynium.tracking.metrics import check_metrics

pytestmark = pytest.mark.quick

FIXTURES = Path(__file__).parent / "fixtures/neuron"
REPORTS: list[dict[str, Any]] = [json.loads(line) for line in (FIXTURES / "monitor.jsonl").read_text().splitlines()]
ALL_CORES: dict[str, Any] = json.loads((FIXTURES / "monitor_all_cores.json").read_text())
IDLE = json.loads((FIXTURES / "monitor_idle.json").read_text())


def monitor_program(folder: Path, *, then: str) -> str:
    """A stand-in for neuron-monitor: prints the recorded reports, then runs a line of shell."""
    path = folder / "neuron-monitor"
    path.write_text(f"#!/bin/sh\ncat '{FIXTURES / 'monitor.jsonl'}'\n{then}\n")
    path.chmod(0o755)
    return str(path)


def make_sysfs(folder: Path) -> Path:
    for line in (FIXTURES / "sysfs.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, content = line.split()
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content + "\n")
    return folder


def runs(pid: int) -> bool:
    """False for a zombie too, which nobody may be there to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Heard:
    """What a monitor published."""

    def __init__(self) -> None:
        self.samples: list[DeviceSample] = []
        self._more = threading.Condition()

    def __call__(self, sample: DeviceSample) -> None:
        with self._more:
            self.samples.append(sample)
            self._more.notify_all()

    def wait_for(self, condition: Callable[[list[DeviceSample]], bool]) -> None:
        with self._more:
            assert self._more.wait_for(lambda: condition(self.samples), timeout=30), self.samples


def test_reports_are_read_and_their_counts_add_up() -> None:
    first = read_report(REPORTS[0], run_name="replay", before=DeviceSample())
    assert first.utilization_ratios == (0.4, 0.6) and first.flops_per_second == 120e12
    assert (first.ecc_corrected_errors, first.ecc_uncorrected_errors) == (4, 0)
    assert first.memory_bytes is not None and first.memory_bytes["tensors"] == 22020096, "of the fuller of its cores"
    second = read_report(REPORTS[1], run_name="replay", before=first)
    assert (second.ecc_corrected_errors, second.ecc_uncorrected_errors) == (6, 2)
    assert (second.execution_errors, second.execution_timeouts) == (8, 2), "four and one of each of two ranks"
    assert second.utilization_ratios == (0.8, 0.9)
    third = read_report(REPORTS[1], run_name="replay", before=second)
    assert (third.execution_errors, third.execution_timeouts, third.ecc_uncorrected_errors) == (16, 4, 4)


def test_another_runs_processes_are_not_counted() -> None:
    other = read_report(REPORTS[1], run_name="repl", before=DeviceSample())
    assert (other.utilization_ratios, other.flops_per_second, other.memory_bytes) == ((), None, None)
    assert other.execution_errors == 0 and other.ecc_uncorrected_errors == 2, "its devices' memory errors are"


def test_processes_that_list_all_cores_of_the_machine_count_with_their_own() -> None:
    sample = read_report(ALL_CORES, run_name="run", before=DeviceSample())
    assert sample.utilization_ratios == pytest.approx((0.02926, 0.0308, 0.02517, 0.02488))
    found = metrics([sample])
    assert found["device/utilization_ratio"] == pytest.approx(0.0275, abs=1e-4)
    assert found["device/lowest_utilization_ratio"] == pytest.approx(0.0249, abs=1e-4)


def test_a_rank_that_stands_still_counts_with_its_own_core() -> None:
    report = json.loads(json.dumps(ALL_CORES))
    counters = report["neuron_runtime_data"][1]["report"]["neuroncore_counters"]
    counters["neuroncores_in_use"]["1"]["neuroncore_utilization"] = 0
    assert read_report(report, run_name="run", before=DeviceSample()).utilization_ratios[1] == 0.0


@pytest.mark.parametrize("group", ["memory_used", "neuroncore_counters", "execution_stats", None])
def test_one_process_with_an_error_takes_nothing_from_the_others(group: str | None) -> None:
    report = json.loads(json.dumps(ALL_CORES))
    process = report["neuron_runtime_data"][0]
    if group is None:
        process |= {"error": "process exited", "report": None}
    else:
        process["report"][group] = {"error": "process exited"}
    left = read_report(report, run_name="run", before=DeviceSample()).utilization_ratios
    assert left[-3:] == pytest.approx((0.0308, 0.02517, 0.02488))
    assert len(left) == (3 if group in ("neuroncore_counters", None) else 4)


def test_a_node_whose_ranks_have_not_started_reports_its_errors_only() -> None:
    assert set(metrics([read_report(IDLE, run_name="replay", before=DeviceSample())])) == {
        "device/ecc_corrected_errors",
        "device/ecc_uncorrected_errors",
        "device/execution_errors",
        "device/execution_timeouts",
        "device/reporting_nodes",
    }


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {**IDLE, "system_data": None},
        {**IDLE, "neuron_runtime_data": [{"pid": 1}]},
        {**IDLE, "neuron_runtime_data": 3},
        [],
    ],
)
def test_a_report_of_another_form_is_refused(broken: Any) -> None:
    with pytest.raises(ValueError, match="another form than AWS documents"):
        read_report(broken, run_name="replay", before=DeviceSample())


def test_metrics_over_nodes() -> None:
    slow = DeviceSample((0.2, 0.4), 10.0, {"tensors": 5, "constants": 1}, 1, 0, 2, 0)
    fast = DeviceSample((0.9, 0.9), 30.0, {"tensors": 3, "constants": 2}, 0, 7, 0, 1)
    found = metrics([slow, fast])
    check_metrics(found)
    assert found == {
        "device/utilization_ratio": pytest.approx(0.6),
        "device/lowest_utilization_ratio": 0.2,
        "device/highest_utilization_ratio": 0.9,
        "device/flops_per_second": 40.0,
        "device/memory_used_bytes": 6.0,
        "device/memory_tensors_bytes": 5.0,
        "device/memory_constants_bytes": 1.0,
        "device/ecc_corrected_errors": 1.0,
        "device/ecc_uncorrected_errors": 7.0,
        "device/execution_errors": 2.0,
        "device/execution_timeouts": 1.0,
        "device/reporting_nodes": 2.0,
    }
    assert "device/flops_per_second" not in metrics([slow, replace(fast, flops_per_second=None)]), "a part is no sum"
    assert metrics([]) == {}


def test_every_metric_has_a_name_that_the_tracker_knows() -> None:
    check_metrics(metrics([DeviceSample((0.5,), 1.0, dict.fromkeys(MEMORY_KINDS, 1))]))


def test_sysfs_is_read(tmp_path: Path) -> None:
    found = read_sysfs(make_sysfs(tmp_path))
    assert (found.ecc_uncorrected_errors, found.execution_errors, found.execution_timeouts) == (3, 7, 1)
    assert found.memory_bytes == {"tensors": 100, "collectives": 500}
    assert (found.utilization_ratios, found.flops_per_second) == ((), None)


def test_sysfs_is_read_wherever_the_driver_has_moved_its_files(tmp_path: Path) -> None:
    folder = make_sysfs(tmp_path)
    (folder / "neuron0/errors/ecc").mkdir(parents=True)
    (folder / "neuron0/stats/hardware").rename(folder / "neuron0/errors/ecc/here")
    assert read_sysfs(folder).ecc_uncorrected_errors == 3


def test_a_driver_that_keeps_its_counts_elsewhere_is_not_a_device_without_errors(tmp_path: Path) -> None:
    (tmp_path / "neuron0/stats").mkdir(parents=True)
    (tmp_path / "neuron0/core_count").write_text("4\n")
    with pytest.raises(ValueError, match="this driver keeps them elsewhere"):
        read_sysfs(tmp_path)


def test_a_driver_without_devices_is_not_a_device_without_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no neuron\* folder"):
        read_sysfs(tmp_path)
    assert not has_devices(tmp_path)
    (tmp_path / "neuron0").touch()
    assert has_devices(tmp_path)


def test_the_monitor_is_followed_and_ended(tmp_path: Path) -> None:
    heard = Heard()
    monitor = DeviceMonitor(run_name="replay", publish=heard, command=monitor_program(tmp_path, then="exec sleep 300"))
    heard.wait_for(lambda samples: len(samples) == 2)
    pid = monitor.pid()
    assert pid is not None and heard.samples[1].execution_timeouts == 2
    monitor.close()
    assert monitor.pid() is None and not Path(f"/proc/{pid}").exists()


def test_after_a_monitor_that_ends_the_drivers_files_go_on_with_its_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    sysfs = make_sysfs(tmp_path / "sysfs")
    command = monitor_program(tmp_path, then="exit 3")
    monitor = DeviceMonitor(run_name="replay", publish=heard, command=command, sysfs=sysfs, period_seconds=0.01)
    heard.wait_for(lambda samples: len(samples) > 2)
    (sysfs / "neuron0/stats/hardware/sram_ecc_uncorrected").write_text("5\n")
    heard.wait_for(lambda samples: samples[-1].ecc_uncorrected_errors == 2 + 5)
    monitor.close()
    last = heard.samples[-1]
    assert (last.execution_errors, last.execution_timeouts, last.ecc_corrected_errors) == (8, 2, 6)
    assert [each.getMessage() for each in caplog.records].count(
        f"{command} ended with exit code 3: device metrics come from sysfs now"
    ) == 1


def test_nothing_to_read_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = DeviceMonitor(
        run_name="replay", publish=Heard(), command="no-such-monitor", sysfs=tmp_path, period_seconds=0.001
    )
    monitor._thread.join(30)
    monitor.close()
    texts = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(texts) == 2
    assert "no-such-monitor is not installed" in texts[0] and "no more device metrics" in texts[1]


def test_a_program_that_cannot_run_is_no_end_either(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = tmp_path / "neuron-monitor"
    program.write_bytes(b"\x7fELF, but no more of it")
    program.chmod(0o755)
    heard = Heard()
    sysfs = make_sysfs(tmp_path / "sysfs")
    monitor = DeviceMonitor(run_name="r", publish=heard, command=str(program), sysfs=sysfs, period_seconds=0.001)
    heard.wait_for(lambda samples: bool(samples))
    monitor.close()
    assert "cannot be started" in caplog.text


def test_reports_that_make_no_sense_are_left_out_with_one_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "neuron-monitor"
    program.write_text(f"#!/bin/sh\necho '{{'\necho '[]'\ncat '{FIXTURES / 'monitor.jsonl'}'\nexec sleep 300\n")
    program.chmod(0o755)
    heard = Heard()
    monitor = DeviceMonitor(run_name="replay", publish=heard, command=str(program))
    heard.wait_for(lambda samples: len(samples) == 2)
    monitor.close()
    assert caplog.text.count("is left out") == 1


def test_a_monitor_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.health.neuron_monitor.STOP_SECONDS", 0.2)
    program = monitor_program(
        tmp_path, then="trap '' TERM; cat '" + str(FIXTURES / "monitor.jsonl") + "'; while :; do sleep 0.05; done"
    )
    heard = Heard()
    monitor = DeviceMonitor(run_name="replay", publish=heard, command=program)
    heard.wait_for(lambda samples: len(samples) == 4)
    monitor.close()
    assert monitor.pid() is None


def test_the_monitor_ends_with_its_agent(tmp_path: Path) -> None:
    """An agent that is killed closes nothing; the monitor's next line then has no reader."""
    command = monitor_program(
        tmp_path, then=f"while :; do cat '{FIXTURES / 'monitor.jsonl'}' || exit; sleep 0.05; done"
    )
    told = tmp_path / "pid"
    program = (
        "import os, pathlib, sys, threading\n"
        "from raynium.health.neuron_monitor import DeviceMonitor\n"
        "monitor = DeviceMonitor(run_name='replay', publish=lambda sample: None, command=sys.argv[1])\n"
        "pathlib.Path(sys.argv[2]).write_text(str(monitor.pid()))\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, command, str(told)], check=True)
    deadline = time.monotonic() + 30
    while runs(int(told.read_text())):
        assert time.monotonic() < deadline, "the monitor outlives its agent"
        time.sleep(0.02)
