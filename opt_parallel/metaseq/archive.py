"""Finds the records in a file that `torch.save` wrote: a zip archive whose records are stored without compression."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from opt_parallel.metaseq.pickled import MOST_BYTES, read_pickle
from opt_parallel.runtime.errors import UserError, one_line

ZIP = b"PK\x03\x04"  # The first bytes of an archive, and of each record's header.
CHUNK = 1 << 20  # Number of bytes that are read at a time.
HEADER = 30  # Number of bytes of a record's header before its name.
MOST_DIRECTORY = 1 << 26  # Maximum bytes of the list of records, which has about 100 bytes a record.


@dataclass(frozen=True)
class Record:
    """A record of an archive: the position of its header, its number of bytes, and the CRC-32 of its content."""

    header: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """The records of a file by name, without the name of the folder that contains them all, and its pickled object."""

    path: Path
    records: dict[str, Record]
    content: object


class _Limited(io.FileIO):
    """A file that refuses to read many bytes at a time, because the archive itself says how long its list is."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = MOST_DIRECTORY + 1 if size is None or size < 0 else size
        content = super().read(min(limit, MOST_DIRECTORY + 1)) or b""
        if len(content) > MOST_DIRECTORY:
            raise ValueError(f"the list of records is larger than {MOST_DIRECTORY:,} bytes")
        return content


def open_archive(path: Path) -> Archive:
    """The records and the object of a file that `torch.save` wrote. No code of the file is run.

    Raises: UserError if the file is truncated, compressed, not an archive, or too large to describe tensors."""
    try:
        with _Limited(path) as file:
            start = file.read(len(ZIP))
            if start != ZIP and start[:1] in (b"\x80", b""):
                raise UserError(_no_archive(path, start))
            return _read(path, file, path.stat().st_size)
    except UserError:
        raise
    except Exception as error:  # zipfile and the unpickler raise errors of many types
        raise UserError(
            f"{path} is damaged, truncated or not a checkpoint ({one_line(error):.200}): use a complete copy"
        ) from error


def _no_archive(path: Path, start: bytes) -> str:
    if not start:
        return f"{path} is empty: use a complete copy"
    return (
        f"{path} is in the format of torch before 1.6, of which no slices can be read: load it with "
        "torch.load(…, weights_only=True) in a current torch, and write it again with torch.save"
    )


def _read(path: Path, file: BinaryIO, size: int) -> Archive:
    with zipfile.ZipFile(file) as archive:
        listed = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED for each in listed):
            raise ValueError("a record is compressed")
        total = sum(max(each.file_size, each.compress_size) for each in listed)
        if total > size:
            raise ValueError("the records are larger than the file")
        if any(each.header_offset + HEADER + each.file_size > size for each in listed):
            raise ValueError("a record ends after the file")
        (pickle,) = [each for each in listed if each.filename.endswith("/data.pkl") and each.filename.count("/") == 1]
        folder = pickle.filename.removesuffix("data.pkl")
        names = [each.filename.removeprefix(folder) for each in listed]
        if len(set(names)) != len(names):
            raise ValueError("a record occurs twice")
        if pickle.file_size > MOST_BYTES:
            raise ValueError(f"its pickle is larger than {MOST_BYTES:,} bytes")
        if "byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its values are in big-endian order")
        content = _object(archive.read(pickle))
    records = {
        name: Record(each.header_offset, each.file_size, each.CRC) for name, each in zip(names, listed, strict=True)
    }
    return Archive(path, records, content)


def wrong_records(path: Path) -> list[str]:
    """The names of the records whose content does not have the checksum that the file stores with it.

    The complete file is read. Raises: UserError as `open_archive`, or if the file cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return [name for name, record in open_archive(path).records.items() if _crc(file, record) != record.crc]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error):.200}): use a complete copy") from error


def _crc(file: io.FileIO, record: Record) -> int:
    file.seek(record.header)
    file.seek(record.header + start_of(file.read(HEADER)))
    crc, left = 0, record.size
    while left and (content := file.read(min(left, CHUNK))):
        crc, left = crc32(content, crc), left - len(content)
    return crc


@lru_cache(maxsize=8)
def _object(pickle: bytes) -> object:
    """The object in a pickle. Pickles of shards are often equal, and reading one takes 20 ms for OPT-175B."""
    return read_pickle(pickle)


def start_of(header: bytes) -> int:
    """The number of bytes from the start of a record's header to its content. Raises: ValueError."""
    if len(header) < HEADER or header[: len(ZIP)] != ZIP:
        raise ValueError("a record has no header")
    name, extra = struct.unpack("<HH", header[26:HEADER])
    return HEADER + int(name) + int(extra)
