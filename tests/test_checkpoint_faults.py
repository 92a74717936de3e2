"""Whole runs whose processes are killed at each phase of a save, and whose S3 fails in each way it can.

After each: the newest checkpoint is whole and is the old or the new one, the run's losses are those of a run without
faults, bit by bit, and nothing half-uploaded is left to be paid for.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
from flaky_s3 import FlakyS3, cut, delay, hold, refuse, swallow

from raynium.checkpoint.catalog import latest, list_checkpoints, open_checkpoint
from raynium.checkpoint.store import Store
from raynium.checkpoint.verify import verify_checkpoint
from raynium.data.store_build import build_store

pytestmark = pytest.mark.s3

STEPS = 8  # more saves than images: ranks cannot run to their end while an upload is held
# One rank, whose shard of 75 MB takes two parts; a step takes a fraction of a second
JOB = """
run: {name: test}
cluster: {accelerator: cpu, ranks_per_node: 1}
model: {vocab_size: 512, hidden_size: 384, num_layers: 4, num_heads: 4, num_kv_heads: 2, head_dim: 96, ffn_size: 1024,
        max_seq_len: 32}
data: {path: /nowhere, seq_len: 16}
optimizer: {learning_rate: 1.0e-3}
train: {steps: 8, global_batch_size: 2}
checkpoint: {every_steps: 2, keep_last: 2}
evaluate: {every_steps: 100, max_documents: 1}
"""


@pytest.fixture(scope="module")
def document_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("text")
    for number in range(20):
        (source / f"{number}.py").write_text("\n".join(f"value_{number}_{line} = {line}" for line in range(60)))
    store = tmp_path_factory.mktemp("documents")
    build_store(store, source=str(source), vocab_size=512, heldout_fraction=0.2)
    return store


class Life:
    """One process with an agent and a coordinator."""

    def __init__(self, folder: Path, run_url: str, document_folder: Path, environment: dict[str, str]):
        folder.mkdir(parents=True)
        (folder / "job.yaml").write_text(JOB)
        (folder / "arguments.json").write_text(json.dumps({"run_url": run_url, "data_folder": str(document_folder)}))
        self._folder = folder
        self._stderr = (folder / "stderr").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "_agent_process.py"), str(folder)],
            env=os.environ | environment,
            stderr=self._stderr,
        )

    def pid(self, victim: str) -> int:
        """Of the "agent", the "uploader" or the "rank"."""
        if victim == "agent":
            return self._process.pid
        found = json.loads((self._folder / "pids.json").read_text())
        return found["uploader"] if victim == "uploader" else found["ranks"][0]

    def kill(self, victim: str) -> None:
        os.kill(self.pid(victim), signal.SIGKILL)

    def finish(self) -> dict[str, Any]:
        """Its status, once it has ended by itself."""
        assert self._process.wait(120) == 0, (self._folder / "stderr").read_text()[-3000:]
        return json.loads((self._folder / "status.json").read_text())

    def losses(self) -> dict[int, set[float]]:
        losses: dict[int, set[float]] = {}
        for line in (self._folder / "losses.jsonl").read_text().splitlines():
            step, loss = json.loads(line)
            losses.setdefault(step, set()).add(loss)
        return losses

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()


Start = Callable[..., Life]


@pytest.fixture
def start(tmp_path: Path, document_folder: Path) -> Iterator[Start]:
    lives: list[Life] = []

    def begin(run_url: str, environment: dict[str, str]) -> Life:
        lives.append(Life(tmp_path / f"life-{len(lives)}", run_url, document_folder, environment))
        return lives[-1]

    yield begin
    for life in lives:
        life.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, document_folder: Path) -> dict[int, set[float]]:
    folder = tmp_path_factory.mktemp("reference")
    life = Life(folder / "life", str(folder / "run"), document_folder, {})
    assert life.finish()["ended"] == "finished"
    losses = life.losses()
    life.close()
    assert sorted(losses) == list(range(1, STEPS + 1)) and all(len(each) == 1 for each in losses.values())
    return losses


class Place:
    """A run's folder in a bucket of its own, behind a proxy that can fail."""

    def __init__(self, server: Any, proxy: FlakyS3):
        self.bucket = server.create_bucket(f"f-{uuid4().hex[:12]}")
        self.url = f"{self.bucket}/runs/test"
        self.environment = server.env | {"AWS_ENDPOINT_URL": proxy.endpoint}
        self._server = server
        self.store = Store(self.url, options=server.options)  # past the proxy

    def open_uploads(self) -> list[str]:
        client = boto3.client(
            "s3",
            endpoint_url=self._server.endpoint,
            aws_access_key_id=self._server.options["key"],
            aws_secret_access_key=self._server.options["secret"],
            region_name="us-east-1",
        )
        answer = client.list_multipart_uploads(Bucket=self.bucket.removeprefix("s3://"))
        return [upload["Key"] for upload in answer.get("Uploads", ())]

    def check_whole(self) -> None:
        """Every checkpoint that exists is whole, to the last byte, and nothing half-uploaded is left."""
        for summary in list_checkpoints(self.store):
            assert summary.problem is None
            assert verify_checkpoint(open_checkpoint(self.store, summary.step), depth="contents") == []
        assert self.open_uploads() == []


@pytest.fixture
def proxy(s3_server: Any) -> Iterator[FlakyS3]:
    with FlakyS3(s3_server.endpoint) as flaky:
        yield flaky


@pytest.fixture
def place(s3_server: Any, proxy: FlakyS3) -> Place:
    return Place(s3_server, proxy)


def newest_step(place: Place) -> int:
    ref = latest(place.store)
    return ref.step if ref is not None else 0


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 90
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return value


def has_header(image: Path) -> bool:
    with image.open("rb") as file:
        return file.read(8) not in (b"", bytes(8))


# ---- killed at each phase of the second save ----------------------------------------------------------------------

PHASES = {
    "mid-part": hold(of=["UploadPart"], after_bytes=20 * 2**20),
    "between the parts and complete": hold(of=["CompleteMultipartUpload"]),
    "before the manifest": hold(of=["PutObject"]),  # records apart, only manifests are small
}


@pytest.mark.parametrize("victim", ["rank", "uploader", "agent"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_at_any_phase_of_a_save_loses_nothing(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]], victim: str, phase: str
) -> None:
    life = start(place.url, place.environment)
    wait_for(lambda: "PutObject" in proxy.seen)  # the first manifest: step 2 is about to be committed
    proxy.set(PHASES[phase])
    assert proxy.held.wait(90)
    life.kill(victim)
    wait_for(lambda: newest_step(place) >= 2)
    assert all(each.problem is None for each in list_checkpoints(place.store))
    proxy.set()
    lives = [life]
    if victim == "agent":
        life.close()
        lives.append(start(place.url, place.environment))
    assert lives[-1].finish()["ended"] == "finished"
    assert newest_step(place) == STEPS
    place.check_whole()
    assert [each.step for each in list_checkpoints(place.store)] == [STEPS - 2, STEPS]
    seen: dict[int, set[float]] = {}
    for each in lives:
        for step, losses in each.losses().items():
            seen.setdefault(step, set()).update(losses)
    assert seen == reference


def test_a_rank_killed_while_it_copies_leaves_no_image_and_the_older_one_is_used(
    start: Start, tmp_path: Path, reference: dict[int, set[float]]
) -> None:
    life = start(str(tmp_path / "run"), {})

    def both_images() -> list[Path]:
        images = list(Path("/dev/shm").glob(f"raynium-*-{life.pid('agent')}-*/rank-00000.?.safetensors"))
        return images if len(images) == 2 and all(map(has_header, images)) else []

    images = wait_for(both_images)
    rank = life.pid("rank")
    deadline = time.monotonic() + 90
    while all(map(has_header, images)):  # no header: it is being written
        assert time.monotonic() < deadline
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.002)  # less than a copy takes, so that none is missed
        os.kill(rank, signal.SIGSTOP)
    os.kill(rank, signal.SIGKILL)
    status = life.finish()
    assert status["ended"] == "finished" and life.losses() == reference
    assert any("killed by SIGKILL" in text for text in status["events"])
    assert any("from the snapshot of step" in text for text in status["events"])


# ---- a store that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        [cut(0, 3 * 2**20, times=12)],
        [refuse(503, "SlowDown", times=5)],
        [refuse(500, "InternalError", times=4)],
        [delay(3.0, times=4)],
        [swallow(of=["CompleteMultipartUpload"]), swallow(of=["PutObject"])],
    ],
    ids=["connections break", "SlowDown", "500", "slow answers", "lost answers"],
)
def test_a_store_that_fails_for_a_while_costs_no_checkpoint(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]], faults: list[Any]
) -> None:
    life = start(place.url, place.environment)
    wait_for(lambda: "PutObject" in proxy.seen)  # the first manifest: step 2 is about to be committed
    proxy.set(*faults)
    status = life.finish()
    assert status["ended"] == "finished", status
    assert {each.step for each in list_checkpoints(place.store)} == {STEPS - 2, STEPS}
    place.check_whole()
    assert life.losses() == reference


def test_credentials_that_expire_fail_one_save_with_the_cause_and_the_next_one_works(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]]
) -> None:
    life = start(place.url, place.environment)
    wait_for(lambda: "PutObject" in proxy.seen)  # the first manifest: step 2 is about to be committed
    proxy.set(
        refuse(403, "ExpiredToken", times=1, of=["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
    )
    status = life.finish()
    assert status["ended"] == "finished", status
    assert any("is lost: rank 0" in text and "expired: renew" in text for text in status["events"])
    assert newest_step(place) == STEPS
    place.check_whole()
    assert life.losses() == reference
