"""The spool: nothing accepted is lost by a crash, a torn line or a full disk, and disk use is bounded by what waits."""

import math
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.errors import TrackingError
from raynium.tracking.metrics import METRICS, check_metrics
from raynium.tracking.spool import MetricSpool


def append(spool: MetricSpool, step: int, **extra: float) -> None:
    spool.append({"train/loss": step / 7, **extra}, step=step, unix_ms=1_700_000_000_000 + step)


def steps_waiting(spool: MetricSpool) -> list[int]:
    return [record.step for record in spool.read_batch(max_points=1_000_000)]


def reopen(spool: MetricSpool, folder: Path, **options: int) -> MetricSpool:
    spool.close()
    return MetricSpool(folder, **options)


def test_points_come_back_bit_for_bit_and_in_order(tmp_path: Path):
    spool = MetricSpool(tmp_path)
    spool.append({"train/loss": 0.1 + 0.2, "train/grad_norm": math.inf}, step=3, unix_ms=11)
    spool.append({"train/loss": math.nan, "train/grad_norm": -math.inf}, step=4, unix_ms=12)
    first, second = reopen(spool, tmp_path).read_batch(max_points=100)
    assert (first.step, first.unix_ms, first.metrics) == (3, 11, {"train/loss": 0.1 + 0.2, "train/grad_norm": math.inf})
    assert math.isnan(second.metrics["train/loss"])
    assert second.metrics["train/grad_norm"] == -math.inf


def test_batch_is_bounded_in_points_but_never_empty(tmp_path: Path):
    spool = MetricSpool(tmp_path)
    for step in range(5):
        append(spool, step, **{"train/tokens": 1, "train/samples": 1})
    assert [record.step for record in spool.read_batch(max_points=7)] == [0, 1]
    assert [record.step for record in spool.read_batch(max_points=1)] == [0]
    assert spool.points_pending == 15


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(st.sampled_from(["append", "append", "append", "send", "restart", "torn"]), max_size=60))
def test_any_order_of_appends_sends_and_restarts_keeps_the_queue(tmp_path_factory, actions: list[str]):
    folder = tmp_path_factory.mktemp("spool")
    spool = MetricSpool(folder, segment_bytes=150)
    expected: list[int] = []
    next_step = 0
    for action in actions:
        if action == "append":
            append(spool, next_step)
            expected.append(next_step)
            next_step += 1
        elif action == "send":
            records = spool.read_batch(max_points=2)
            if records:
                spool.acknowledge(through=records[-1].number)
                del expected[: len(records)]
        elif action == "restart":
            spool = reopen(spool, folder, segment_bytes=150)
        else:
            spool.close()
            for path in sorted(folder.glob("points-*.jsonl"))[-1:]:
                with path.open("ab") as file:
                    file.write(b'{"step": 99, "unix')
            spool = MetricSpool(folder, segment_bytes=150)
        assert steps_waiting(spool) == expected
        assert spool.points_pending == len(expected)
    spool.close()


def test_acknowledged_segments_leave_the_disk(tmp_path: Path):
    spool = MetricSpool(tmp_path, segment_bytes=500)
    for step in range(100):
        append(spool, step)
    assert len(list(tmp_path.glob("points-*"))) > 10
    spool.acknowledge(through=98)
    assert len(list(tmp_path.glob("points-*"))) <= 2
    assert steps_waiting(spool) == [99]


def test_a_damaged_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spool = MetricSpool(tmp_path)
    for step in range(3):
        append(spool, step)
    spool.close()
    (path,) = tmp_path.glob("points-*")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[2])
    spool = MetricSpool(tmp_path)
    records = spool.read_batch(max_points=100)
    assert [(record.step, len(record.metrics)) for record in records] == [(0, 1), (0, 0), (2, 1)]
    assert "damaged line" in caplog.text
    spool.acknowledge(through=records[1].number)
    assert steps_waiting(reopen(spool, tmp_path)) == [2]


def test_a_damaged_acknowledgement_sends_again_rather_than_losing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spool = MetricSpool(tmp_path)
    for step in range(3):
        append(spool, step)
    spool.acknowledge(through=0)
    spool.close()
    (tmp_path / "acknowledged").write_text("")
    assert steps_waiting(MetricSpool(tmp_path)) == [0, 1, 2]
    assert "sent again" in caplog.text


def test_acknowledging_works_again_after_the_acknowledgement_was_damaged(tmp_path: Path):
    spool = MetricSpool(tmp_path, segment_bytes=500)
    for step in range(30):
        append(spool, step)
    spool.acknowledge(through=20)
    assert not (tmp_path / "points-000000000000.jsonl").exists()
    (tmp_path / "acknowledged").unlink()
    spool = reopen(spool, tmp_path, segment_bytes=500)
    records = spool.read_batch(max_points=100)
    spool.acknowledge(through=records[-2].number)
    assert steps_waiting(reopen(spool, tmp_path)) == [29]


class FullDisk:
    """No file of this process may grow beyond a size: writes fail in the middle of a line, as on a full disk."""

    def __init__(self, num_bytes: int):
        self.limit = num_bytes

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_full_disk_holds_points_in_memory_and_writes_them_later(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spool = MetricSpool(tmp_path)
    with FullDisk(1000):
        for step in range(50):
            append(spool, step)
        assert steps_waiting(spool) == list(range(50))
    assert caplog.text.count("kept in memory") == 1
    (path,) = tmp_path.glob("points-*")
    assert path.read_bytes().endswith(b"}\n"), "a torn line would swallow the next one"
    append(spool, 50)
    assert steps_waiting(reopen(spool, tmp_path)) == list(range(51))
    assert spool.points_lost == 0


def test_points_sent_from_memory_while_the_disk_is_full(tmp_path: Path):
    spool = MetricSpool(tmp_path)
    with FullDisk(1000):
        for step in range(50):
            append(spool, step)
        spool.acknowledge(through=39)
        assert steps_waiting(spool) == list(range(40, 50))
    append(spool, 50)
    spool = reopen(spool, tmp_path)
    assert steps_waiting(spool) == list(range(40, 51))
    append(spool, 51)
    assert steps_waiting(reopen(spool, tmp_path)) == list(range(40, 52))


def test_full_disk_and_full_memory_count_what_they_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spool = MetricSpool(tmp_path, max_held_records=5)
    with FullDisk(0):
        for step in range(8):
            append(spool, step, **{"train/tokens": 1})
        assert (spool.points_lost, spool.points_pending) == (6, 10)
        assert caplog.text.count("points are lost") == 1
        with pytest.raises(TrackingError, match=r"artifact 'a\.txt'.*Free some space"):
            spool.put_artifact("a.txt", "text")
        spool.close()
    assert "5 steps of metrics never reached the disk" in caplog.text


def test_acknowledgement_that_cannot_be_written_is_remembered_and_only_sends_again(tmp_path: Path):
    spool = MetricSpool(tmp_path)
    for step in range(4):
        append(spool, step)
    with FullDisk(0):
        spool.acknowledge(through=1)
        assert steps_waiting(spool) == [2, 3]
    assert steps_waiting(reopen(spool, tmp_path)) == [0, 1, 2, 3]


def test_artifacts_wait_on_disk_and_survive(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spool = MetricSpool(tmp_path)
    spool.put_artifact("samples/step-10.txt", "def main(:\n  é")
    spool = reopen(spool, tmp_path)
    spool.put_artifact("config.yaml", "x: 1")
    first, second = spool.read_artifacts()
    assert (first.path, first.text, second.path) == ("samples/step-10.txt", "def main(:\n  é", "config.yaml")
    spool.remove_artifact(first)
    second.file.write_text("")
    assert spool.read_artifacts() == []
    assert "damaged" in caplog.text
    assert spool.artifacts_pending == 0


def test_one_process_at_a_time(tmp_path: Path):
    holder = "import sys; from raynium.tracking.spool import MetricSpool; s = MetricSpool(sys.argv[1]); input()"
    other = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE)
    try:
        while not (tmp_path / "lock").exists() or not (tmp_path / "lock").read_text():
            assert other.poll() is None
        with pytest.raises(TrackingError, match=rf"in use by process {other.pid}.*Wait for it to end"):
            MetricSpool(tmp_path, wait_seconds=0.2)
        threading.Timer(0.2, other.kill).start()
        MetricSpool(tmp_path, wait_seconds=60).close()
    finally:
        other.kill()
        other.communicate()


def test_a_folder_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="local disk that this user may write"):
        MetricSpool(tmp_path / "file")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"train/los": 1.0}, "did you mean 'train/loss'"),
        ({"zzzz": 1.0}, "add it, with its unit, to METRICS"),
        ({"train/loss": "1.0"}, "is not a number; pass int or float"),
        ({"train/loss": True}, "is not a number"),
        ({}, "at least one name"),
    ],
)
def test_refused_points_leave_no_trace(tmp_path: Path, metrics: dict, message: str):
    spool = MetricSpool(tmp_path)
    with pytest.raises(ValueError, match=message):
        spool.append(metrics, step=1, unix_ms=1)
    assert steps_waiting(spool) == []


def test_negative_step_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="must not be negative"):
        MetricSpool(tmp_path).append({"train/loss": 1.0}, step=-1, unix_ms=1)


def test_every_metric_name_is_area_slash_name_and_mlflow_takes_it():
    from mlflow.utils.validation import _validate_metric_name

    for name, meaning in METRICS.items():
        area, _, rest = name.partition("/")
        assert area and rest and "/" not in rest and meaning
        _validate_metric_name(name)
    check_metrics(dict.fromkeys(METRICS, 0.5))


def test_a_process_killed_while_appending_loses_no_returned_append(tmp_path: Path):
    """The child reports each append that returned; whatever it reported must be there after kill -9."""
    child = (
        "import sys\nfrom raynium.tracking.spool import MetricSpool\n"
        "spool = MetricSpool(sys.argv[1], segment_bytes=3000)\n"
        "for step in range(10**9):\n"
        "    spool.append({'train/loss': step}, step=step, unix_ms=step)\n"
        "    sys.stdout.write(f'{step}\\n'); sys.stdout.flush()\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", child, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(400):
        writer.stdout.readline()
    writer.kill()
    last_reported = 399 + len(writer.communicate()[0].splitlines())
    spool = MetricSpool(tmp_path)
    steps = steps_waiting(spool)
    assert steps == list(range(len(steps)))
    assert len(steps) >= last_reported
