"""Reads compressed files. A damaged or truncated file is an error, as far as its format allows to detect the damage."""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from opt_parallel.runtime.errors import UserError, one_line

XZ_MEMORY = 1 << 30
ARROW = {".gz": "gzip", ".zst": "zstd"}
STREAMS: dict[str, Callable[[], Any]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY),
}
AT_ONCE = 1 << 16  # number of bytes that are read at a time
PACKED = (*ARROW, *STREAMS)
UNPACKED_SIZE = 4  # The estimated ratio of unpacked to packed size, for pieces of text and for progress bars.
MOST_TIMES = 200  # The maximum ratio of unpacked to packed size. Text has ratios of 3 to 15, and copies of a row 100.
ALWAYS_ALLOWED = 1 << 24  # An unpacked size in bytes that is allowed for any packed size.
DAMAGES = (OSError, EOFError, lzma.LZMAError)  # Errors when a damaged file is read; Arrow raises OSErrors.
# The last block of a bgzip file has these bytes. All blocks are separate gzip members, so a missing last block is the
# only sign of a file that was cut between two blocks.
BGZF_MARK, BGZF_END = b"BC\x02\x00", bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def ending_of(path: Path) -> tuple[str, str]:
    """The file name's endings for the format and for the compression, in lower case, or an empty text if missing."""
    name = path.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    return Path(name.removesuffix(packed)).suffix, packed


class Unbelievable(OSError):
    """The error for a file whose unpacked size is much larger than that of text, such as a decompression bomb."""


def opened(path: Path) -> BinaryIO:
    """Open a file to read its unpacked content. Reading raises one of `DAMAGES` if the file is damaged or a bomb."""
    packed = ending_of(path)[1]
    return io.BufferedReader(_Unpacked(path, packed), AT_ONCE) if packed else path.open("rb")


def check_complete(path: Path, where: str) -> None:
    """Unpack a compressed file, and raise UserError if it is damaged. The error message starts with `where`."""
    try:
        with opened(path) as file:
            while file.read(1 << 20):
                pass
    except DAMAGES as error:
        raise damaged(path, where, error) from error


def damaged(path: Path, where: str, error: Exception) -> UserError:
    """The UserError for a file that cannot be read. The error message starts with the text `where`."""
    if isinstance(error, Unbelievable):
        return unbelievable(where)
    packed = ending_of(path)[1]
    reason = f"is not a complete {packed} file" if packed else "cannot be read"
    return UserError(f"{where} {reason} ({one_line(error)}): replace it by a good copy, or leave the file out")


def believe(unpacked: int, packed: int) -> None:
    """Raise Unbelievable if `packed` bytes cannot plausibly unpack to `unpacked` bytes."""
    if unpacked > max(ALWAYS_ALLOWED, MOST_TIMES * packed):
        raise Unbelievable


def unbelievable(where: str) -> UserError:
    return UserError(
        f"{where} unpacks to over {MOST_TIMES} times its size, unlike text: leave the file out, or unpack it yourself "
        "if this size is correct"
    )


class _Unpacked(io.RawIOBase):
    """The unpacked content of a compressed file, which may consist of several members, frames or streams."""

    def __init__(self, path: Path, packed: str) -> None:
        if path.stat().st_size == 0:
            raise EOFError("the file is empty")
        if packed == ".gz":
            _check_last_block(path)
        self.size, self.file = 0, path.open("rb")
        if packed in STREAMS:
            self.stream: Any = _Streams(self.file, STREAMS[packed])
        else:
            import pyarrow  # because Python's gzip does not detect all damage, and Python has no zstd

            self.stream = pyarrow.input_stream(self.file, compression=ARROW[packed])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.stream.readinto(memoryview(buffer)[:AT_ONCE])
        self.size += count
        believe(self.size, self.file.tell())
        return count

    def close(self) -> None:
        self.stream.close()
        self.file.close()
        super().close()


class _Streams(io.RawIOBase):
    """A file of any number of compressed streams. Python's own readers ignore the data after a damaged stream."""

    def __init__(self, file: BinaryIO, decompressor: Callable[[], Any]) -> None:
        self.file, self.decompressor = file, decompressor
        self.blocks = self._blocks()
        self.left = b""

    def readinto(self, buffer: Any) -> int:
        self.left = self.left or next(self.blocks, b"")
        taken, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def _blocks(self) -> Iterator[bytes]:
        packed = self.file.read(AT_ONCE)
        while packed:
            stream = self.decompressor()
            while not stream.eof:
                if stream.needs_input and not packed and not (packed := self.file.read(AT_ONCE)):
                    raise EOFError("the file ends early")
                block, packed = stream.decompress(packed, AT_ONCE), b""
                if block:
                    yield block
            packed = stream.unused_data or self.file.read(AT_ONCE)


def _check_last_block(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(16)[12:] != BGZF_MARK:
            return
        file.seek(-min(len(BGZF_END), path.stat().st_size), io.SEEK_END)
        if file.read() != BGZF_END:
            raise EOFError("the last block is missing")
