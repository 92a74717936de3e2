"""CRC64NVME, the checksum that S3 itself keeps for every object, over whole files and over units of them. No torch."""

import base64
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Self

import numpy as np
from awscrt.checksums import combine_crc64nvme, crc64nvme
from numpy.typing import NDArray

# Of one request, up or down; files begin a new part at each multiple of it.
PART_BYTES = 64 * 2**20
# A unit has one checksum: whoever reads some bytes of a file reads and checks whole units.
UNIT_BYTES = 256 * 2**10


@dataclass(frozen=True)
class FileChecksums:
    """Checksums of one file of `size` bytes: one CRC64NVME per unit of `unit_bytes`; the last unit may be shorter."""

    size: int
    unit_bytes: int
    unit_crcs: Sequence[int]

    @classmethod
    def from_text(cls, size: int, unit_bytes: int, unit_text: str) -> Self:
        """unit_text: as `list_to_text` writes it. ValueError if it is not, or of another number of units."""
        crcs = list_from_text(unit_text)
        if len(crcs) != num_units(size, unit_bytes):
            raise ValueError(f"{len(crcs)} unit checksums for {size} bytes in units of {unit_bytes}")
        return cls(size, unit_bytes, crcs)

    @property
    def crc(self) -> int:
        """CRC64NVME of the whole file, without reading it again."""
        if not self.unit_crcs:
            return 0
        last = len(self.unit_crcs) - 1
        whole_units = np.array(self.unit_crcs[:last], dtype=np.uint64)
        return combine_crc64nvme(
            _combine_equal(whole_units, self.unit_bytes), self.unit_crcs[last], self.unit_length(last)
        )

    def unit_length(self, index: int) -> int:
        return min(self.unit_bytes, self.size - index * self.unit_bytes)


def checksum(buffer: bytes | bytearray | memoryview, before: int = 0) -> int:
    """CRC64NVME of `buffer` as an unsigned 64-bit integer (about 11 GB/s); `before`: of the bytes that precede it."""
    return crc64nvme(buffer, before)  # pyright: ignore[reportArgumentType]  (any contiguous buffer works)


def checksum_units(buffer: bytes | memoryview, unit_bytes: int) -> FileChecksums:
    """The checksums of a file with these contents."""
    view = memoryview(buffer)
    crcs = (checksum(view[start : start + unit_bytes]) for start in range(0, len(view), unit_bytes))
    return FileChecksums(len(view), unit_bytes, tuple(crcs))


def _combine_equal(crcs: NDArray[np.uint64], length: int) -> int:
    """CRC64NVME of the concatenation of blocks of `length` bytes each. Pairs are joined, all at once, until few are
    left: a large checkpoint has millions, and joining two by a call from Python takes 0.7 µs.
    """
    while len(crcs) > 32:
        if len(crcs) % 2:
            # The checksum of nothing, in front, changes nothing.
            crcs = np.concatenate([np.zeros(1, np.uint64), crcs])
        crcs = _followed_by(crcs[0::2], length) ^ crcs[1::2]
        length *= 2
    return reduce(lambda total, crc: combine_crc64nvme(total, crc, length), crcs.tolist(), 0)


def _followed_by(crcs: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """What each contributes to the checksum of its block and `length` bytes more: linear in its bits."""
    tables = _tables(length)
    octets = np.ascontiguousarray(crcs, dtype="<u8").view(np.uint8).reshape(-1, 8)
    result = tables[0][octets[:, 0]]
    for index in range(1, 8):
        result ^= tables[index][octets[:, index]]
    return result


@lru_cache(maxsize=64)
def _tables(length: int) -> NDArray[np.uint64]:
    """`_followed_by` of each value of each of the eight bytes, the lowest first [8, 256]."""
    of_bits = [combine_crc64nvme(1 << bit, 0, length) for bit in range(64)]
    tables = np.zeros((8, 256), dtype=np.uint64)
    for bit, value in enumerate(of_bits):
        table, low = tables[bit // 8], 1 << bit % 8
        table[low : 2 * low] = table[:low] ^ np.uint64(value)
    return tables


def num_units(size: int, unit_bytes: int) -> int:
    """How many units (or parts) of `unit_bytes` a file of `size` bytes has."""
    return -(-size // unit_bytes)


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


def list_to_text(crcs: Sequence[int]) -> str:
    """Many checksums in one text: base64 of eight bytes each, most significant first."""
    return base64.b64encode(_big_endian(array("Q", crcs)).tobytes()).decode()


def list_from_text(text: str) -> "array[int]":
    """Inverse of `list_to_text`: 8 bytes in memory each. ValueError if `text` is not exactly that form."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is not base64") from error
    if len(raw) % 8 or base64.b64encode(raw).decode() != text:
        raise ValueError(f"{text[:40]!r} is not the base64 of a list of 8-byte numbers")
    return _big_endian(array("Q", raw))


def _big_endian(numbers: "array[int]") -> "array[int]":
    """Changed in place, from or to this machine's order of bytes."""
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers
