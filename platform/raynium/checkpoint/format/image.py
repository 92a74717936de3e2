"""A rank's file image: the state laid out in shared memory exactly as the safetensors file it will become. Needs torch.

A *save* takes a *snapshot*, which is an *image* of each rank in its node's memory. Uploaded, an image is a *shard*, and
all shards of a step, once committed, are a *checkpoint*.

plan = plan_image(chunks)                    once; the state's shapes do not change
buffer = image_file.reserve(plan.size)       once: memory is taken and touched here, not while training waits
write_image(plan, chunks, buffer, step=…)    per save: one copy, device → image
send(plan.info(step=step, path=...))         to the node agent, which uploads the file as it is
read_image(info, chunks)                     after a restart, back into the state
"""

import errno
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from raynium.checkpoint.format.image_header import check_header
from raynium.checkpoint.format.manifest import ALIGNMENT_BYTES, DTYPES, ImageInfo, SavedBlock, SavedBlocks
from raynium.checkpoint.state import Chunk
from raynium.errors import CheckpointDamaged, CheckpointError, SnapshotMemoryShort
from raynium.storage.checksum import UNIT_BYTES

TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Of data. Then a header of one unit is at most 2 % of the file.
_LARGE_BYTES = 64 * UNIT_BYTES
# Stands for the step's digits in a header, so that its length never changes.
_STEP_PLACE = b"9" * 18


@dataclass(frozen=True)
class ImagePlan:
    """Where each block goes. size: bytes of the whole file.

    header: the file's begin, up to the first tensor byte, with _STEP_PLACE in the step's place.
    """

    size: int
    header: bytes
    tensors: tuple[SavedBlock, ...]

    @cached_property
    def _saved(self) -> SavedBlocks:
        return SavedBlocks.of(self.tensors)

    def header_of(self, step: int) -> bytes:
        return self.header.replace(_STEP_PLACE, b"%0*d" % (len(_STEP_PLACE), step), 1)

    def info(self, *, step: int, path: str | Path, stall_seconds: float = 0.0) -> ImageInfo:
        """What the rank tells its agent once `write_image` has returned."""
        return ImageInfo(step=step, path=str(path), size=self.size, tensors=self._saved, stall_seconds=stall_seconds)


def plan_image(chunks: Sequence[Chunk], *, of: Literal["saved", "replicas"] = "saved") -> ImagePlan:
    """Lay out the blocks that this rank saves (`saved_here`). Every rank calls it with its own chunks, without talking.

    Blocks without elements are left out, except those of a tensor that has none at all. of: "replicas" lays out the
    other blocks, those that some other rank saves.
    """
    mine = [chunk for chunk in chunks if chunk.saved_here == (of == "saved")]
    saved = [chunk for chunk in mine if chunk.tensor.numel() or 0 in chunk.global_shape]
    # Widest elements first keeps all of them aligned without gaps, which safetensors forbids; then the largest first,
    # so that the first parts of the file are complete soonest
    saved.sort(key=lambda chunk: (-chunk.tensor.element_size(), -chunk.tensor.numel(), chunk.name, chunk.offsets))
    entries: dict[str, dict[str, object]] = {"__metadata__": {"step": _STEP_PLACE.decode()}}
    blocks: list[SavedBlock] = []
    position = 0
    for chunk in saved:
        dtype, offsets, shape = dtype_name(chunk.tensor, chunk.name), tuple(chunk.offsets), tuple(chunk.tensor.shape)
        # One file may hold several blocks of one tensor.
        key = f"{chunk.name}@{','.join(map(str, offsets))}"
        assert key not in entries, f"{key} is saved twice by one rank"
        blocks.append(SavedBlock(chunk.name, dtype, tuple(chunk.global_shape), offsets, shape, position))
        entries[key] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [position, blocks[-1].end]}
        position = blocks[-1].end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # In a large file tensors begin with a unit of checksums, so that even shares of them end with one too: a reader of
    # such a share reads hardly more
    alignment = UNIT_BYTES if position >= _LARGE_BYTES else ALIGNMENT_BYTES
    header_bytes = -(-(8 + len(text)) // alignment) * alignment
    header = (header_bytes - 8).to_bytes(8, "little") + text.ljust(header_bytes - 8)
    tensors = tuple(replace(block, begin=header_bytes + block.begin) for block in blocks)
    return ImagePlan(size=header_bytes + position, header=header, tensors=tensors)


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The dtype as manifests write it. CheckpointError for one that they cannot hold."""
    if tensor.dtype not in _NAMES:
        raise CheckpointError(
            f"{name} is {tensor.dtype}, which checkpoints cannot hold: use one of {', '.join(DTYPES)}"
        )
    return _NAMES[tensor.dtype]


@torch.no_grad()
def write_image(plan: ImagePlan, chunks: Sequence[Chunk], buffer: memoryview, *, step: int) -> None:
    """Copy the state into `buffer` (plan.size writable bytes): the only time that training waits for a save.

    `chunks` are those that were planned, with the tensors of now; shapes and dtypes must be the same. The header is
    written last: if this process dies in here, what is left is no image.
    """
    assert len(buffer) == plan.size, f"a buffer of {len(buffer)} bytes for an image of {plan.size}"
    sources = {(chunk.name, tuple(chunk.offsets)): chunk.tensor for chunk in chunks}
    buffer[:8] = bytes(8)
    for block in plan.tensors:
        source = sources[block.name, block.offsets]
        assert tuple(source.shape) == block.shape, f"{block.name} is {tuple(source.shape)}, planned as {block.shape}"
        assert source.dtype is TORCH_DTYPES[block.dtype], f"{block.name} is {source.dtype}, planned as {block.dtype}"
        if block.end > block.begin:
            place = torch.frombuffer(buffer, dtype=source.dtype, count=source.numel(), offset=block.begin)
            place.view(block.shape).copy_(source.detach())
    buffer[: len(plan.header)] = plan.header_of(step)


@torch.no_grad()
def read_image(info: ImageInfo, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Copy back into `chunks` what the image at info.path holds of them; returns those that it does not hold.

    CheckpointDamaged if the file is gone, was being written when its writer died, or is of another step.
    """
    try:
        # Writable, because torch's views of memory are.
        with open(info.path, "r+b") as file:
            pages = mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError) as error:
        raise CheckpointDamaged(f"the snapshot {info.path} cannot be read: {error}") from error
    check_header(info, memoryview(pages))
    blocks = {(block.name, block.offsets): block for block in info.tensors.rows()}
    left: list[Chunk] = []
    for chunk in chunks:
        block = blocks.get((chunk.name, tuple(chunk.offsets)))
        if block is None:
            if chunk.tensor.numel():
                left.append(chunk)
        elif block.end > block.begin:
            source = torch.frombuffer(pages, dtype=chunk.tensor.dtype, count=chunk.tensor.numel(), offset=block.begin)
            chunk.tensor.detach().copy_(source.view(block.shape))
    return left


class ImageFile:
    """A file in shared memory (/dev/shm) that outlives the process that writes it, until `unlink`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._pages: mmap.mmap | None = None

    def reserve(self, size: int) -> memoryview:
        """`size` bytes of it, writable, with every page already there; the same memory again for the same size.

        CheckpointError if there is not enough shared memory. Views of another size must not be used any more.
        """
        assert size > 0
        if self._pages is None or len(self._pages) != size:
            self.close()
            self._pages = self._map(size)
        return memoryview(self._pages)

    def _map(self, size: int) -> mmap.mmap:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CheckpointError(f"cannot open the snapshot memory {self.path}: {error.strerror}") from error
        try:
            missing = size - os.fstat(descriptor).st_blocks * 512
            free = _free_bytes(self.path)
            # Asked first, because a full tmpfs kills the process that touches a page it cannot have.
            if missing > free:
                raise SnapshotMemoryShort(self._too_small(size, free))
            os.ftruncate(descriptor, size)
            os.posix_fallocate(descriptor, 0, size)
            # Populated now: page faults on first use would make the copy four to five times slower
            return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SnapshotMemoryShort(self._too_small(size, _free_bytes(self.path))) from error
            raise CheckpointError(f"cannot reserve {size:,} bytes at {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _too_small(self, size: int, free: int) -> str:
        return (
            f"a snapshot needs {size:,} bytes at {self.path} and {free:,} are free there: enlarge shared memory "
            f"(mount -o remount,size=… {self.path.parent}; for containers --shm-size) or use more ranks"
        )

    def close(self) -> None:
        """Let go of the memory; it is unmapped once no view refers to it. The file stays."""
        self._pages = None

    def unlink(self) -> None:
        """Give the memory back, once nobody reads the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def _free_bytes(path: Path) -> int:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize
