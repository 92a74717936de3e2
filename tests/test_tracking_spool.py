"""The spool: nothing accepted is lost by a crash or a full disk, and disk use is bounded by what waits."""

import math
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.errors import TrackingError
from raynium.tracking.metrics import METRICS, check_metrics
from raynium.tracking.spool import MetricSpool

pytestmark = pytest.mark.quick


@pytest.fixture
def open_spool(tmp_path: Path) -> Iterator[Callable[..., MetricSpool]]:
    """Makes spools of one folder; the one before is closed first."""
    opened: list[MetricSpool] = []

    def open_one(**options: int) -> MetricSpool:
        if opened:
            opened[-1].close()
        opened.append(MetricSpool(tmp_path, **options))
        return opened[-1]

    yield open_one
    for spool in opened[-1:]:
        spool.close()


def append(spool: MetricSpool, step: int, **extra: float) -> None:
    spool.append({"train/loss": step / 7, **extra}, step=step, unix_ms=1_700_000_000_000 + step)


def steps_waiting(spool: MetricSpool) -> list[int]:
    return [waiting.step for waiting in spool.read_steps(max_points=1_000_000)]


def test_points_come_back_bit_for_bit_and_in_order(open_spool):
    spool = open_spool()
    spool.append({"train/loss": 0.1 + 0.2, "train/grad_norm": math.inf}, step=3, unix_ms=11)
    spool.append({"train/loss": math.nan, "train/grad_norm": -math.inf}, step=4, unix_ms=12)
    first, second = open_spool().read_steps(max_points=100)
    assert (first.step, first.unix_ms, first.metrics) == (3, 11, {"train/loss": 0.1 + 0.2, "train/grad_norm": math.inf})
    assert math.isnan(second.metrics["train/loss"])
    assert second.metrics["train/grad_norm"] == -math.inf


def test_batch_is_bounded_in_points_but_never_empty(open_spool):
    spool = open_spool()
    for step in range(5):
        append(spool, step, **{"train/tokens": 1, "train/samples": 1})
    assert [waiting.step for waiting in spool.read_steps(max_points=7)] == [0, 1]
    assert [waiting.step for waiting in spool.read_steps(max_points=1)] == [0]
    assert spool.points_pending == 15


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(st.sampled_from(["append", "append", "append", "send", "restart"]), max_size=60))
def test_any_order_of_appends_sends_and_restarts_keeps_the_queue(tmp_path_factory, actions: list[str]):
    folder = tmp_path_factory.mktemp("spool")
    spool = MetricSpool(folder)
    expected: list[int] = []
    next_step = 0
    for action in actions:
        if action == "append":
            append(spool, next_step)
            expected.append(next_step)
            next_step += 1
        elif action == "send":
            steps = spool.read_steps(max_points=2)
            if steps:
                spool.acknowledge_steps(steps)
                del expected[: len(steps)]
        else:
            spool.close()
            spool = MetricSpool(folder)
        assert steps_waiting(spool) == expected
        assert spool.points_pending == len(expected)
    spool.close()


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_disk_holds_no_more_than_what_once_waited_at_a_time(tmp_path: Path, open_spool):
    spool = open_spool()
    sizes = []
    for round in range(6):
        for step in range(2000):
            append(spool, round * 2000 + step)
        spool.acknowledge_steps(spool.read_steps(max_points=2000))
        sizes.append(bytes_on_disk(tmp_path))
    assert max(sizes[3:]) <= max(sizes[:3]) < 8 << 20
    assert steps_waiting(spool) == []
    spool.close()


def test_points_are_appended_while_another_connection_reads_and_while_it_checkpoints(tmp_path: Path, open_spool):
    spool = open_spool()
    append(spool, 0)
    with closing(sqlite3.connect(tmp_path / "queue.db")) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM steps").fetchone() == (1,)
        for step in range(1, 3000):
            append(spool, step)
        assert reader.execute("SELECT count(*) FROM steps").fetchone() == (1,)
    assert not spool._held, "the reader kept points from the disk"
    assert steps_waiting(spool) == list(range(3000))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, to count the calls of fsync")
def test_no_append_and_no_acknowledgement_waits_for_a_disk(tmp_path: Path):
    """By the system calls of a whole life of the spool, checkpoints of the write-ahead log included."""
    life = (
        "import sys\nfrom raynium.tracking.spool import MetricSpool\n"
        "spool = MetricSpool(sys.argv[1])\n"
        "for step in range(3000):\n"
        "    spool.append({'train/loss': step}, step=step, unix_ms=step)\n"
        "    if step % 100 == 99: spool.acknowledge_steps(spool.read_steps(max_points=100))\n"
    )
    library = tmp_path / "count_syncs.so"
    source = tmp_path / "count_syncs.c"
    source.write_text(
        '#include <unistd.h>\nstatic int count(void) { write(2, "sync\\n", 5); return 0; }\n'
        "int fsync(int fd) { return count(); }\nint fdatasync(int fd) { return count(); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    command = [sys.executable, "-c", life, str(tmp_path / "spool")]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("damage", ["no database", "a page of zeros", "torn"])
def test_a_queue_that_a_power_cut_damaged_is_set_aside(
    tmp_path: Path, open_spool, caplog: pytest.LogCaptureFixture, damage: str
):
    spool = open_spool()
    for step in range(300):
        append(spool, step)
    spool.close()
    file = tmp_path / "queue.db"
    content = file.read_bytes()
    damaged = {
        "no database": b"x" * len(content),
        "a page of zeros": content[:8192] + b"\0" * 4096 + content[12288:],
        "torn": content[: len(content) // 2],
    }
    file.write_bytes(damaged[damage])
    spool = open_spool()
    assert (steps_waiting(spool), spool.points_pending) == ([], 0)
    assert "as after a power cut" in caplog.text
    (aside,) = tmp_path.glob("queue.damaged-*")
    assert str(aside) in caplog.text and aside.read_bytes() == damaged[damage]
    append(spool, 301)
    assert steps_waiting(open_spool()) == [301]


class FullDisk:
    """No file of this process may grow beyond a size: writes fail in the middle of a line, as on a full disk."""

    def __init__(self, num_bytes: int):
        self.limit = num_bytes

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_full_disk_holds_points_in_memory_and_writes_them_later(open_spool, caplog: pytest.LogCaptureFixture):
    spool = open_spool()
    with FullDisk(60_000):
        for step in range(50):
            append(spool, step)
        assert 0 < len(spool._held) < 50
        assert drained(spool, acknowledge=False) == list(range(50)), "from disk and from memory"
    assert caplog.text.count("kept in memory") == 1
    append(spool, 50)
    assert steps_waiting(open_spool()) == list(range(51))
    assert spool.points_lost == 0


def drained(spool: MetricSpool, *, acknowledge: bool = True, stop: int = 10**9) -> list[int]:
    """Steps in the order in which a sender gets them, up to `stop`."""
    steps: list[int] = []
    while len(steps) < stop and (batch := spool.read_steps(max_points=min(7, stop - len(steps)))):
        steps += [each.step for each in batch]
        if not acknowledge:
            return steps_waiting(spool)
        spool.acknowledge_steps(batch)
    return steps


def test_points_sent_from_memory_while_the_disk_is_full(open_spool):
    spool = open_spool()
    with FullDisk(60_000):
        for step in range(50):
            append(spool, step)
        num_held = len(spool._held)
        assert drained(spool, stop=50 - num_held + 3) == list(range(50 - num_held + 3))
        waiting = list(range(50 - num_held + 3, 50))
        assert (steps_waiting(spool), spool.points_pending) == (waiting, len(waiting))
    append(spool, 50)
    spool = open_spool()
    assert steps_waiting(spool)[-len(waiting) - 1 :] == [*waiting, 50]
    append(spool, 51)
    assert steps_waiting(open_spool())[-len(waiting) - 2 :] == [*waiting, 50, 51]


def test_a_step_that_reaches_the_disk_while_a_batch_is_read_is_neither_skipped_nor_read_twice(open_spool):
    spool = open_spool()
    with FullDisk(0):
        append(spool, 0)
        append(spool, 1)
    on_disk = spool._steps_on_disk

    def disk_recovers(**asked):
        append(spool, 2)
        return on_disk(**asked)

    spool._steps_on_disk = disk_recovers
    assert [each.step for each in spool.read_steps(max_points=100)] == [0, 1]
    del spool._steps_on_disk
    assert steps_waiting(spool) == [0, 1, 2]


def test_full_disk_and_full_memory_count_what_they_refuse(open_spool, caplog: pytest.LogCaptureFixture):
    spool = open_spool(max_held_steps=5)
    with FullDisk(0):
        for step in range(8):
            append(spool, step, **{"train/tokens": 1})
        assert (spool.points_lost, spool.points_pending) == (6, 10)
        assert caplog.text.count("points are lost") == 1
        with pytest.raises(TrackingError, match=r"artifact 'a\.txt'.*Free some space"):
            spool.put_artifact("a.txt", "text")
        assert spool.artifacts_pending == 0
        spool.close()
    assert "5 steps of metrics never reached the disk" in caplog.text


def test_acknowledgement_that_cannot_be_written_is_remembered_and_only_sends_again(open_spool):
    spool = open_spool()
    for step in range(4):
        append(spool, step)
    spool.put_artifact("a.txt", "text")
    with FullDisk(0):
        spool.acknowledge_steps(spool.read_steps(max_points=2))
        spool.acknowledge_artifact(*spool.read_artifacts())
        assert steps_waiting(spool) == [2, 3]
        assert (spool.read_artifacts(), spool.artifacts_pending) == ([], 0)
        spool.close()
    spool = open_spool()
    assert steps_waiting(spool) == [0, 1, 2, 3]
    assert [artifact.path for artifact in spool.read_artifacts()] == ["a.txt"]


def test_artifacts_wait_on_disk_and_survive(open_spool):
    spool = open_spool()
    spool.put_artifact("samples/step-10.txt", "def main(:\n  é")
    spool = open_spool()
    spool.put_artifact("config.yaml", "x: 1")
    first, second = spool.read_artifacts()
    assert (first.path, first.text, second.path) == ("samples/step-10.txt", "def main(:\n  é", "config.yaml")
    assert spool.artifacts_pending == 2
    spool.acknowledge_artifact(first)
    assert spool.read_artifacts() == [second]
    spool = open_spool()
    assert (spool.read_artifacts(), spool.artifacts_pending) == ([second], 1)


@pytest.mark.parametrize("opened_again", [False, True])
def test_an_artifact_that_comes_once_all_others_have_gone_waits_too(open_spool, opened_again):
    spool = open_spool()
    for text in ("1", "2", "3"):
        spool.put_artifact("checkpoints.json", text)
        (waiting,) = spool.read_artifacts()
        assert waiting.text == text
        spool.acknowledge_artifact(waiting)
        assert (spool.read_artifacts(), spool.artifacts_pending) == ([], 0)
        spool = open_spool() if opened_again else spool


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
    with pytest.raises(TrackingError, match="local disk with room, that this user may write"):
        MetricSpool(tmp_path / "file")
    with FullDisk(1000), pytest.raises(TrackingError, match="local disk with room"):
        MetricSpool(tmp_path / "full")
    MetricSpool(tmp_path / "full").close()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"train/los": 1.0}, "did you mean 'train/loss'"),
        ({"zzzz": 1.0}, "they are in METRICS of tracking/metrics.py, with their units"),
        ({"train/loss": "1.0"}, "is not a number; pass int or float"),
        ({"train/loss": True}, "is not a number"),
        ({}, "at least one name"),
    ],
)
def test_refused_points_leave_no_trace(open_spool, metrics: dict, message: str):
    spool = open_spool()
    with pytest.raises(ValueError, match=message):
        spool.append(metrics, step=1, unix_ms=1)
    assert steps_waiting(spool) == []


def test_negative_step_is_refused(open_spool):
    with pytest.raises(ValueError, match="must not be negative"):
        open_spool().append({"train/loss": 1.0}, step=-1, unix_ms=1)


def test_every_metric_name_is_area_slash_name_and_mlflow_takes_it():
    from mlflow.utils.validation import _validate_metric_name

    for name, meaning in METRICS.items():
        area, _, rest = name.partition("/")
        assert area and rest and "/" not in rest and meaning
        _validate_metric_name(name)
    check_metrics(dict.fromkeys(METRICS, 0.5))


def test_a_process_killed_while_appending_loses_no_returned_append(tmp_path: Path, open_spool):
    """The child reports each append that returned; whatever it reported must be there after kill -9."""
    child = (
        "import sys\nfrom raynium.tracking.spool import MetricSpool\n"
        "spool = MetricSpool(sys.argv[1])\n"
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
    spool = open_spool()
    steps = steps_waiting(spool)
    assert steps == list(range(len(steps)))
    assert len(steps) >= last_reported


def test_the_newest_that_wait_are_read_without_the_others(open_spool) -> None:
    spool = open_spool()
    for step in range(200):
        append(spool, step)
    points = len(spool.read_steps(max_points=1)[0].metrics)
    assert [each.step for each in spool.newest(max_points=3 * points + points - 1)] == [197, 198, 199]
    spool.acknowledge_steps(spool.read_steps(max_points=198 * points))
    assert [each.step for each in spool.newest(max_points=10**6)] == [198, 199]
    spool._file.unlink()
    spool._file.mkdir()
    with pytest.raises(TrackingError, match=r"cannot read .*queue.db.*See to the disk that it is on"):
        spool.newest(max_points=9)
