"""Checksums of a file's blocks: what is read of it can be compared without reading the rest."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from zlib import crc32

BLOCK = 2**14  # bytes
DIGITS = 8  # of a checksum, CRC-32 in hexadecimal


def checksums_of(path: Path) -> str:
    """The checksums of all blocks of a file, one after another; the last block may be shorter."""
    with path.open("rb") as file:
        return "".join(f"{crc32(block):08x}" for block in iter(lambda: file.read(BLOCK), b""))


def first_wrong(read: bytes, checksums: str, first: int = 0) -> int | None:
    """The number of the first block of those in `read`, the first of which has the number `first`, that differs from
    its checksum; None if none does."""
    for number in count(first):
        block = read[(number - first) * BLOCK : (number - first + 1) * BLOCK]
        if not block:
            return None
        if f"{crc32(block):08x}" != checksums[number * DIGITS : (number + 1) * DIGITS]:
            return number
    return None
