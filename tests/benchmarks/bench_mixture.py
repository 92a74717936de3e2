"""A mixture of five stores against bare rows, and one of a trillion tokens: python tests/benchmarks/bench_mixture.py

The first tables are those of bench_loader.py for a mixture: the bare gather of as many rows from one numpy.memmap takes
turns with the loader, which asks five stores for windows of their text or for rows of whole documents; all were read
once before, so that no checksum is left to compare. It passes if every ratio is at least 0.5 for rows of 2,048 tokens
and more: what a row costs beside its tokens weighs more in shorter ones.

Then five stores of 200 billion tokens each: manifests made for it, of 3,400 shards which are one sparse file under
3,400 names. From nothing to the first batch must take 0.1 s, without the memory growing with the stores.
"""

import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench_loader import LEAST_PACKED_TOKENS, SHAPES_BT, STEPS_PER_TURN, seconds_beside_bare
from benchmark import heading, parser, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_documents

from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.data.build.store_build import build_store
from raynium.data.loader import open_loader
from raynium.data.manifest import MANIFEST_NAME, StoreManifest, shard_name, units_content
from raynium.data.store import DocumentStore, open_store
from raynium.storage.checksum import list_to_text
from raynium.storage.local_files import file_checksums

LEAST_RATIO = 0.5
FIRST_BATCH_SECONDS = 0.1
WEIGHTS = (0.4, 0.3, 0.15, 0.1, 0.05)
NUM_STEPS = 3000
NUM_SHARDS, SHARD_TOKENS = 3400, 58_823_680


def main() -> int:
    arguments = parser(__doc__).parse_args()
    shapes, num_steps = (SHAPES_BT[:1], STEPS_PER_TURN) if arguments.tiny else (SHAPES_BT, NUM_STEPS)
    heading()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.tiny:
            store = open_store(build_documents(Path(scratch)))
        else:
            store = build_store(Path(scratch) / "store", source="python-stdlib", vocab_size=4096)
        ratios: list[float] = []
        for packing, rows in (("stream", "windows"), ("documents", "packed")):
            print(f"| B × T, {rows} | bare, µs | mixture, µs | ratio |")
            print("|---|---|---|---|")
            of_shape = {shape: compare(store, *shape, num_steps, packing=packing) for shape in shapes}
            ratios += [ratio for (_, seq_len), ratio in of_shape.items() if seq_len >= LEAST_PACKED_TOKENS]
            print()
        least = min(ratios, default=1.0)
        print(f"smallest ratio from {LEAST_PACKED_TOKENS} tokens on {least:.2f}, required {LEAST_RATIO}\n")
        shards, tokens = (3, 32_768) if arguments.tiny else (NUM_SHARDS, SHARD_TOKENS)
        places = [huge_store(store, Path(scratch) / f"huge-{k}", shards, tokens) for k in range(len(WEIGHTS))]
        seconds, grown = first_batch(places)
    print(
        f"{len(places) * shards * tokens:,} tokens in {len(places)} stores: first batch after {seconds:.3f} s, at most "
        f"{FIRST_BATCH_SECONDS}; {grown / 2**20:.0f} MiB more memory at the most"
    )
    return verdict(least >= LEAST_RATIO and seconds <= FIRST_BATCH_SECONDS, arguments.tiny)


def config_of(places: list[Path], batch_size: int, seq_len: int, *, packing: str = "stream") -> Config:
    stores = ", ".join(f"{{store: {place}, weight: {weight}}}" for place, weight in zip(places, WEIGHTS, strict=True))
    sizes = {"train.global_batch_size": batch_size, "data.seq_len": seq_len, "data.packing": packing}
    return load_config("quickstart", {"data.source": None, "data.mixture": f"[{stores}]", **sizes})


def compare(store: DocumentStore, batch_size: int, seq_len: int, num_steps: int, *, packing: str) -> float:
    """Print one row of the table; returns loader speed / bare speed."""
    stores = [open_store(store.path) for _ in WEIGHTS]
    config = config_of([store.path] * len(WEIGHTS), batch_size, seq_len, packing=packing)
    loader = open_loader(config, stores, data_rank=0, data_size=1)
    # Checksums are compared before a unit's first use, which is once in a run.
    for step in range(1, num_steps):
        loader.batch(step)
    bare_seconds, seconds = seconds_beside_bare(store, loader, batch_size, seq_len, num_steps)
    print(
        f"| {batch_size} × {seq_len} | {bare_seconds / num_steps * 1e6:.1f} | {seconds / num_steps * 1e6:.1f} "
        f"| {bare_seconds / seconds:.2f} |"
    )
    return bare_seconds / seconds


def huge_store(small: DocumentStore, folder: Path, num_shards: int, tokens: int) -> Path:
    """A store whose training shards are one sparse file; all else is the small one's."""
    shutil.copytree(small.path, folder)
    zeros = folder / "zeros"
    with zeros.open("wb") as file:
        file.truncate(tokens * small.manifest.numpy_dtype.itemsize)
    checksums = file_checksums(zeros, small.manifest.unit_bytes)
    (folder / "zeros.crc").write_bytes(units_content(checksums))
    for number in range(num_shards):
        name = shard_name("train", number)
        (folder / name).unlink(missing_ok=True)
        os.link(zeros, folder / name)
        units = (folder / name).with_suffix(".crc")
        units.unlink(missing_ok=True)
        os.link(folder / "zeros.crc", units)
    fields = small.manifest.model_dump(exclude={"format_version", "crc64nvme", "identity"})
    shards = {"numbers": list(range(num_shards)), "tokens": [tokens] * num_shards}
    shards["crc64nvme"] = list_to_text([checksums.crc] * num_shards)
    fields["train"] |= {"tokens": tokens * num_shards, "shards": shards}
    (folder / MANIFEST_NAME).write_bytes(StoreManifest.of(**fields).to_json())
    return folder


def first_batch(places: list[Path]) -> tuple[float, int]:
    """Seconds until it is there, of eight rows; bytes that this process had more at its peak than before."""
    config = config_of(places, 8, 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    open_loader(config, [open_store(place) for place in places], data_rank=0, data_size=1).batch(1)
    seconds = time.perf_counter() - started
    return seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    sys.exit(main())
