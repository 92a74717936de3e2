"""How long training stands still for a save, and how much an upload slows it down.

    python tests/benchmarks/bench_checkpoint_stall.py [--gib 1]

All ways save the same float32 tensors (a decoder's weights and two moments) from one process that trains on one thread.
Stall: time inside the save call, after one save to warm up; the limit is one memcpy of the same bytes into memory that
is already there, measured in turns with it. Upload: steps of a small training loop while a save is on its way to the
store, against the same steps without. Peers: torch.distributed.checkpoint, with its default stager, with a persistent
one, and its FsspecWriter to the same S3 server. That (SeaweedFS, ten CPU seconds a GiB) would be another machine in
reality, so training has core 0 to itself, and the server shares core 1 with our uploader; a peer uploads in a thread of
the training process, on its core. The server's files are in memory by default, because the kernel writes a disk's back
on any core; "file" is a real disk. Steps are given as mean / worst / median of the worst of each second.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import S3Server, running_s3_server

from raynium.checkpoint.manifest import ImageInfo
from raynium.checkpoint.state import Chunk
from raynium.launch.uploader import Uploader
from raynium.snapshots import Snapshots
from raynium.train.link import IMAGE_SLOTS

MOST_STALL = 1.15  # × one warm memcpy
MOST_MEAN_STEP = 1.05  # × idle
MOST_WORST_STEP = 3.0  # × the idle worst
SAVES = 6
STEP_SECONDS = 6.0  # of steps that are timed without an upload, and at least while one runs


def decoder_state(gib: float) -> dict[str, torch.Tensor]:
    """Weights and two moments of as many decoder layers (hidden 1024, inner 4096) as make so many GiB."""
    shapes = {"q": (1024, 1024), "k": (256, 1024), "v": (256, 1024), "o": (1024, 1024), "norm1": (1024,)}
    shapes |= {"gate": (4096, 1024), "up": (4096, 1024), "down": (1024, 4096), "norm2": (1024,)}
    layer_bytes = 3 * sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    return {
        f"{kind}/layers.{layer}.{name}": torch.randn(shape)
        for layer in range(max(1, round(gib * 2**30 / layer_bytes)))
        for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
        for name, shape in shapes.items()
    }


class Engine:
    """Only what `Snapshots` asks of one."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self._state = state

    def state(self) -> list[Chunk]:
        return [
            Chunk(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor, saved_here=True)
            for name, tensor in self._state.items()
        ]


class UploadLink:
    """The rank's side of a node agent that only uploads: a process of its own with the real uploader, as on a node."""

    def __init__(self, run_url: str):
        context = multiprocessing.get_context("spawn")
        self._agent, theirs = context.Pipe()
        self._process = context.Process(target=agent, args=(run_url, theirs))
        self._process.start()
        theirs.close()
        self._free = set(range(IMAGE_SLOTS))
        self._freed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def has_free_image(self) -> bool:
        return bool(self._free)

    def wait_free_image(self) -> int:
        with self._freed:
            self._freed.wait_for(self.has_free_image)
            return min(self._free)

    def image(self, slot: int, info: str, replicas: str) -> None:
        self._free.remove(slot)
        self._agent.send((slot, info))

    def wait(self) -> None:
        with self._freed:
            self._freed.wait_for(lambda: len(self._free) == IMAGE_SLOTS)

    def close(self) -> None:
        self._agent.send(None)
        self._process.join()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                slot = self._agent.recv()
                with self._freed:
                    self._free.add(slot)
                    self._freed.notify_all()


def agent(run_url: str, rank: Connection) -> None:
    """The agent's process: uploads each image, then says that its slot is free."""
    os.sched_setaffinity(0, {1})
    uploader = Uploader(run_url)

    def upload(slot: int, info: str) -> None:
        uploader.upload(ImageInfo.from_json(info), generation="g1", rank=0)
        rank.send(slot)

    while (image := rank.recv()) is not None:
        threading.Thread(target=upload, args=image).start()
    uploader.close()


class Ours:
    """Snapshots and the uploader, as a rank and its agent use them."""

    name = "Raynium"

    def __init__(self, state: dict[str, torch.Tensor], target: str):
        self._images = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._link = UploadLink(target)
        self._snapshots = Snapshots(Engine(state), self._link, Path(self._images.name), if_busy="wait")  # pyright: ignore[reportArgumentType]
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._snapshots.save(self._step)

    def wait(self) -> None:
        self._link.wait()

    def close(self) -> None:
        self._link.close()
        self._images.cleanup()


class Dcp:
    """torch.distributed.checkpoint.async_save in a thread, as its documentation shows it."""

    def __init__(self, name: str, state: dict[str, torch.Tensor], writer: Callable[[int], Any], stager: Any = None):
        self.name = name
        self._state, self._writer, self._stager = state, writer, stager
        self._step = 0
        self._future: Any = None

    def save(self) -> None:
        self._step += 1
        options = {} if self._stager is None else {"async_stager": self._stager}
        self._future = dcp.async_save(self._state, storage_writer=self._writer(self._step), **options)

    def wait(self) -> None:
        getattr(self._future, "upload_completion", self._future).result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


def persistent_stager() -> DefaultStager:
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )


# ---- stall --------------------------------------------------------------------------------------------------------


def stalls(state: dict[str, torch.Tensor], ways: list[Any]) -> list[tuple[str, list[float], list[float]]]:
    """For each way: (name, seconds of each save, seconds of a memcpy right before it)."""
    copies = [torch.empty_like(tensor) for tensor in state.values()]

    def memcpy() -> float:
        began = time.perf_counter()
        for copy, tensor in zip(copies, state.values(), strict=True):
            copy.copy_(tensor)
        return time.perf_counter() - began

    found = []
    for way in ways:
        saves, limits = [], []
        for turn in range(SAVES + 1):
            limit = min(memcpy(), memcpy())
            began = time.perf_counter()
            way.save()
            seconds = time.perf_counter() - began
            way.wait()
            if turn:
                saves.append(seconds)
                limits.append(limit)
        way.close()
        found.append((way.name, saves, limits))
    return found


# ---- steps while an upload runs -----------------------------------------------------------------------------------


def step() -> float:
    """About a millisecond of training: matrix products, and Python between them."""
    began = time.perf_counter()
    for _ in range(3):
        torch.mm(_MATRIX, _MATRIX)
        sum(range(3000))
    return time.perf_counter() - began


_MATRIX = torch.randn(256, 256)


def steps_while(running: Callable[[float], bool]) -> list[float]:
    began = time.perf_counter()
    found = []
    while running(time.perf_counter() - began):
        found.append(step())
    return found


def worst_of_a_second(steps: list[float]) -> float:
    """Median over seconds of the longest step in each: a virtual machine that is held up once does not change it."""
    worst: dict[int, float] = {}
    now = 0.0
    for step_seconds in steps:
        worst[int(now)] = max(worst.get(int(now), 0.0), step_seconds)
        now += step_seconds
    return statistics.median(worst.values())


def steps_during_upload(way: Any) -> tuple[list[float], list[float], float]:
    """(steps without an upload, steps while uploads run, seconds of one upload)."""
    way.save()
    way.wait()
    steps_while(lambda seconds: seconds < 1)
    idle = steps_while(lambda seconds: seconds < STEP_SECONDS)
    busy: list[float] = []
    began = time.perf_counter()
    uploads = 0
    while time.perf_counter() - began < STEP_SECONDS:
        way.save()
        done = threading.Event()
        waiter = threading.Thread(target=lambda done=done: (way.wait(), done.set()))
        waiter.start()
        busy += steps_while(lambda _, done=done: not done.is_set())
        waiter.join()
        uploads += 1
    seconds = (time.perf_counter() - began) / uploads
    way.close()
    return idle, busy, seconds


@contextmanager
def one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def fsspec_writer(server: S3Server, bucket: str) -> Callable[[int], Any]:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return lambda number: FsspecWriter(f"{bucket}/dcp-{number}", **server.options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state (default 1)")
    parser.add_argument("--server-folder", default="/dev/shm", help="where the S3 server keeps its files")
    arguments = parser.parse_args()
    gib = arguments.gib
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {1})  # what is started now stays there: the server
    state = decoder_state(gib)
    size = sum(tensor.nbytes for tensor in state.values()) / 2**30
    print(f"state: {size:.2f} GiB in {len(state)} tensors\n")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir=arguments.server_folder) as server_folder,
        one_rank(),
        running_s3_server(Path(server_folder)) as server,
    ):
        os.environ.update(server.env)
        os.sched_setaffinity(0, {0})
        bucket = server.create_bucket("bench")
        passed = _stall_table(state, shm, size) & _step_table(state, server, bucket, disk)
    return 0 if passed else 1


def _stall_table(state: dict[str, torch.Tensor], shm: str, size: float) -> bool:
    to_memory = lambda _: dcp.FileSystemWriter(f"{shm}/dcp", overwrite=True)  # noqa: E731
    ways = [
        Ours(state, f"{shm}/ours"),
        Dcp("torch async_save, persistent stager", state, to_memory, persistent_stager()),
        Dcp("torch async_save, default", state, to_memory),
    ]
    print(
        "| save into memory | stall, median ms per GiB | worst | warm memcpy, ms per GiB | ratio |\n"
        "|---|---|---|---|---|"
    )
    ratios = []
    for name, saves, limits in stalls(state, ways):
        ratio = statistics.median(a / b for a, b in zip(saves, limits, strict=True))
        ratios.append(ratio)
        row = [statistics.median(saves), max(saves), statistics.median(limits)]
        print(f"| {name} | " + " | ".join(f"{1000 * each / size:.0f}" for each in row) + f" | {ratio:.2f} |")
    print(f"\nours {ratios[0]:.2f}, at most {MOST_STALL}\n")
    return ratios[0] <= MOST_STALL


def _step_table(state: dict[str, torch.Tensor], server: S3Server, bucket: str, disk: str) -> bool:
    ways = [
        ("S3", Ours(state, f"{bucket}/ours")),
        ("S3", Dcp("torch FsspecWriter, persistent stager", state, fsspec_writer(server, bucket), persistent_stager())),
        ("file", Ours(state, f"{disk}/ours")),
    ]
    print("| upload to | by | seconds | idle step, ms | with upload | mean × | worst × | worst of a second × |")
    print("|---|---|---|---|---|---|---|---|")
    passed = True
    for place, way in ways:
        idle, busy, seconds = steps_during_upload(way)
        measures = (statistics.mean, max, worst_of_a_second)
        ratios = [measure(busy) / measure(idle) for measure in measures]
        cells = [" / ".join(f"{1000 * measure(steps):.2f}" for measure in measures) for steps in (idle, busy)]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {place} | {way.name} | {seconds:.1f} | {' | '.join(cells)} |")
        if isinstance(way, Ours):
            passed &= ratios[0] <= MOST_MEAN_STEP and ratios[1] <= MOST_WORST_STEP
    print(f"\nours at most: mean {MOST_MEAN_STEP}, worst {MOST_WORST_STEP}")
    return passed


if __name__ == "__main__":
    sys.exit(main())
