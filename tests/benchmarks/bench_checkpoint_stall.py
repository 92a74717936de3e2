"""How long training stands still for a save, and how much an upload slows it down.

    python tests/benchmarks/bench_checkpoint_stall.py [--gib 1]

All ways save the same float32 tensors (a decoder's weights and two moments), each in a process of its own, which trains
on one thread and ends before the next way begins.
Stall: time inside the save call, after one save to warm up; the limit is one memcpy of the same bytes into memory that
is already there, measured in turns with it. Upload: steps of a small training loop while a save is on its way to the
store, against the same steps without. Peers: torch.distributed.checkpoint, with its default stager, with a persistent
one, and its FsspecWriter to the same S3 server. That (SeaweedFS, ten CPU seconds a GiB) would be another machine in
reality, so training has core 0 to itself, and the server shares core 1 with our uploader; a peer uploads in a thread of
the training process, on its core. The server's files are in memory by default, because the kernel writes a disk's back
on any core; "file", and where stalls are measured, is a real disk. Steps are given as mean / worst / median of the
worst of each second.

The control trains without ever saving, while another process, which it does not know, uploads the same number of bytes:
a worst step that it has too is the machine's. Below the table is where the time of each way's worst step went.

What a save left in the store is deleted before the next one begins. Memory needed at most: the state, two images of it
and the server's files, so four times the state, and one or two GiB; three times with --server-folder on a disk.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import benchmark
import boto3
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import running_s3_server

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks
from raynium.checkpoint.state import Chunk
from raynium.config.images import IMAGE_SLOTS
from raynium.node.uploader import Uploader
from raynium.rank.snapshots import Snapshots
from raynium.train.guard import Guard
from raynium.train.patience import Patience

MOST_STALL = 1.15  # × one warm memcpy
MOST_MEAN_STEP = 1.05  # × idle
MOST_WORST_STEP = 3.0  # × the idle worst
UPLOADER_CORE = "RAYNIUM_BENCH_UPLOADER_CORE"  # of the environment: set by the parent, read by each way's uploader
SAVES = 6
COPY_BYTES = 2**30  # of the memcpy's target; no processor's caches hold so much
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

    def step(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def image(self, slot: int, info: str, replicas: str, *, upload: bool) -> None:
        self._free.remove(slot)
        self._agent.send((slot, info))

    def wait(self) -> None:
        with self._freed:
            self._freed.wait_for(lambda: len(self._free) == IMAGE_SLOTS)

    def close(self) -> None:
        self._agent.send(None)
        self._process.join()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                slot = self._agent.recv()
                with self._freed:
                    self._free.add(slot)
                    self._freed.notify_all()
        self._process.join()
        if self._process.exitcode:
            os._exit(1)  # it has said why


def agent(run_url: str, rank: Connection) -> None:
    """The agent's process: uploads each image, then says that its slot is free."""
    os.sched_setaffinity(0, {int(os.environ[UPLOADER_CORE])})
    uploader = Uploader(run_url, silence_seconds=600)

    def upload(slot: int, info: str) -> None:
        try:
            uploader.upload(ImageInfo.from_json(info), generation="g1", rank=0)
            rank.send(slot)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the training process sees its connection end

    while (image := rank.recv()) is not None:
        threading.Thread(target=upload, args=image).start()
    uploader.close()


class Ours:
    """Snapshots and the uploader, as a rank and its agent use them."""

    def __init__(self, state: dict[str, torch.Tensor], target: str):
        self._images = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._link = UploadLink(target)
        engine: Any = Engine(state)
        images = Path(self._images.name)
        self._snapshots = Snapshots(engine, self._link, images, Guard(), Patience(), if_busy="wait")
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._snapshots.save(self._step, upload=True)

    def wait(self) -> None:
        self._link.wait()

    def close(self) -> None:
        self._link.close()
        self._images.cleanup()


class Dcp:
    """torch.distributed.checkpoint.async_save in a thread, as its documentation shows it."""

    def __init__(self, state: dict[str, torch.Tensor], writer: Callable[[], Any], stager: Any = None):
        self._state, self._writer, self._stager = state, writer, stager
        self._future: Any = None

    def save(self) -> None:
        options = {} if self._stager is None else {"async_stager": self._stager}
        self._future = dcp.async_save(self._state, storage_writer=self._writer(), **options)

    def wait(self) -> None:
        getattr(self._future, "upload_completion", self._future).result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class Control:
    """Saves nothing of this process: another one uploads as many bytes that lie in memory already."""

    def __init__(self, state: dict[str, torch.Tensor], target: str):
        self._size = sum(tensor.nbytes for tensor in state.values())
        state.clear()
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._path = Path(self._folder.name) / "image"
        with self._path.open("wb") as file:
            for begin in range(0, self._size, 2**26):
                file.write(os.urandom(min(2**26, self._size - begin)))
        self._link = UploadLink(target)
        self._step = 0

    def save(self) -> None:
        self._step += 1
        info = ImageInfo(
            step=self._step, path=str(self._path), size=self._size, tensors=SavedBlocks.of(()), stall_seconds=0
        )
        self._link.image(0, info.to_json(), "", upload=True)

    def wait(self) -> None:
        self._link.wait()

    def close(self) -> None:
        self._link.close()
        self._folder.cleanup()


def to_files(state: dict[str, torch.Tensor], target: str) -> Dcp:
    return Dcp(state, lambda: dcp.FileSystemWriter(f"{target}/dcp"))


def to_files_persistent(state: dict[str, torch.Tensor], target: str) -> Dcp:
    return Dcp(state, lambda: dcp.FileSystemWriter(f"{target}/dcp"), persistent_stager())


def to_s3_persistent(state: dict[str, torch.Tensor], target: str) -> Dcp:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return Dcp(state, lambda: FsspecWriter(f"{target}/dcp"), persistent_stager())


def persistent_stager() -> DefaultStager:
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )


WAYS: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "Raynium": Ours,
    "torch async_save, persistent stager": to_files_persistent,
    "torch async_save, default": to_files,
    "torch FsspecWriter, persistent stager": to_s3_persistent,
    "control": Control,
}


# ---- stall --------------------------------------------------------------------------------------------------------


def copies_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A tensor like each of the state, all within a GiB: later ones use the memory of earlier ones again, in turn."""
    copies: list[torch.Tensor] = []
    alike: dict[torch.Size, deque[torch.Tensor]] = defaultdict(deque)
    left_bytes = COPY_BYTES
    for tensor in state.values():
        if left_bytes > 0:
            alike[tensor.shape].append(torch.empty_like(tensor))
            left_bytes -= tensor.nbytes
        else:
            alike[tensor.shape].rotate(-1)
        copies.append(alike[tensor.shape][-1])
    return copies


def stalls(way_name: str, state: dict[str, torch.Tensor], target: str) -> dict[str, Any]:
    """Seconds of each save, and of a memcpy right before it."""
    copies = copies_of(state)

    def memcpy() -> float:
        began = time.perf_counter()
        for copy, tensor in zip(copies, state.values(), strict=True):
            copy.copy_(tensor)
        return time.perf_counter() - began

    way = WAYS[way_name](state, target)
    saves, limits = [], []
    for turn in range(SAVES + 1):
        limit = min(memcpy(), memcpy())
        began = time.perf_counter()
        way.save()
        seconds = time.perf_counter() - began
        way.wait()
        clear(target)
        if turn:
            saves.append(seconds)
            limits.append(limit)
    way.close()
    return {"saves": saves, "limits": limits}


# ---- steps while an upload runs -----------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step, and what this thread did in it."""

    seconds: float
    cpu_seconds: float  # also the kernel's own work on this core; a virtual machine's lost time may be in it
    preempted: int  # times that another thread got the core
    waited: int  # times that this thread gave it up: for the interpreter's lock, a file, a page from disk
    faults: int  # pages of memory that were given, or mapped again


def step() -> Step:
    """About a millisecond of training: matrix products, and Python between them."""
    before, began = resource.getrusage(resource.RUSAGE_THREAD), time.perf_counter()
    for _ in range(3):
        torch.mm(_MATRIX, _MATRIX)
        sum(range(3000))
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_THREAD)
    return Step(
        seconds,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        after.ru_nivcsw - before.ru_nivcsw,
        after.ru_nvcsw - before.ru_nvcsw,
        after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt,
    )


_MATRIX = torch.randn(256, 256)


def steps_while(running: Callable[[float], bool]) -> list[Step]:
    began = time.perf_counter()
    found = []
    while running(time.perf_counter() - began):
        found.append(step())
    return found


def worst_of_a_second(steps: Sequence[Step]) -> float:
    """Median over seconds of the longest step in each: a virtual machine that is held up once does not change it."""
    worst: dict[int, float] = {}
    now = 0.0
    for each in steps:
        worst[int(now)] = max(worst.get(int(now), 0.0), each.seconds)
        now += each.seconds
    return statistics.median(worst.values())


def steps_during_upload(way_name: str, state: dict[str, torch.Tensor], target: str) -> dict[str, Any]:
    """Steps without an upload ("idle") and while uploads run ("busy"), and the seconds of one upload."""
    way = WAYS[way_name](state, target)
    way.save()
    way.wait()
    clear(target)
    steps_while(lambda seconds: seconds < 1)
    idle = steps_while(lambda seconds: seconds < STEP_SECONDS)
    busy: list[Step] = []
    uploads: list[float] = []
    while sum(uploads) < STEP_SECONDS:
        began = time.perf_counter()
        way.save()
        done = threading.Event()
        waiter = threading.Thread(target=lambda done=done: (way.wait(), done.set()))
        waiter.start()
        busy += steps_while(lambda _, done=done: not done.is_set())
        waiter.join()
        uploads.append(time.perf_counter() - began)
        clear(target)
    way.close()
    return {"idle": in_short(idle), "busy": in_short(busy), "seconds": statistics.mean(uploads)}


def in_short(steps: Sequence[Step]) -> dict[str, Any]:
    """Milliseconds: mean, worst, median of the worst of each second; and what the worst was spent on."""
    worst = max(steps, key=lambda each: each.seconds)
    measures = (statistics.mean(each.seconds for each in steps), worst.seconds, worst_of_a_second(steps))
    why = (
        f"{1000 * worst.seconds:.1f} ms, {1000 * worst.cpu_seconds:.1f} of them counted as CPU; preempted "
        f"{worst.preempted} times, waited {worst.waited} times, {worst.faults} page faults"
    )
    return {"ms": [1000 * each for each in measures], "why": why}


# ---- one measurement, in a process of its own ---------------------------------------------------------------------


def measure(what: str, way_name: str, gib: float, target: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, "--way", way_name, "--target", target, "--gib", str(gib)]
    command += ["--tiny"] if "--tiny" in sys.argv else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way_name} failed ({what}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(what: str, way_name: str, gib: float, target: str) -> None:
    torch.manual_seed(0)  # all ways save the same
    with one_rank():
        state = decoder_state(gib)
        gib = sum(tensor.nbytes for tensor in state.values()) / 2**30
        found = {"stalls": stalls, "steps": steps_during_upload}[what](way_name, state, target)
    print(json.dumps(found | {"gib": gib}))


def clear(target: str) -> None:
    """Forget what was saved there. Where SeaweedFS deletes a bucket its memory, or disk, is free at once."""
    if not target.startswith("s3://"):
        shutil.rmtree(target)
        Path(target).mkdir()
        return
    client = boto3.client("s3")
    client.delete_bucket(Bucket=target.removeprefix("s3://"))
    client.create_bucket(Bucket=target.removeprefix("s3://"))


@contextmanager
def one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def main() -> int:
    parser = benchmark.parser(__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state (default 1)")
    parser.add_argument("--server-folder", default="/dev/shm", help="where the S3 server keeps its files")
    parser.add_argument("--measure", choices=["stalls", "steps"], help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.tiny:
        global SAVES, STEP_SECONDS
        SAVES, STEP_SECONDS, arguments.gib = 1, 0.2, 0.02
    if arguments.measure:
        measure_here(arguments.measure, arguments.way, arguments.gib, arguments.target)
        return 0
    benchmark.heading()
    cores = sorted(os.sched_getaffinity(0))
    os.environ[UPLOADER_CORE] = str(cores[-1])
    os.sched_setaffinity(0, cores[-1:])  # what is started now stays there: the server
    with (
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir=arguments.server_folder) as server_folder,
        running_s3_server(Path(server_folder)) as server,
    ):
        os.environ.update(server.env)
        os.sched_setaffinity(0, cores[:1])
        folder, bucket = f"{disk}/saved", server.create_bucket("bench")
        Path(folder).mkdir()
        passed = _stall_table(arguments.gib, folder) & _step_table(arguments.gib, folder, bucket)
    return benchmark.verdict(passed, arguments.tiny)


def _stall_table(gib: float, folder: str) -> bool:
    print(
        "| save | stall, median ms per GiB | worst | warm memcpy, ms per GiB | ratio |\n|---|---|---|---|---|",
        flush=True,
    )
    ratios = []
    for way in ("Raynium", "torch async_save, persistent stager", "torch async_save, default"):
        found = measure("stalls", way, gib, folder)
        saves, limits = found["saves"], found["limits"]
        ratio = statistics.median(a / b for a, b in zip(saves, limits, strict=True))
        ratios.append(ratio)
        row = [statistics.median(saves), max(saves), statistics.median(limits)]
        cells = " | ".join(f"{1000 * each / found['gib']:.0f}" for each in row)
        print(f"| {way} | {cells} | {ratio:.2f} |", flush=True)
    print(f"\nours {ratios[0]:.2f}, at most {MOST_STALL}\n")
    return ratios[0] <= MOST_STALL


def _step_table(gib: float, folder: str, bucket: str) -> bool:
    rows = [
        ("S3", bucket, "Raynium"),
        ("S3", bucket, "torch FsspecWriter, persistent stager"),
        ("S3", bucket, "control"),
        ("file", folder, "Raynium"),
        ("file", folder, "control"),
    ]
    print("| upload to | by | seconds | idle step, ms | with upload | mean × | worst × | worst of a second × |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    passed = True
    reasons = []
    for place, target, way in rows:
        found = measure("steps", way, gib, target)
        idle, busy = found["idle"], found["busy"]
        ratios = [b / a for a, b in zip(idle["ms"], busy["ms"], strict=True)]
        cells = [" / ".join(f"{each:.2f}" for each in steps["ms"]) for steps in (idle, busy)]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {place} | {way} | {found['seconds']:.1f} | {' | '.join(cells)} |", flush=True)
        reasons.append(f"{place}, {way}: worst step idle {idle['why']}; with upload {busy['why']}")
        if way == "Raynium":
            passed &= ratios[0] <= MOST_MEAN_STEP and ratios[1] <= MOST_WORST_STEP
    print(f"\nours at most: mean {MOST_MEAN_STEP}, worst {MOST_WORST_STEP}\n\n" + "\n".join(reasons))
    return passed


if __name__ == "__main__":
    sys.exit(main())
