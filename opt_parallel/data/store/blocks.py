"""Checksums of a file's blocks, so that a reader can check some blocks without reading the whole file."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from zlib import crc32

BLOCK = 2**14  # bytes
DIGITS = 8  # hexadecimal digits of a CRC-32


def checksums_of(path: Path) -> str:
    """The concatenated checksums of all blocks of a file. The last block may be shorter."""
    with path.open("rb") as file:
        return "".join(f"{crc32(block):08x}" for block in iter(lambda: file.read(BLOCK), b""))


def first_wrong(read: bytes, checksums: str, first: int = 0) -> int | None:
    """The index of the first block in `read` that differs from its checksum, or None. `first`: the index of the block
    that `read` starts with."""
    for number in count(first):
        block = read[(number - first) * BLOCK : (number - first + 1) * BLOCK]
        if not block:
            return None
        if f"{crc32(block):08x}" != checksums[number * DIGITS : (number + 1) * DIGITS]:
            return number
    return None
