"""Small checkpoints for tests: random tensors, their blocks, and the path that ranks, agent and coordinator take."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest
import torch

from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.image import TORCH_DTYPES, ImageFile, plan_image, write_image
from raynium.checkpoint.format.manifest import ImageInfo, ShardEntry
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.storage.store import Store

SMALL_UNIT = 4096  # so that a test's tensors span many units

Cuts = tuple[tuple[int, ...], ...]  # per dim, where the blocks begin (0 first)


def random_tensor(dtype: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Any bit pattern of that type, NaNs and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    item_bytes = TORCH_DTYPES[dtype].itemsize
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (math.prod(shape) * item_bytes,), generator=generator)
    return raw.to(torch.uint8).view(TORCH_DTYPES[dtype]).reshape(tuple(shape)).clone()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))


def split(name: str, tensor: torch.Tensor, cuts: Cuts) -> list[Chunk]:
    """The grid of blocks that begin at `cuts`, as views of `tensor` (so loading into them fills it)."""
    spans = [list(itertools.pairwise((*starts, size))) for starts, size in zip(cuts, tensor.shape, strict=True)]
    return [
        Chunk(
            name=name,
            global_shape=tuple(tensor.shape),
            offsets=tuple(start for start, _ in place),
            tensor=tensor[tuple(slice(*span) for span in place)],
            saved_here=True,
        )
        for place in itertools.product(*spans)
    ]


def stage(folder: Path, rank: int, chunks: Sequence[Chunk], step: int) -> ImageInfo:
    """What a rank does: its image in memory, described for its agent."""
    plan = plan_image(chunks)
    with ImageFile(folder / f"rank-{rank}") as image:
        write_image(plan, chunks, image.reserve(plan.size), step=step)
    return ImageInfo.from_json(plan.info(step=step, path=image.path).to_json())


def upload_all(
    store: Store,
    per_rank: Sequence[Sequence[Chunk]],
    *,
    step: int = 7,
    generation: str = "g1",
    unit_bytes: int = SMALL_UNIT,
) -> list[ShardEntry]:
    with TemporaryDirectory() as folder:
        return [
            ShardEntry.from_json(
                upload_shard(
                    store,
                    stage(Path(folder), rank, chunks, step),
                    generation=generation,
                    rank=rank,
                    unit_bytes=unit_bytes,
                ).to_json()
            )
            for rank, chunks in enumerate(per_rank)
        ]


def commit(store: Store, entries: Sequence[ShardEntry], *, step: int = 7, generation: str = "g1") -> CheckpointRef:
    return commit_checkpoint(
        store,
        step=step,
        generation=generation,
        entries=entries,
        state={"step": step, "samples": 2**53, "name": "é"},
        world_size=len(entries),
        layout={"data": len(entries)},
    )


def save(store: Store, per_rank: Sequence[Sequence[Chunk]], **which: Any) -> CheckpointRef:
    unit_bytes = which.pop("unit_bytes", SMALL_UNIT)
    return commit(store, upload_all(store, per_rank, unit_bytes=unit_bytes, **which), **which)


def halves(name: str, tensor: torch.Tensor) -> list[list[Chunk]]:
    """Two ranks, each with half of the rows."""
    return [[chunk] for chunk in split(name, tensor, ((0, tensor.shape[0] // 2), *((0,),) * (tensor.dim() - 1)))]


def file_or_s3_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of the kind that the fixture's parameter names."""
    if request.param == "file":
        return Store(tmp_path / "run")
    server = request.getfixturevalue("s3_server")
    return Store(server.create_bucket(f"c-{uuid4().hex[:12]}") + "/run", options=server.options)


def rows_of(tensors: dict[str, torch.Tensor], rank: int, num_ranks: int) -> list[Chunk]:
    """A rank's share of the rows of every tensor, as FSDP cuts them: equal shares, of which the last may be cut off."""
    chunks = []
    for name, tensor in tensors.items():
        share = -(-len(tensor) // num_ranks)
        rows = tensor[rank * share : (rank + 1) * share]
        offsets = (min(rank * share, len(tensor)), *(0,) * (tensor.dim() - 1))
        chunks.append(Chunk(name, tuple(tensor.shape), offsets, rows, saved_here=True))
    return chunks


class CountingStore(Store):
    """Notes every read of a data file."""

    def __init__(self, url: str | Path, **options: Any):
        super().__init__(url, **options)
        self.reads: list[list[tuple[int, int]]] = []  # of each request its buffers: address, length

    def read_into(self, key: str, start: int, *buffers: memoryview) -> None:
        pointers = (torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffer in buffers)
        self.reads.append([(pointer, len(buffer)) for pointer, buffer in zip(pointers, buffers, strict=True)])
        super().read_into(key, start, *buffers)

    @property
    def num_bytes(self) -> int:
        return sum(length for buffers in self.reads for _, length in buffers)

    def bytes_into(self, tensors: Sequence[torch.Tensor]) -> int:
        """How many were read straight into these contiguous tensors' memory."""
        places = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        return sum(
            length
            for buffers in self.reads
            for address, length in buffers
            if any(begin <= address and address + length <= end for begin, end in places)
        )


def counted(ref: CheckpointRef) -> tuple[CountingStore, CheckpointRef]:
    store = CountingStore(ref.store.url)
    return store, CheckpointRef(store, ref.manifest)


def change(store: Store, key: str, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(store.read(key))
    edit(data)
    store.replace(key, bytes(data))


def flip(position: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(position, data[position] ^ 0x10)
