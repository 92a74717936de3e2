"""Loading a checkpoint against torch's own reader: python tests/benchmarks/bench_checkpoint_load.py

The same state (layers of Llama 3.2 1B in float32 with both moments, and an embedding that fills it up) is saved by one
process in our format and with DCP's FsspecWriter, in a folder and in one SeaweedFS. Then processes of their own load
all of it, and an eighth: the rows that one of 8 FSDP ranks has. Both readers fill tensors that exist and were touched;
the fastest of some loads is shown, memory is the peak above the destination. Bytes fetched are those of S3's answers
(ours: of its requests), and for folders those of read calls.

Passes if ours fetches at most 1.1 times what it needs for an eighth, takes at most 1.1 times the peer's time, and at
most 64 MiB of memory for each stream.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark
import torch
import torch.distributed as dist
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import running_s3_server

from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.reads import STREAMS
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.storage.store import Store

MOST_FETCHED = 1.1  # times what an eighth needs
MOST_TIME = 1.1  # times the peer's
MOST_BYTES_PER_STREAM = 64 * 2**20
SHARE = 8
LAYER = {
    "attention.q": (2048, 2048),
    "attention.k": (512, 2048),
    "attention.v": (512, 2048),
    "attention.o": (2048, 2048),
    "ffn.gate": (8192, 2048),
    "ffn.up": (8192, 2048),
    "ffn.down": (2048, 8192),
    "attention_norm": (2048,),
    "ffn_norm": (2048,),
}
GIB = 2**30


def main() -> int:
    parser = benchmark.parser(__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 4], help="sizes of the state")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--folder", help="for the files, the server's too (default: the temporary directory)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(**json.loads(arguments.child))
        return 0
    if arguments.tiny:
        arguments.gib, arguments.loads = [0.05], 1
    benchmark.heading()
    print("| store | GiB | load | reader | s | CPU s/GiB | fetched / needed | memory, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for gib in arguments.gib:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            good &= compare("file", f"{folder}/store", {}, gib, arguments.loads, folder)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, running_s3_server(Path(folder)) as server:
            good &= compare("s3", server.create_bucket("bench"), server.env, gib, arguments.loads, folder)
    print("\npassed" if good else "\nnot passed")
    return benchmark.verdict(good, arguments.tiny)


def compare(name: str, url: str, env: dict[str, str], gib: float, loads: int, folder: str) -> bool:
    """Print the four rows of one store and size; whether they are as required."""
    for reader in ("ours", "DCP"):
        run_child(env, what="save", reader=reader, url=url, gib=gib, loads=1, folder=folder)
    good = True
    for share, label in ((1, "all"), (SHARE, f"1/{SHARE}")):
        found = {
            reader: run_child(
                env, what="load", reader=reader, url=url, gib=gib, loads=loads, folder=folder, share=share
            )
            for reader in ("ours", "DCP")
        }
        for reader, row in found.items():
            print(
                f"| {name} | {gib} | {label} | {reader} | {row['seconds']:.2f} | {row['cpu_seconds_per_gib']:.2f} "
                f"| {row['fetched_ratio']:.3f} | {row['memory_mib']:.0f} |",
                flush=True,
            )
        ours, peer = found["ours"], found["DCP"]
        good &= ours["seconds"] <= MOST_TIME * peer["seconds"]
        good &= ours["memory_mib"] <= STREAMS * MOST_BYTES_PER_STREAM / 2**20
        good &= share == 1 or ours["fetched_ratio"] <= MOST_FETCHED
    return good


def run_child(env: dict[str, str], **task: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    ran = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


# ---- in a process of its own --------------------------------------------------------------------------------------


def child(*, what: str, reader: str, url: str, gib: float, loads: int, folder: str, share: int = 1) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP, to one process without ranks
    if what == "save":
        (save_ours if reader == "ours" else save_theirs)(url, gib, folder)
        print("{}")
        return
    load, needed_bytes = (loader_of_ours if reader == "ours" else loader_of_theirs)(url, gib, share)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timings = [timed(load) for _ in range(loads)]
    seconds, cpu_seconds, fetched_bytes = min(timings)
    memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    row = {
        "seconds": seconds,
        "cpu_seconds_per_gib": cpu_seconds / (needed_bytes / GIB),
        "fetched_ratio": fetched_bytes / needed_bytes,
        "memory_mib": memory_kib / 1024,
    }
    print(json.dumps(row))


def timed(load: Callable[[], int]) -> tuple[float, float, int]:
    """Seconds, CPU seconds of this process, bytes fetched."""
    started, cpu_started = time.perf_counter(), time.process_time()
    fetched_bytes = load()
    return time.perf_counter() - started, time.process_time() - cpu_started, fetched_bytes


def shapes(gib: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """As many layers as fit in the size, and an embedding that takes what is left."""
    layer_numbers = sum(torch.Size(shape).numel() for shape in LAYER.values())
    numbers = int(gib * GIB) // 4 // 3
    num_layers = (numbers - 1024 * 2048) // layer_numbers
    yield "embedding", ((numbers - num_layers * layer_numbers) // 2048 // SHARE * SHARE, 2048)
    for index in range(num_layers):
        for name, shape in LAYER.items():
            yield f"blocks.{index}.{name}", shape


def state(gib: float, share: int) -> dict[str, torch.Tensor]:
    """This rank's rows of every tensor; of 8 ranks it is the fourth. Every page is touched."""
    return {
        f"{kind}/{name}": torch.full((shape[0] // share, *shape[1:]), 1.5)
        for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
        for name, shape in shapes(gib)
    }


def chunks(tensors: dict[str, torch.Tensor], share: int) -> list[Chunk]:
    rank = share // 2
    return [
        Chunk(
            name=name,
            global_shape=(len(tensor) * share, *tensor.shape[1:]),
            offsets=(len(tensor) * rank, *(0,) * (tensor.dim() - 1)),
            tensor=tensor,
            saved_here=True,
        )
        for name, tensor in tensors.items()
    ]


def random_state(gib: float) -> dict[str, torch.Tensor]:
    tensors = state(gib, 1)
    for tensor in tensors.values():
        tensor.uniform_()
    return tensors


def save_ours(url: str, gib: float, folder: str) -> None:
    store, whole = Store(f"{url}/ours"), chunks(random_state(gib), 1)
    plan = plan_image(whole)
    with ImageFile(Path(folder) / "image") as image:
        write_image(plan, whole, image.reserve(plan.size), step=1)
        entry = upload_shard(store, plan.info(step=1, path=image.path), generation="g1", rank=0)
        image.unlink()
    commit_checkpoint(store, step=1, generation="g1", entries=[entry], state={}, world_size=1, layout={})


def save_theirs(url: str, gib: float, folder: str) -> None:
    dcp_save(dict(random_state(gib)), storage_writer=FsspecWriter(f"{url}/theirs"), no_dist=True)


def loader_of_ours(url: str, gib: float, share: int) -> tuple[Callable[[], int], int]:
    wanted = chunks(state(gib, share), share)
    ref = open_checkpoint(Store(f"{url}/ours"), 1)
    return lambda: load_checkpoint(ref, wanted).num_bytes_read, sum(chunk.tensor.nbytes for chunk in wanted)


def loader_of_theirs(url: str, gib: float, share: int) -> tuple[Callable[[], int], int]:
    tensors: dict[str, Any] = dict(state(gib, share))
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if share > 1:
        # One of 8 ranks without the other seven: planning needs no communication
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=share // 2, world_size=share, store=FakeStore())
        mesh = init_device_mesh("cpu", (share,))
        tensors = {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
    fetched = counted_s3() if url.startswith("s3://") else bytes_of_read_calls

    def load() -> int:
        before = fetched()
        dcp_load(dict(tensors), storage_reader=FsspecReader(f"{url}/theirs"), no_dist=True)
        return fetched() - before

    return load, needed_bytes


def counted_s3() -> Callable[[], int]:
    """The bytes of S3's answers in this process, from now on."""
    import s3fs

    total = 0
    call = s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal total
        answer = await call(self, method, *args, **kwargs)
        if method == "get_object":
            total += answer["ContentLength"]
        return answer

    s3fs.S3FileSystem._call_s3 = counting
    return lambda: total


def bytes_of_read_calls() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


if __name__ == "__main__":
    sys.exit(main())
