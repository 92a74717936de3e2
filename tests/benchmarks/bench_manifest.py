"""What a large run's manifest costs: python tests/benchmarks/bench_manifest.py [--layers 80 --ranks 512]

A made-up 70B model in float32 with both moments, on 512 ranks: nothing of its 840 GB exists, only what describes them.
Measured, each in a process of its own: what one rank sends and its agent reads, the coordinator's way from the ranks'
entries to the manifest's bytes, and the way back that every rank of a restart goes, up to the requests that it would
send. Beside it the same blocks as torch.distributed.checkpoint keeps them: a pickle of its Metadata.

Layouts: `fsdp` cuts every tensor's rows among all ranks, `fsdp-tensor` among the ranks / 8 and 8 ways more,
`uneven` cuts
rows as nobody does, so that no two blocks are alike.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import benchmark
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from raynium.checkpoint.commit import build_manifest
from raynium.checkpoint.format.image import plan_image
from raynium.checkpoint.format.manifest import FileEntry, ShardEntry, manifest_from_bytes, manifest_to_bytes, shard_key
from raynium.checkpoint.load import wanted_ranges
from raynium.checkpoint.reads import plan_requests
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.storage.checksum import UNIT_BYTES, FileChecksums, list_to_text, num_units, to_text
from raynium.storage.store import Store

STEP = 1000
TENSOR_WAYS = 8
LAYER = {  # Llama 3 70B; by name the shape, and the dim that tensor parallelism cuts
    "attention.q.weight": ((8192, 8192), 0),
    "attention.k.weight": ((1024, 8192), 0),
    "attention.v.weight": ((1024, 8192), 0),
    "attention.o.weight": ((8192, 8192), 1),
    "ffn.gate.weight": ((28672, 8192), 0),
    "ffn.up.weight": ((28672, 8192), 0),
    "ffn.down.weight": ((8192, 28672), 1),
    "attention_norm.weight": ((8192,), None),
    "ffn_norm.weight": ((8192,), None),
}
ENDS = {
    "embedding.weight": ((128256, 8192), 0),
    "head.weight": ((128256, 8192), 0),
    "final_norm.weight": ((8192,), None),
}

Kind = tuple[str, tuple[int, ...], int | None]


def kinds(num_layers: int) -> list[Kind]:
    names = [(f"blocks.{layer}.{name}", *kind) for layer in range(num_layers) for name, kind in LAYER.items()]
    names += [(name, *kind) for name, kind in ENDS.items()]
    prefixes = ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")
    return [(prefix + name, shape, dim) for prefix in prefixes for name, shape, dim in names]


def share(length: int, index: int, ways: int, *, uneven: str = "") -> tuple[int, int]:
    """(start, length). Equal shares as FSDP cuts them, the last may be short or empty; or any, if `uneven` is given."""
    size = -(-length // ways)
    if not uneven:
        low = min(index * size, length)
        return low, min(size, length - low)
    step = length // ways
    cuts = [index * step + (crc32(b"%s %d" % (uneven.encode(), index)) % step) for index in (index, index + 1)]
    low, high = cuts[0] if index else 0, cuts[1] if index + 1 < ways else length
    return low, high - low


def chunk_of(kind: Kind, rank: int, num_ranks: int, layout: str) -> Chunk | None:
    """A rank's block of one tensor; None if another rank saves it."""
    name, shape, dim = kind
    offsets, lengths = [0] * len(shape), list(shape)
    ways, index = num_ranks, rank
    if layout == "fsdp-tensor":
        ways, (index, tensor_index) = num_ranks // TENSOR_WAYS, divmod(rank, TENSOR_WAYS)
        if dim is not None:
            offsets[dim], lengths[dim] = share(shape[dim], tensor_index, TENSOR_WAYS)
        elif tensor_index:
            return None
    start, lengths[0] = share(lengths[0], index, ways, uneven=name if layout == "uneven" else "")
    offsets[0] += start
    return Chunk(name, shape, tuple(offsets), torch.empty(lengths, device="meta"), saved_here=True)


def chunks_of(rank: int, options: argparse.Namespace, layout: str) -> list[Chunk]:
    found = (chunk_of(kind, rank, options.ranks, layout) for kind in kinds(options.layers))
    return [chunk for chunk in found if chunk is not None]


def entry_of(rank: int, options: argparse.Namespace, layout: str) -> ShardEntry:
    """What the agent of this rank would tell the coordinator; the checksums are numbers, but fit each other."""
    info = plan_image(chunks_of(rank, options, layout)).info(step=STEP, path="/dev/shm/image")
    random = Random(rank)
    crcs = tuple(random.getrandbits(64) for _ in range(num_units(info.size, UNIT_BYTES)))
    file = FileEntry(
        key=shard_key("g1", rank),
        size=info.size,
        crc64nvme=to_text(FileChecksums(info.size, UNIT_BYTES, crcs).crc),
        unit_bytes=UNIT_BYTES,
        unit_crc64nvme=list_to_text(crcs),
    )
    return ShardEntry(step=STEP, file=file, tensors=info.tensors)


# ---- what is measured, each in a process of its own ---------------------------------------------------------------


class Stopwatch:
    """Processor seconds of named parts (others may use the machine), and the memory that was taken at most above what
    there was at the begin."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._before_mb = _resident_mb()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        self._seconds[name] = time.process_time() - began
        return result

    def results(self, **more: float) -> dict[str, float]:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        return {**self._seconds, "peak_mb": peak_mb - self._before_mb, **more}


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def make(options: argparse.Namespace, layout: str, folder: Path) -> dict[str, float]:
    """The ranks' entries as JSON, one a line."""
    with (folder / "entries").open("w") as file:
        for rank in range(options.ranks):
            file.write(entry_of(rank, options, layout).to_json() + "\n")
    return {}


def commit(options: argparse.Namespace, layout: str, folder: Path) -> dict[str, float]:
    """The coordinator's part, from what agents sent to what is written."""
    watch = Stopwatch()
    text = (folder / "entries").open()
    entries = watch.time("entries_in_seconds", lambda: [ShardEntry.from_json(line) for line in text])
    one = entries[0].to_json()
    watch.time("one_entry_in_seconds", lambda: ShardEntry.from_json(one))
    watch.time("one_entry_out_seconds", lambda: entries[0].to_json())
    manifest = watch.time(
        "build_seconds",
        lambda: build_manifest(
            step=STEP,
            generation="g1",
            entries=entries,
            world_size=options.ranks,
            parent_step=None,
            layout={},
            state={},
            metrics={},
            timing=None,
        ),
    )
    data = watch.time("to_bytes_seconds", lambda: manifest_to_bytes(manifest))
    (folder / "manifest.json").write_bytes(data)
    return watch.results(entry_mb=len(one) / 1e6, size_mb=len(data) / 1e6)


def load(options: argparse.Namespace, layout: str, folder: Path) -> dict[str, float]:
    """What one rank of a restart on a quarter of the ranks does before it reads data."""
    chunks = [
        replace(chunk, tensor=torch.empty(chunk.tensor.shape))
        for chunk in chunks_of(1, argparse.Namespace(**vars(options) | {"ranks": options.ranks // 4}), "fsdp")
    ]
    watch = Stopwatch()
    data = (folder / "manifest.json").read_bytes()
    manifest = watch.time("from_bytes_seconds", lambda: manifest_from_bytes(data, where="manifest"))
    read_mb = watch.results()["peak_mb"]
    ref = CheckpointRef(Store(folder), manifest)
    requests = watch.time("plan_seconds", lambda: plan_requests(ref, wanted_ranges(ref, chunks)))
    blocks = sum(len(tensor.blocks) for tensor in manifest.tensors)
    return watch.results(read_mb=read_mb, tensors=len(manifest.tensors), blocks=blocks, requests=len(requests))


def dcp_write(options: argparse.Namespace, layout: str, folder: Path) -> dict[str, float]:
    """The same blocks as DCP's coordinator writes them."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for rank in range(options.ranks):
        position = 0
        for chunk in chunks_of(rank, options, layout):
            offsets, shape = torch.Size(chunk.offsets), chunk.tensor.shape
            kind = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(chunk.global_shape), [])
            tensors.setdefault(chunk.name, kind).chunks.append(ChunkStorageMetadata(offsets, shape))
            length = chunk.tensor.numel() * 4
            places[MetadataIndex(chunk.name, offsets)] = _StorageInfo(f"__{rank}_0.distcp", position, length)
            position += length
    metadata = Metadata(tensors, storage_data=places)
    watch = Stopwatch()
    data = watch.time("to_bytes_seconds", lambda: pickle.dumps(metadata))
    (folder / "metadata").write_bytes(data)
    return watch.results(size_mb=len(data) / 1e6)


def dcp_read(options: argparse.Namespace, layout: str, folder: Path) -> dict[str, float]:
    watch = Stopwatch()
    data = (folder / "metadata").read_bytes()
    metadata = watch.time("from_bytes_seconds", lambda: pickle.loads(data))  # our own file
    return watch.results(blocks=sum(len(each.chunks) for each in metadata.state_dict_metadata.values()))


PARTS = {part.__name__: part for part in (make, commit, load, dcp_write, dcp_read)}


def main() -> None:
    parser = benchmark.parser(__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--layouts", nargs="+", default=["fsdp", "fsdp-tensor", "uneven"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # part, layout, folder: what a child does
    options = parser.parse_args()
    if options.part:
        part, layout, folder = options.part
        print(json.dumps(PARTS[part](options, layout, Path(folder))))
        return
    if options.tiny:
        options.layers, options.ranks, options.layouts = 1, 8, ["fsdp-tensor"]
    benchmark.heading()
    for layout in options.layouts:
        with tempfile.TemporaryDirectory() as folder:
            for part in options.parts:
                command = [sys.executable, __file__, "--part", part, layout, folder]
                command += ["--layers", str(options.layers), "--ranks", str(options.ranks)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                for name, value in json.loads(done.stdout).items():
                    print(f"{layout:12} {part:10} {name:24} {value:>14,.3f}", flush=True)


if __name__ == "__main__":
    main()
