"""Saving and loading one large file in S3, beside other clients: python tests/benchmarks/bench_checkpoint_storage.py

Each client moves the same bytes between /dev/shm and one SeaweedFS on this machine, each time in a process and a bucket
of its own, which is deleted when it has loaded them again (the server's files are on disk); the turns of all clients
alternate. Client and server share the cores, so wall times say little on a small or busy machine and client CPU seconds
say most: user + system of the client's process, imports and first connection left out. What is loaded is compared with
what was saved, outside the timing.

The limit of an upload's CPU seconds is printed beside them: one CRC64NVME pass and one plain `send` of the same bytes
over loopback, to a process that throws them away.

Passes if ours uploads in at most 0.4 CPU s/GiB, and saves and loads within 10 % of the fastest peer's wall time.
Peers that are not installed are named and left out.
"""

import argparse
import importlib.util
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import numpy as np

from raynium.storage.checksum import PART_BYTES
from raynium.storage.store import Store

sys.path.insert(0, str(Path(__file__).parents[1]))
from s3_server import S3Server, running_s3_server

GIB = 2**30
MOST_UPLOAD_CPU = 0.4  # s/GiB
MOST_WALL_RATIO = 1.1


def main() -> int:
    parser = benchmark.parser(__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--client", help=argparse.SUPPRESS)  # one measurement, in this process
    parser.add_argument("--direction", choices=["save", "load"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        return measure_here(arguments.client, arguments.direction)
    if arguments.tiny:
        arguments.gib, arguments.turns = [0.02], 1
    benchmark.heading()

    clients = [name for name, (module, _) in CLIENTS.items() if importlib.util.find_spec(module)]
    missing = sorted({module for module, _ in CLIENTS.values() if not importlib.util.find_spec(module)})
    print(f"not installed, so left out: {', '.join(missing)}\n" if missing else "all peers are installed\n")
    passed = True
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory() as disk,
        running_s3_server(Path(disk)) as server,
    ):
        for gib in arguments.gib:
            source = Path(memory) / "image"
            write_random(source, int(gib * GIB))
            passed &= compare(clients, gib, arguments.turns, server, source)
    return benchmark.verdict(passed, arguments.tiny)


def compare(clients: list[str], gib: float, turns: int, server: S3Server, source: Path) -> bool:
    """Print one table; returns whether the goals are reached."""
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(turns):
        first = turn % len(clients)  # not always the same: the first one finds the server cold
        for index, client in enumerate(clients[first:] + clients[:first]):
            bucket = server.create_bucket(f"bench-{gib:g}-{turn}-{index}".replace(".", "-"))
            env = server.env | {"BENCH_SOURCE": str(source), "BENCH_BUCKET": bucket.removeprefix("s3://")}
            for direction in ("save", "load"):
                results.setdefault((client, direction), []).append(measure(client, direction, env))
            delete_bucket(server, bucket)  # its volumes go with it: deleted objects alone would keep the disk full
    print(f"{gib:g} GiB, best of {turns} (median)\n")
    print("| client | save, CPU s/GiB | save, GiB/s | load, CPU s/GiB | load, GiB/s | most private memory, MiB |")
    print("|---|---|---|---|---|---|")
    for client in clients:
        cells = []
        for direction in ("save", "load"):
            cpu = [turn["cpu"] / gib for turn in results[client, direction]]
            speed = [gib / turn["wall"] for turn in results[client, direction]]
            cells.append(f"{min(cpu):.2f} ({statistics.median(cpu):.2f})")
            cells.append(f"{max(speed):.2f} ({statistics.median(speed):.2f})")
        memory = max(turn["memory"] for direction in ("save", "load") for turn in results[client, direction])
        print(f"| {client} | {' | '.join(cells)} | {memory / 2**20:,.0f} |")

    def best(client: str, direction: str, what: str) -> float:
        return min(turn[what] for turn in results[client, direction])

    ours = best("raynium", "save", "cpu") / gib
    limit = min(limit_cpu_seconds(source) for _ in range(turns)) / gib
    print(f"\nour upload: {ours:.2f} CPU s/GiB, required {MOST_UPLOAD_CPU}; the limit here is {limit:.2f}")
    passed = ours <= MOST_UPLOAD_CPU
    for direction in ("save", "load"):
        peers = {client: best(client, direction, "wall") for client in clients if client != "raynium"}
        fastest = min(peers, key=lambda client: peers[client])
        ratio = best("raynium", direction, "wall") / peers[fastest]
        print(f"{direction}: {ratio:.2f} times the seconds of {fastest}, required {MOST_WALL_RATIO}")
        passed &= ratio <= MOST_WALL_RATIO
    print()
    return passed


def delete_bucket(server: S3Server, bucket: str) -> None:
    import boto3

    options = server.options
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"],
        region_name="us-east-1",
    )
    client.delete_bucket(Bucket=bucket.removeprefix("s3://"))


# ---- one measurement, in a process of its own -------------------------------------------------------------------


def measure(client: str, direction: str, env: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--client", client, "--direction", direction]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{client} failed to {direction}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(client: str, direction: str) -> int:
    warnings.simplefilter("ignore")
    source = Path(os.environ["BENCH_SOURCE"])
    _, connect = CLIENTS[client]
    save, load = connect(os.environ["BENCH_BUCKET"])
    fills = direction == "load" and client in FILL_GIVEN_MEMORY
    destination = np.ones(source.stat().st_size if fills else 0, dtype=np.uint8)
    cpu, wall = cpu_seconds(), time.perf_counter()
    with PeakMemory() as memory:
        loaded = load(destination) if direction == "load" else save(source)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if direction == "load":
        expected = np.memmap(source, dtype=np.uint8, mode="r")
        found = destination if loaded is None else loaded
        pieces = range(0, len(expected), PART_BYTES)  # numpy notes of each byte compared at once whether it is equal
        if len(found) != len(expected) or not all(
            np.array_equal(found[begin : begin + PART_BYTES], expected[begin : begin + PART_BYTES]) for begin in pieces
        ):
            raise RuntimeError(f"{client} loaded other bytes than were saved")
    print(json.dumps({"cpu": cpu - memory.cpu_seconds, "wall": wall, "memory": memory.bytes}))
    return 0


def limit_cpu_seconds(source: Path) -> float:
    """CPU seconds of this process for one CRC64NVME pass over the file and one send of it, part after part."""
    from awscrt.checksums import crc64nvme

    receiver = socket.create_server(("127.0.0.1", 0))
    throws_away = "import socket; s = socket.socket(fileno=0); b = bytearray(1 << 20)\nwhile s.recv_into(b): pass"
    with socket.create_connection(receiver.getsockname()) as sender:
        accepted, _ = receiver.accept()
        reader = subprocess.Popen([sys.executable, "-c", throws_away], stdin=accepted)
        accepted.close()
        image = np.memmap(source, dtype=np.uint8, mode="r").data
        began = cpu_seconds()
        for start in range(0, len(image), PART_BYTES):
            part = image[start : start + PART_BYTES]
            crc64nvme(part)  # pyright: ignore[reportArgumentType]
            sender.sendall(part)
        spent = cpu_seconds() - began
    reader.wait()
    receiver.close()
    return spent


def cpu_seconds() -> float:
    """Of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class PeakMemory:
    """Private bytes that this process needs at most beyond those it had; mapped files and /dev/shm do not count."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self.cpu_seconds, self._before = 0, 0.0, self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = max(self.bytes, self._now() - self._before)
        self.cpu_seconds = time.thread_time()  # of the watching itself

    def _now(self) -> int:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()


# ---- the clients, each imported, connected and signed in once -------------------------------------------------------

# save(source); load(destination), which returns the loaded bytes where the client cannot fill given memory (and the
# destination is then empty)
Client = tuple[Callable[[Path], Any], Callable[[np.ndarray], Any]]


def raynium_client(bucket: str) -> Client:
    from concurrent.futures import ThreadPoolExecutor

    store = Store(f"s3://{bucket}/run")
    store.exists("warm")

    def load(destination: np.ndarray) -> None:
        view = destination.data

        def read(start: int) -> None:
            store.read_into("object", start, view[start : start + PART_BYTES])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(0, len(view), PART_BYTES)))

    return lambda source: store.upload_file("object", source), load


def boto3_client(bucket: str) -> Client:
    import io

    import boto3

    client = boto3.client("s3")
    client.list_objects_v2(Bucket=bucket, MaxKeys=1)

    def save(source: Path) -> None:
        with source.open("rb") as file:
            client.upload_fileobj(file, bucket, "run/object")

    def load(_: np.ndarray) -> np.ndarray:
        target = io.BytesIO()
        client.download_fileobj(bucket, "run/object", target)
        return np.frombuffer(target.getbuffer(), dtype=np.uint8)

    return save, load


def s3fs_client(bucket: str) -> Client:
    import s3fs

    fs = s3fs.S3FileSystem()
    path = f"{bucket}/run/object"
    fs.exists(path)

    def load(_: np.ndarray) -> np.ndarray:
        local = Path(os.environ["BENCH_SOURCE"] + "-loaded")
        fs.get_file(path, str(local))
        loaded = np.fromfile(local, dtype=np.uint8)
        local.unlink()
        return loaded

    return lambda source: fs.put_file(str(source), path), load


def dcp_client(bucket: str) -> Client:
    import s3fs
    import torch
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    fs = s3fs.S3FileSystem()
    url = f"s3://{bucket}/run"
    fs.exists(url)
    source = np.memmap(os.environ["BENCH_SOURCE"], dtype=np.uint8, mode="r+")
    tensors_of_64_mib = torch.from_numpy(source).split(64 * 2**20)
    state = {f"tensor-{index:03d}": tensor for index, tensor in enumerate(tensors_of_64_mib)}

    def load_all(destination: np.ndarray) -> None:
        pieces = torch.from_numpy(destination).split(64 * 2**20)
        target: dict[str, Any] = {f"tensor-{index:03d}": piece for index, piece in enumerate(pieces)}
        load(target, storage_reader=FsspecReader(url), no_dist=True)

    return lambda _: save(state, storage_writer=FsspecWriter(url), no_dist=True), load_all


def obstore_client(bucket: str) -> Client:
    import obstore
    from obstore.store import S3Store

    store = S3Store(bucket, prefix="run", client_options={"allow_http": True, "timeout": "300s"})
    obstore.list(store).collect()

    def save(source: Path) -> None:
        view = np.memmap(source, dtype=np.uint8, mode="r").data
        obstore.put(store, "object", view, chunk_size=64 * 2**20, max_concurrency=8)

    def load(destination: np.ndarray) -> None:
        position = 0
        for piece in obstore.get(store, "object").stream(min_chunk_size=2**20):
            destination[position : position + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            position += len(piece)

    return save, load


CLIENTS: dict[str, tuple[str, Callable[[str], Client]]] = {  # with the module each needs
    "raynium": ("s3fs", raynium_client),
    "torch DCP FsspecWriter": ("torch", dcp_client),
    "boto3 upload_fileobj": ("boto3", boto3_client),
    "s3fs.put_file": ("s3fs", s3fs_client),
    "obstore": ("obstore", obstore_client),
}


FILL_GIVEN_MEMORY = ("raynium", "torch DCP FsspecWriter", "obstore")


def write_random(path: Path, size: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, size, 64 * 2**20):
            file.write(generator.bytes(min(64 * 2**20, size - begin)))


if __name__ == "__main__":
    sys.exit(main())
