"""Streaming a store twenty times as large as the node's cache: python tests/benchmarks/bench_streaming.py

A store of random tokens lies in SeaweedFS, behind a proxy that holds back each request for 30 ms. Steps of 100 ms
(they sleep) take their batches from it, and then, in another turn, from a copy on this machine's disk; the rest of the
epoch follows without sleep, so that what is fetched for later is used at the end. Passes if steps wait for blocks at
most 1 % of the time (fetched, mapped, verified: all that a copy on the disk does not need; what a batch takes in all
stands beside it), the cache was never above its bound, at most 1.2 bytes were fetched for a byte that was used, and the
samples were those of the copy.
"""

import contextlib
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from benchmark import heading, parser, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from cache_folders import bytes_in_cache
from s3_server import free_ports, running_s3_server
from tiny import build_documents, job_text

from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.data.access import refuse_small_cache
from raynium.data.loader import Loader, open_loader
from raynium.data.manifest import MANIFEST_NAME, StoredFile, StoreManifest, shard_name, units_content
from raynium.data.remote import localize
from raynium.data.store import DocumentStore, open_store
from raynium.data.streamed import open_streamed
from raynium.storage.checksum import UNIT_BYTES, checksum_units, list_to_text
from raynium.storage.range_cache import RangeCache
from raynium.storage.store import Store

MOST_WAITING, MOST_FETCHED = 0.01, 1.2
LATENCY_SECONDS, STEP_SECONDS = 0.03, 0.1
SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Size:
    """store_bytes: twenty times cache_bytes."""

    lanes: int
    block_bytes: int
    cache_bytes: int
    seq_len: int
    batch_size: int
    timed_steps: int

    @property
    def store_bytes(self) -> int:
        return 20 * self.cache_bytes


FULL = Size(8, 4 * 2**20, 80 * 2**20, seq_len=1024, batch_size=64, timed_steps=600)
TINY = Size(2, 2**20, 8 * 2**20, seq_len=1024, batch_size=128, timed_steps=5)


def main() -> int:
    arguments = parser(__doc__).parse_args()
    size = TINY if arguments.tiny else FULL
    heading()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-streaming-")))
        (scratch / "seaweedfs").mkdir()
        server = stack.enter_context(running_s3_server(scratch / "seaweedfs"))
        os.environ.update(server.env)
        url = f"{server.create_bucket('streaming')}/store"
        began = time.perf_counter()
        make_store(url, size, scratch)
        print(f"store: {size.store_bytes / 2**20:,.0f} MiB, made in {time.perf_counter() - began:.0f} s\n", flush=True)
        with delayed(server.endpoint) as endpoint:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            # The file system of before knows the other endpoint.
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()
            return compare(url, size, scratch, tiny=arguments.tiny)


def compare(url: str, size: Size, scratch: Path, *, tiny: bool) -> int:
    began = time.perf_counter()
    copy = open_store(localize(url, scratch / "copy"))
    copied_seconds = time.perf_counter() - began
    config = config_of(size)
    refuse_small_cache(config.data, {url: copy.manifest})
    local = open_loader(config, [copy], data_rank=0, data_size=1, cache_sharers=1)
    local_batches = Turn(local, size.timed_steps)

    cache_folder, most, done = scratch / "cache", [0], threading.Event()
    cache = RangeCache(cache_folder, max_bytes=size.cache_bytes)
    began = time.perf_counter()
    streamed = open_loader(config, [open_streamed(url, cache)], data_rank=0, data_size=1, cache_sharers=1)

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], bytes_in_cache(cache_folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        batches = Turn(streamed, size.timed_steps, first_after=began)
        at_the_end = streamed.metrics(config.train.steps)
        waiting = (at_the_end["data/wait_seconds"] - batches.first_wait_seconds) / batches.total_seconds
        rest = [Rest(loader, size, config.train.steps) for loader in (streamed, local)]
    finally:
        done.set()
        watcher.join()
        streamed.close()
    same = rest[0].sums == rest[1].sums and batches.sums == local_batches.sums
    figures = streamed.metrics(config.train.steps)
    ratio = figures["data/fetched_bytes"] / figures["data/used_bytes"]
    print("| | streamed | copy |\n|---|---|---|")
    print(f"| before the first step, s | {batches.first_seconds:.2f} | {copied_seconds:.1f} |")
    print(f"| share of {size.timed_steps} steps' time spent waiting for blocks | {waiting:.2%} | |")
    print(f"| and on batches in all | {batches.share:.2%} | {local_batches.share:.2%} |")
    print(f"| a batch: median, 99 %, longest, ms | {batches.in_words()} | {local_batches.in_words()} |")
    print(f"| the rest of the epoch without sleep, MiB/s | {rest[0].speed:.0f} | {rest[1].speed:.0f} |")
    print(f"| on this node's disk at most, MiB | {most[0] / 2**20:.1f} | {copy.manifest.num_bytes / 2**20:,.0f} |")
    print(f"| fetched / used, whole epoch ({config.train.steps} steps) | {ratio:.3f} | |")
    print(f"| requests per step | {figures['data/requests'] / config.train.steps:.3f} | |")
    print(f"| requests of the {size.timed_steps} steps, and for later ones | {at_the_end['data/requests']:.0f} | |\n")
    within = most[0] <= size.cache_bytes
    print(
        f"bound {size.cache_bytes / 2**20:.0f} MiB; required: waiting {MOST_WAITING:.0%}, ratio {MOST_FETCHED}; ",
        end="",
    )
    print("the same samples" if same else "OTHER SAMPLES")
    return verdict(waiting <= MOST_WAITING and ratio <= MOST_FETCHED and within and same, tiny)


def config_of(size: Size) -> Config:
    tokens = size.store_bytes // 2
    steps = (tokens - 1) // size.seq_len // size.batch_size
    return parse_config(
        job_text(
            {
                "data.path": "/nowhere",
                "data.seq_len": size.seq_len,
                "data.shuffle": "blocks",
                "data.access": "stream",
                "data.shuffle_lanes": size.lanes,
                "data.shuffle_block_bytes": size.block_bytes,
                "data.cache_bytes": size.cache_bytes,
                "train.steps": steps,
                "train.global_batch_size": size.batch_size,
            }
        )
    )


class Turn:
    """Steps 1 to `steps`, each of which takes its batch and sleeps."""

    def __init__(self, loader: Loader, steps: int, *, first_after: float | None = None):
        began = time.perf_counter() if first_after is None else first_after
        self.sums = [digest(loader, 1)]
        self.first_seconds = time.perf_counter() - began
        self.first_wait_seconds = loader.metrics(1).get("data/wait_seconds", 0.0)
        began = time.perf_counter()
        self.seconds: list[float] = []
        for step in range(2, steps + 1):
            time.sleep(STEP_SECONDS)
            asked = time.perf_counter()
            batch = loader.batch(step)
            self.seconds.append(time.perf_counter() - asked)
            self.sums.append(zlib.crc32(batch.tokens_BT.numpy().tobytes()))
        self.total_seconds = time.perf_counter() - began
        self.share = sum(self.seconds) / self.total_seconds

    def in_words(self) -> str:
        ms = sorted(1000 * each for each in self.seconds)
        return f"{statistics.median(ms):.2f}, {ms[int(0.99 * len(ms))]:.1f}, {ms[-1]:.1f}"


def digest(loader: Loader, step: int) -> int:
    return zlib.crc32(loader.batch(step).tokens_BT.numpy().tobytes())


class Rest:
    """The steps after the timed ones. speed: MiB of tokens, as they are stored, in a second."""

    def __init__(self, loader: Loader, size: Size, total_steps: int):
        steps = range(size.timed_steps + 1, total_steps + 1)
        began = time.perf_counter()
        self.sums = [digest(loader, step) for step in steps]
        step_bytes = 2 * size.batch_size * size.seq_len
        self.speed = len(steps) * step_bytes / 2**20 / (time.perf_counter() - began)


def make_store(url: str, size: Size, scratch: Path) -> None:
    """Puts a store at the URL whose training tokens are random: all else is that of a small one."""
    small = open_store(build_documents(scratch))
    store, generator, shards = Store(url), np.random.default_rng(0), []
    for number, begin in enumerate(range(0, size.store_bytes, SHARD_BYTES)):
        content = generator.integers(0, 512, min(SHARD_BYTES, size.store_bytes - begin) // 2, np.uint16).tobytes()
        checksums = checksum_units(content, UNIT_BYTES)
        file = StoredFile(shard_name("train", number), len(content), checksums.crc)
        shards.append(file)
        upload(store, scratch, file.name, content)
        upload(store, scratch, file.units_name, units_content(checksums))
    copy_small_files(small, store)
    fields: dict[str, Any] = small.manifest.model_dump(exclude={"format_version", "crc64nvme", "identity"})
    tokens = [file.size_bytes // 2 for file in shards]
    fields["train"] |= {
        "tokens": sum(tokens),
        "shards": {
            "numbers": list(range(len(shards))),
            "tokens": tokens,
            "crc64nvme": list_to_text([file.crc for file in shards]),
        },
    }
    store.write_new(MANIFEST_NAME, StoreManifest.of(**fields).to_json())


def upload(store: Store, scratch: Path, name: str, content: bytes) -> None:
    (scratch / "part").write_bytes(content)
    store.upload_file(name, scratch / "part")


def copy_small_files(small: DocumentStore, store: Store) -> None:
    trained = {file.name for file in small.manifest.train_shards}
    for file in small.manifest.files:
        if file.name not in trained:
            for name in (file.name, file.units_name):
                store.upload_file(name, small.path / name)


@contextlib.contextmanager
def delayed(endpoint: str) -> Iterator[str]:
    """The address of a proxy before the server, in a process of its own, so that it takes no thread's turn."""
    [port] = free_ports(1)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, endpoint), daemon=True)
    process.start()
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


def serve(port: int, endpoint: str) -> None:
    place = urlsplit(endpoint)
    with socket.create_server(("127.0.0.1", port), backlog=256) as listener:
        while True:
            client, _ = listener.accept()
            upstream = socket.create_connection((place.hostname, place.port))
            for arguments in ((client, upstream, LATENCY_SECONDS), (upstream, client, 0.0)):
                threading.Thread(target=pump, args=arguments, daemon=True).start()


def pump(source: socket.socket, target: socket.socket, seconds: float) -> None:
    """Each of a client's messages is a request: they have no bodies, and the next one waits for an answer."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**18):
            time.sleep(seconds)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    sys.exit(main())
