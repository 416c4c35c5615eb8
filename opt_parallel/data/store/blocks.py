"""Computes a checksum for each block of a file, so that a reader can check the blocks that it reads."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from zlib import crc32

BLOCK = 2**14  # Bytes of a block.
DIGITS = 8  # Number of hexadecimal digits of a block's checksum, a CRC-32.


def checksums_of(path: Path) -> str:
    """The concatenated checksums of all blocks of a file. The last block may be shorter."""
    with path.open("rb") as file:
        return "".join(f"{crc32(block):08x}" for block in iter(lambda: file.read(BLOCK), b""))


def first_wrong(read: bytes, checksums: str, first: int = 0) -> int | None:
    """The index of the first block in the bytes `read` that differs from its checksum, or None.

    The bytes start with block number `first` of the file."""
    for number in count(first):
        block = read[(number - first) * BLOCK : (number - first + 1) * BLOCK]
        if not block:
            return None
        if f"{crc32(block):08x}" != checksums[number * DIGITS : (number + 1) * DIGITS]:
            return number
    return None
