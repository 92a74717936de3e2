"""Whole runs whose processes are killed at each phase of a save, and whose S3 fails in each way it can.

After each: the newest checkpoint is whole and is the old or the new one, the run's losses are those of a run without
faults, bit by bit, and nothing half-uploaded is left to be paid for.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
from held_images import held_images
from tiny import job_text
from waiting import wait_for

from raynium.chaos.flaky_s3 import FlakyS3, cut, delay, hold, refuse, swallow
from raynium.checkpoint.catalog import latest, list_checkpoints, open_checkpoint
from raynium.checkpoint.verify import verify_checkpoint
from raynium.storage.store import Store

# Whole processes, which import torch, on shared cores.
pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 240

STEPS = 60
# One rank, whose shard of 8 MB takes two parts (see `small_parts`). Its uploads are slower than its steps
LARGER = {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 344}
JOB = job_text(
    {f"model.{name}": size for name, size in LARGER.items()}
    | {
        "cluster.ranks_per_node": 1,
        "data.seq_len": 16,
        "train.steps": 60,
        "train.global_batch_size": 2,
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 2,
        "evaluate.every_steps": 100,
        "evaluate.max_documents": 1,
    }
)


class Life:
    """One process with an agent and a coordinator."""

    def __init__(
        self,
        folder: Path,
        run_url: str,
        document_folder: Path,
        environment: dict[str, str],
        *,
        changes: dict[str, Any] | None = None,
        last_save_seconds: float = 60,
    ):
        folder.mkdir(parents=True)
        (folder / "job.yaml").write_text(JOB)
        arguments = {"run_url": run_url, "data_folder": str(document_folder)}
        arguments |= {"changes": changes or {}, "last_save_seconds": last_save_seconds}
        (folder / "arguments.json").write_text(json.dumps(arguments))
        self._folder = folder
        self._killed: set[int] = set()
        self._stderr = (folder / "stderr").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "_agent_process.py"), str(folder)],
            env=os.environ | environment | {"PYTHONPATH": ":".join(sys.path)},
            stderr=self._stderr,
        )

    def pid(self, victim: str) -> int | None:
        """Of the "agent", the "uploader" or the "rank", if that lives."""
        if victim == "agent":
            return self._process.pid
        found = json.loads((self._folder / "pids.json").read_text())
        return found["uploader"] if victim == "uploader" else next(iter(found["ranks"]), None)

    def kill(self, victim: str) -> None:
        """One that was not killed before: it waits for its successor."""
        pid = wait_for(lambda: (found := self.pid(victim)) not in self._killed and found)
        os.kill(pid, signal.SIGKILL)
        self._killed.add(pid)

    def finish(self) -> dict[str, Any]:
        """Its status, once it has ended by itself."""
        assert self._process.wait(PATIENCE_SECONDS) == 0, (self._folder / "stderr").read_text()[-3000:]
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

    def begin(run_url: str, environment: dict[str, str], **how: Any) -> Life:
        lives.append(Life(tmp_path / f"life-{len(lives)}", run_url, document_folder, environment, **how))
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

    def check_newest(self) -> None:
        """None is broken, and the newest is whole to the last byte."""
        assert all(each.problem is None for each in list_checkpoints(self.store))
        newest = latest(self.store)
        assert newest is not None and verify_checkpoint(newest, depth="contents") == []

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


def wait_for_newer(place: Place) -> None:
    before = newest_step(place)
    wait_for(lambda: newest_step(place) > before)


def has_header(image: Path) -> bool:
    with image.open("rb") as file:
        return file.read(8) not in (b"", bytes(8))


def together(lives: Sequence[Life]) -> dict[int, set[float]]:
    """step → the losses that any of them computed for it."""
    losses: dict[int, set[float]] = {}
    for life in lives:
        for step, found in life.losses().items():
            losses.setdefault(step, set()).update(found)
    return losses


# ---- killed at each phase of a save -------------------------------------------------------------------------------

PHASES = {
    "mid-part": hold(of=["UploadPart"], after_bytes=2 * 2**20, after=["PutObject"]),
    "between the parts and complete": hold(of=["CompleteMultipartUpload"]),
    "before the manifest": hold(of=["PutObject"], times=None),  # no other record is written in these runs
    "when the store has the manifest": hold(of=["PutObject"], at="answer"),
    "after the manifest": hold(of=["ListObjectsV2"], after=["PutObject"]),
    "while an older one is deleted": hold(of=["DeleteObjects"]),
}
IS_NEWER = {  # whether the store has a newer checkpoint at that moment than when the agent was started
    "before the manifest": False,
    "when the store has the manifest": True,
    "after the manifest": True,
    "while an older one is deleted": True,
}


@pytest.mark.parametrize("victim", ["rank", "uploader"])
def test_a_process_killed_at_any_phase_of_a_save_costs_no_checkpoint(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]], victim: str
) -> None:
    life = start(place.url, place.environment)
    for phase, fault in PHASES.items():
        proxy.set(fault)
        assert proxy.held.wait(PATIENCE_SECONDS), phase
        life.kill(victim)
        place.check_newest()
        proxy.set()
        wait_for_newer(place)
    status = life.finish()
    assert status["ended"] == "finished" and not [text for text in status["events"] if "is not saved" in text]
    assert [each.step for each in list_checkpoints(place.store)] == [STEPS - 2, STEPS]
    place.check_whole()
    assert life.losses() == reference


def test_a_node_killed_at_any_phase_of_a_save_leaves_a_whole_checkpoint_and_the_next_one_goes_on(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]]
) -> None:
    lives: list[Life] = []
    for phase, fault in PHASES.items():
        before = newest_step(place)
        proxy.set(fault)
        lives.append(start(place.url, place.environment))
        assert proxy.held.wait(PATIENCE_SECONDS), phase
        lives[-1].kill("agent")
        lives[-1].close()
        place.check_newest()
        if phase in IS_NEWER:
            assert (newest_step(place) > before) == IS_NEWER[phase], phase
    proxy.set()
    lives.append(start(place.url, place.environment))
    assert lives[-1].finish()["ended"] == "finished"
    assert [each.step for each in list_checkpoints(place.store)] == [STEPS - 2, STEPS]
    place.check_whole()
    assert together(lives) == reference


LARGE = {"model.hidden_size": 384, "model.head_dim": 96, "model.ffn_size": 1024, "train.steps": 8}  # 60 MB to copy


def test_a_rank_killed_while_it_copies_leaves_no_image_and_the_older_one_is_used(start: Start, tmp_path: Path) -> None:
    life = start(str(tmp_path / "run"), {}, changes=LARGE)

    def both_images() -> list[Path]:
        images = [image for image in held_images(life.pid("agent") or 0) if image.match("rank-00000.?.safetensors")]
        return images if len(images) == 2 and all(map(has_header, images)) else []

    images = wait_for(both_images)
    rank = life.pid("rank")
    assert rank is not None
    deadline = time.monotonic() + PATIENCE_SECONDS
    while all(map(has_header, images)):  # no header: it is being written
        assert time.monotonic() < deadline
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.002)  # less than a copy takes, so that none is missed
        os.kill(rank, signal.SIGSTOP)
    os.kill(rank, signal.SIGKILL)
    status = life.finish()
    assert status["ended"] == "finished" and any("killed by SIGKILL" in text for text in status["events"])
    assert any("from the snapshot of step" in text for text in status["events"])
    losses = life.losses()
    assert sorted(losses) == list(range(1, 9))
    assert all(len(each) == 1 for each in losses.values()), "of the steps done twice, the same bits"


# ---- a store that fails -------------------------------------------------------------------------------------------

# A proxy's 30 s are as harmless to what waits 120, and cost the suite minutes: set them to see
DELAY_SECONDS = float(os.environ.get("RAYNIUM_TEST_DELAY_SECONDS", "3"))
FAULTS = {
    "connections break": [cut(0, 3 * 2**20, times=8)],
    "SlowDown": [refuse(503, "SlowDown", times=4)],
    "500": [refuse(500, "InternalError", times=4)],
    "slow answers": [delay(DELAY_SECONDS, times=2)],
    "lost answers": [swallow(of=["CompleteMultipartUpload"]), swallow(of=["PutObject"])],
}
UPLOAD = ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]


def test_a_store_that_fails_for_a_while_costs_no_checkpoint_and_a_permission_taken_away_one(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]]
) -> None:
    # Before the other faults: after a lost answer, a refusal costs nothing, since the object is seen to be there
    proxy.set(refuse(403, "AccessDenied", times=1, of=UPLOAD))
    life = start(place.url, place.environment)
    for faults in FAULTS.values():
        wait_for(proxy.over)
        wait_for_newer(place)
        proxy.set(*faults)
    wait_for(proxy.over)
    status = life.finish()
    assert status["ended"] == "finished", status
    [lost] = [text for text in status["events"] if "is not saved" in text]
    assert "training goes on: rank 0's shard could not be uploaded" in lost and "allow s3:PutObject" in lost
    assert [each.step for each in list_checkpoints(place.store)] == [STEPS - 2, STEPS]
    place.check_whole()
    assert life.losses() == reference


def test_the_last_checkpoint_is_tried_again_and_a_run_that_cannot_save_it_fails_with_the_cause(
    start: Start, place: Place, proxy: FlakyS3, reference: dict[int, set[float]]
) -> None:
    proxy.set(refuse(403, "ExpiredToken", of=[*UPLOAD, "DeleteObject"], after=["PutObject"]))
    failed = start(place.url, place.environment, last_save_seconds=1)
    status = failed.finish()
    assert status["ended"] == "failed" and newest_step(place) < STEPS
    for said in (f"training reached step {STEPS}", "rank 0's shard could not be uploaded", "expired: renew"):
        assert said in status["cause"]
    assert f"the run has the checkpoint of step {newest_step(place)} to go on from" in status["cause"]
    place.check_whole()

    proxy.seen.clear()
    healed = start(place.url, place.environment)
    wait_for(lambda: "DeleteObject" in proxy.seen)  # with which an upload begins that is tried again
    proxy.set(refuse(403, "AccessDenied", of=["PutObject"], times=1))
    status = healed.finish()
    assert status["ended"] == "finished" and newest_step(place) == STEPS
    told = "\n".join(status["events"])
    assert f"node 0: 1 shard(s) of step {STEPS} are still in memory only, and are uploaded again in 2 s" in told
    assert f"checkpoint of step {STEPS}: trying to commit it again in 2 s" in told
    assert f"checkpoint of step {STEPS} is saved after all" in told
    place.check_whole()
    assert together([failed, healed]) == reference


TWO_NODES = {"cluster.nodes": 2, "train.steps": 4, "checkpoint.every_steps": 100}  # one save, of two small shards


def test_of_two_nodes_only_the_one_whose_upload_failed_uploads_again_and_the_last_checkpoint_is_whole(
    start: Start, place: Place, proxy: FlakyS3
) -> None:
    proxy.set(refuse(403, "AccessDenied", of=["PutObject"], times=1))
    life = start(place.url, place.environment, changes=TWO_NODES)
    status = life.finish()
    assert status["ended"] == "finished", status
    told = "\n".join(status["events"])
    [failed] = re.findall(r"node ([01]): 1 shard\(s\) of step 4 are still in memory only", told)
    assert f"checkpoint of step 4 is not saved; training goes on: rank {failed}'s shard could not be uploaded" in told
    assert "allow s3:PutObject" in told and "checkpoint of step 4 is saved after all" in told
    assert len([operation for operation in proxy.seen if operation == "DeleteObject"]) == 1, "the other is durable"
    assert [(each.step, each.world_size) for each in list_checkpoints(place.store)] == [(4, 2)]
    place.check_whole()


def test_of_two_nodes_one_that_cannot_save_fails_the_run_and_leaves_no_checkpoint(
    start: Start, place: Place, proxy: FlakyS3
) -> None:
    passed_on = delay(0, of=["PutObject"], times=1)
    proxy.set(passed_on, refuse(403, "AccessDenied", of=["PutObject"]))
    life = start(place.url, place.environment, changes=TWO_NODES, last_save_seconds=1)
    status = life.finish()
    assert status["ended"] == "failed" and "training reached step 4" in status["cause"]
    assert re.search(r"rank [01]'s shard could not be uploaded: .*allow s3:PutObject", status["cause"])
    assert len(place.store.list("checkpoints").sizes) == 1, "one node's shard, of no checkpoint"
    assert list_checkpoints(place.store) == [] and place.open_uploads() == []
