"""Loader against a bare numpy.memmap gather of the same rows: python tests/benchmarks/bench_loader.py

Both take turns in one process on a store in the page cache, so what is compared is our own code: window numbers,
shards, checksums, tensors. The bare gather knows its row numbers beforehand and makes one int64 array [B, T + 1]; the
loader computes them, makes two contiguous tensors [B, T], and compares each unit of the store with its checksum before
its first use. "unchecked" is a loader for which all units were compared before. Passes if every ratio to the bare
gather is at least 0.7.

Then rows of whole documents, which also have a column of document numbers, against the same bare gather of windows:
passes if the ratio is at least 0.5 for rows of 2,048 tokens and more. Shorter ones cost as much a row.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmark import heading, parser, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_documents

from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.data.build.store_build import build_store
from raynium.data.loader import Loader, open_loader
from raynium.data.packed_index import ensure_index
from raynium.data.rows import packable
from raynium.data.store import DocumentStore, open_store

LEAST_RATIO = 0.7
LEAST_PACKED_RATIO, LEAST_PACKED_TOKENS = 0.5, 2048
NUM_STEPS = 6000
STEPS_PER_TURN = 50
SHAPES_BT = [
    (8, 256),
    (32, 256),
    (16, 512),
    (8, 2048),
    (4, 4096),
    (2, 8192),
]  # sequences per rank and step, tokens each


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--store", type=Path, help="an existing store of python-stdlib (default: build one)")
    arguments = options.parse_args()
    shapes, num_steps = (SHAPES_BT[:1], STEPS_PER_TURN) if arguments.tiny else (SHAPES_BT, NUM_STEPS)
    heading()
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.store or Path(scratch) / "store"
        started = time.perf_counter()
        if arguments.tiny:
            path = build_documents(Path(scratch))
        store = open_store(path) if arguments.tiny else build_store(path, source="python-stdlib", vocab_size=4096)
        train = store.manifest.train
        print(f"store: {train.tokens:,} training tokens, ready in {time.perf_counter() - started:.1f} s\n")
        print("| B × T | bare, µs | loader, µs | bare, Mtokens/s | loader, Mtokens/s | ratio | ratio to unchecked |")
        print("|---|---|---|---|---|---|---|")
        ratios = [compare(store, batch_size, seq_len, num_steps) for batch_size, seq_len in shapes]
        print(f"\nsmallest ratio {min(ratios):.2f}, required {LEAST_RATIO}\n")
        print("| B × T, packed | pieces in a row | bare, µs | loader, µs | ratio |")
        print("|---|---|---|---|---|")
        packed = {seq_len: compare_packed(store, rows, seq_len, num_steps) for rows, seq_len in shapes}
    least = min((ratio for seq_len, ratio in packed.items() if seq_len >= LEAST_PACKED_TOKENS), default=1.0)
    print(f"\nsmallest ratio from {LEAST_PACKED_TOKENS} tokens on {least:.2f}, required {LEAST_PACKED_RATIO}")
    return verdict(min(ratios) >= LEAST_RATIO and least >= LEAST_PACKED_RATIO, arguments.tiny)


def compare(store: DocumentStore, batch_size: int, seq_len: int, num_steps: int) -> float:
    """Print one row of the table; returns loader speed / bare speed."""
    fresh, checked = open_store(store.path), open_store(store.path)
    checked.train_stream().read(0, store.manifest.train.tokens)
    config = config_of(store, batch_size, seq_len, packing="stream")
    loader, unchecked = (open_loader(config, [each], data_rank=0, data_size=1) for each in (fresh, checked))
    tokens = one_file(store)
    offsets = np.arange(seq_len + 1)
    starts_of_step = [loader.samples(step).rows * seq_len for step in range(1, num_steps + 1)]

    def bare(step: int) -> np.ndarray:
        return tokens[starts_of_step[step - 1][:, None] + offsets].astype(np.int64)

    assert np.array_equal(bare(num_steps)[:, :-1], loader.batch(num_steps).tokens_BT)
    bare_seconds = 0.0
    seconds = {loader: 0.0, unchecked: 0.0}
    for turn, first in enumerate(range(1, num_steps, STEPS_PER_TURN)):
        bare_seconds += cpu_seconds(bare, first)
        for each in (loader, unchecked) if turn % 2 else (unchecked, loader):  # the second finds the caches warmer
            seconds[each] += cpu_seconds(each.batch, first)
    loader_seconds, unchecked_seconds = seconds[loader], seconds[unchecked]
    speeds = [num_steps * batch_size * seq_len / seconds / 1e6 for seconds in (bare_seconds, loader_seconds)]
    ratio = bare_seconds / loader_seconds
    print(
        f"| {batch_size} × {seq_len} | {bare_seconds / num_steps * 1e6:.1f} | {loader_seconds / num_steps * 1e6:.1f} "
        f"| {speeds[0]:.0f} | {speeds[1]:.0f} | {ratio:.2f} | {unchecked_seconds / loader_seconds:.2f} |"
    )
    return ratio


def compare_packed(store: DocumentStore, batch_size: int, seq_len: int, num_steps: int) -> float:
    """Print one row of the second table; returns loader speed / bare speed."""
    config = config_of(store, batch_size, seq_len, packing="documents")
    opened = open_store(store.path)
    index = ensure_index(packable(opened), config.data).index
    loader = open_loader(config, [opened], data_rank=0, data_size=1)
    bare_seconds, seconds = seconds_beside_bare(store, loader, batch_size, seq_len, num_steps)
    print(
        f"| {batch_size} × {seq_len} | {sum(index.pieces) / index.num_rows:.1f} | {bare_seconds / num_steps * 1e6:.1f} "
        f"| {seconds / num_steps * 1e6:.1f} | {bare_seconds / seconds:.2f} |"
    )
    return bare_seconds / seconds


def seconds_beside_bare(
    store: DocumentStore, loader: Loader, batch_size: int, seq_len: int, num_steps: int
) -> tuple[float, float]:
    """A bare gather of as many windows of one file takes turns with the loader; returns the seconds of both."""
    tokens, offsets = one_file(store), np.arange(seq_len + 1)
    starts = np.random.default_rng(0).integers(0, len(tokens) - seq_len, (num_steps, batch_size, 1))
    bare_seconds = seconds = 0.0
    for first in range(1, num_steps, STEPS_PER_TURN):
        bare_seconds += cpu_seconds(lambda step: tokens[starts[step - 1] + offsets].astype(np.int64), first)
        seconds += cpu_seconds(loader.batch, first)
    return bare_seconds, seconds


def config_of(store: DocumentStore, batch_size: int, seq_len: int, *, packing: str) -> Config:
    sizes = {"train.global_batch_size": batch_size, "data.seq_len": seq_len}
    sizes |= {"data.packing": packing, "data.path": store.place, "run.root": str(store.path.parent)}
    return load_config("quickstart", sizes)


def one_file(store: DocumentStore) -> np.ndarray:
    """The training tokens in one file, as somebody without a loader would have them."""
    path, stream = store.path.with_name("tokens.bin"), store.train_stream()
    if not path.exists():
        stream.read(0, len(stream)).tofile(path)
    return np.memmap(path, dtype=store.manifest.numpy_dtype, mode="r")


def cpu_seconds(call: Callable[[int], object], first: int) -> float:
    """Of this thread, for one turn: what other processes take from a busy machine does not count."""
    started = time.thread_time()
    for step in range(first, first + STEPS_PER_TURN):
        call(step)
    return time.thread_time() - started


if __name__ == "__main__":
    sys.exit(main())
