"""CRC64NVME, the checksum that S3 itself keeps for every object, over whole files and over their parts. No torch."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from awscrt.checksums import combine_crc64nvme, crc64nvme

PART_BYTES = 64 * 2**20  # unit of upload, checksum and verified read; parts are aligned from byte 0 of a file


@dataclass(frozen=True)
class FileChecksums:
    """Checksums of one file of `size` bytes: one CRC64NVME per part, and that of the whole (their combination)."""

    size: int
    part_bytes: int
    part_crcs: tuple[int, ...]

    @property
    def crc(self) -> int:
        """CRC64NVME of the whole file, without reading it again."""
        lengths = [part_length(self.size, self.part_bytes, index) for index in range(len(self.part_crcs))]
        return combine(self.part_crcs, lengths)


def checksum(buffer: bytes | bytearray | memoryview) -> int:
    """CRC64NVME of `buffer` as an unsigned 64-bit integer (about 11 GB/s)."""
    return crc64nvme(buffer)  # pyright: ignore[reportArgumentType]  (any contiguous buffer works)


def checksum_parts(buffer: bytes | memoryview, part_bytes: int) -> FileChecksums:
    """The checksums of a file with these contents."""
    view = memoryview(buffer)
    crcs = (checksum(view[start : start + part_bytes]) for start in range(0, len(view), part_bytes))
    return FileChecksums(len(view), part_bytes, tuple(crcs))


def combine(crcs: Sequence[int], lengths: Sequence[int]) -> int:
    """CRC64NVME of the concatenation of blocks with these checksums and lengths in bytes; 0 for no block."""
    pairs = zip(crcs, lengths, strict=True)
    return reduce(lambda total, pair: combine_crc64nvme(total, pair[0], pair[1]), pairs, 0)


def num_parts(size: int, part_bytes: int) -> int:
    """How many parts a file of `size` bytes has."""
    return -(-size // part_bytes)


def part_length(size: int, part_bytes: int, index: int) -> int:
    """Bytes in part `index` of a file of `size` bytes: all are `part_bytes` long but the last."""
    return min(part_bytes, size - index * part_bytes)


def to_text(crc: int) -> str:
    """The form S3 uses in its headers: base64 of the eight bytes, most significant first."""
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def from_text(text: str) -> int:
    """Inverse of `to_text`. ValueError if `text` is not exactly that form."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{text!r} is not base64") from error
    if len(raw) != 8 or to_text(int.from_bytes(raw, "big")) != text:
        raise ValueError(f"{text!r} is not the base64 of 8 bytes")
    return int.from_bytes(raw, "big")
