"""The uploading process: what comes back from it, and what is left when it is killed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from descriptors import no_free_descriptor
from waiting import wait_for

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks, ShardEntry
from raynium.errors import StoreError
from raynium.node.ranks import start_process
from raynium.node.uploader import ATTEMPTS, Uploader
from raynium.storage.checksum import checksum_units, from_text
from raynium.storage.store import Store

pytestmark = pytest.mark.quick

SHARD = "checkpoints/step-000000007/g1/shard-00003.safetensors"


@pytest.fixture
def uploader(tmp_path: Path) -> Iterator[Uploader]:
    process = Uploader(str(tmp_path / "run"), silence_seconds=300)
    yield process
    process.close()


@pytest.fixture
def image() -> Iterator[Callable[[int], ImageInfo]]:
    """Makes an image of so many bytes, in memory."""
    path = Path(f"/dev/shm/raynium-test-uploader-{os.getpid()}")

    def make(size: int) -> ImageInfo:
        path.write_bytes(os.urandom(size))
        return ImageInfo(step=7, path=str(path), size=size, tensors=SavedBlocks.of(()), stall_seconds=0.25)

    yield make
    path.unlink(missing_ok=True)


class InThread(threading.Thread):
    """An upload, and how it ended."""

    def __init__(self, uploader: Uploader, info: ImageInfo):
        super().__init__()
        self.deaths: list[str] = []
        self._upload = lambda: uploader.upload(info, generation="g1", rank=3, died=self.deaths.append)
        self.entry: ShardEntry | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.entry = self._upload()
        except StoreError as error:
            self.error = error


def bytes_in(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:  # not made yet, or its file just got another name
        return 0


def test_a_shard_arrives_and_is_described(
    uploader: Uploader, image: Callable[[int], ImageInfo], tmp_path: Path
) -> None:
    info = image(600_000)
    entry = uploader.upload(info, generation="g1", rank=3)
    stored = Store(tmp_path / "run").read(SHARD)
    assert stored == Path(info.path).read_bytes()
    assert (entry.step, entry.stall_seconds, entry.file.size) == (7, 0.25, 600_000)
    assert from_text(entry.file.crc64nvme) == checksum_units(stored, entry.file.unit_bytes).crc
    assert len(entry.file.checksums.unit_crcs) == 3


def test_what_went_wrong_is_told_and_the_process_goes_on(uploader: Uploader, image: Callable[[int], ImageInfo]) -> None:
    info = image(10)
    with pytest.raises(StoreError, match="there is no such file"):
        uploader.upload(info.model_copy(update={"path": "/dev/shm/gone"}), generation="g1", rank=3)
    first = uploader.pid()
    uploader.upload(info, generation="g1", rank=3)
    with pytest.raises(StoreError, match="exists already; another writer was first"):
        uploader.upload(info, generation="g1", rank=3)
    uploader.upload(info, generation="g1", rank=3, again=True)
    with pytest.raises(StoreError, match="generation 'G 1' is not valid"):
        uploader.upload(info, generation="G 1", rank=3)
    assert uploader.pid() == first


def test_an_upload_whose_process_is_killed_is_done_again_and_nothing_is_left_over(
    uploader: Uploader, image: Callable[[int], ImageInfo], tmp_path: Path
) -> None:
    info = image(400 * 2**20)
    folder = tmp_path / "run" / Path(SHARD).parent
    while True:  # until it is met half way: on busy cores it may be through before we look
        uploading = InThread(uploader, info)
        wait_for(lambda: bytes_in(folder) > 2**20)
        first = uploader.pid()
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        if not (tmp_path / "run" / SHARD).exists():
            break
        os.kill(first, signal.SIGCONT)
        uploading.join()
        (tmp_path / "run" / SHARD).unlink()
    os.kill(first, signal.SIGKILL)
    uploading.join()
    assert uploading.entry is not None and uploader.pid() != first
    (death,) = uploading.deaths
    assert death == "the uploader died (exit code -9) while it saved rank 3's shard of step 7, which is uploaded again"
    assert [path.name for path in folder.iterdir()] == ["shard-00003.safetensors"]
    assert Store(tmp_path / "run").size(SHARD) == info.size


def test_an_upload_of_which_nothing_moves_is_given_up_and_the_next_one_works(
    image: Callable[[int], ImageInfo], tmp_path: Path
) -> None:
    uploader = Uploader(str(tmp_path / "run"), silence_seconds=0.5)
    info = image(10)
    uploader.upload(info, generation="g1", rank=3)
    pid = uploader.pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    uploads = [InThread(uploader, info), InThread(uploader, info)]
    for each in uploads:
        each.join(60)
        assert "moved for 0.5 s (fault.upload_silence_seconds), so its upload was given up" in str(each.error)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    uploader.upload(info, generation="g2", rank=3)
    assert uploader.pid() != pid
    uploader.close()


def test_a_process_that_dies_again_and_again_is_given_up(
    uploader: Uploader, image: Callable[[int], ImageInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def start_and_kill(process: Any) -> None:
        start_process(process)
        killed.append(process.pid)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr("raynium.node.uploader.start_process", start_and_kill)
    with pytest.raises(StoreError, match=f"died {ATTEMPTS} times under rank 3's shard of step 7"):
        uploader.upload(image(10), generation="g1", rank=3)
    assert len(killed) == ATTEMPTS


def test_a_process_that_cannot_be_started_is_told_and_tried_again(
    uploader: Uploader, image: Callable[[int], ImageInfo]
) -> None:
    info = image(10)
    uploader.upload(info, generation="g1", rank=3)
    pid = uploader.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: uploader.pid() is None)
    with no_free_descriptor(), pytest.raises(StoreError, match=r"cannot be started: .*Too many open files; this node"):
        uploader.upload(info, generation="g2", rank=3)
    uploader.upload(info, generation="g2", rank=3)


def test_an_upload_that_is_watched_without_a_free_descriptor_goes_on(
    uploader: Uploader, image: Callable[[int], ImageInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the process does something cannot be seen then, and that is no news of it."""
    monkeypatch.setattr("raynium.node.uploader.WATCH_SECONDS", 0.05)
    info = image(10)
    uploader.upload(info, generation="g1", rank=3)
    pid = uploader.pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with no_free_descriptor():
        uploading = InThread(uploader, info.model_copy(update={"step": 8}))
        uploading.join(0.5)
    assert uploading.is_alive()
    os.kill(pid, signal.SIGCONT)
    uploading.join()
    assert uploading.error is None and uploading.entry is not None and uploader.pid() == pid


def test_closing_ends_the_process_and_fails_what_it_did(uploader: Uploader, image: Callable[[int], ImageInfo]) -> None:
    uploader.upload(image(10), generation="g2", rank=3)
    pid = uploader.pid()
    assert pid is not None
    uploader.close()
    assert not Path(f"/proc/{pid}").exists() and uploader.pid() is None
