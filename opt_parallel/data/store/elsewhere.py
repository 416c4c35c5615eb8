"""Parts of a token store whose ids are in a file of the user's, from which they are read without a copy.

The part's folder has three columns: the first id of each document in the file (`starts`), its number of tokens in the
token store (`lengths`), and whether an end-of-text token follows the ids of the file (`ended`).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from opt_parallel.config.model import require
from opt_parallel.data.encode.columns import LENGTHS, Column
from opt_parallel.data.encode.numbering import mapped
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.atomic import beside

COLUMNS = {"starts": Column("uint64"), "lengths": LENGTHS, "ended": Column("uint8")}


@dataclass(frozen=True)
class Elsewhere:
    """The file that has the ids of a part, of NumPy's type `dtype` from byte `offset` on. The file has `size` bytes.

    `end` is the id of the end-of-text token in the token store. `table` is a file in the token store that maps the ids
    of the file to those of the store, or None if they are equal."""

    path: str
    dtype: str
    offset: int
    size: int
    end: int
    table: str | None = None


@dataclass(frozen=True)
class Spans:
    """Some consecutive documents of a part: the columns of `COLUMNS`, and the first token of each in the part."""

    starts: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    begins: np.ndarray


def check_file(elsewhere: Elsewhere) -> None:
    """Raise UserError if the file is missing, or has another size than when the token store was built."""
    try:
        size = os.stat(elsewhere.path).st_size
    except OSError as error:
        raise UserError(f"{elsewhere.path} cannot be read ({error.strerror}): restore the file of ids") from error
    require(
        size == elsewhere.size,
        f"{elsewhere.path} has {size:,} bytes, but had {elsewhere.size:,} when it was prepared: restore the file, or "
        "start again to read its new ids",
    )


def read_ids(folder: Path, elsewhere: Elsewhere, spans: Spans, first: int, last: int, below: int) -> np.ndarray:
    """The tokens `first` to `last` of a part, which the documents `spans` contain, as (last − first,) int64.

    Raises: UserError, also for an id that is not `below` this number."""
    found, ends = np.zeros(last - first, np.int64), []
    itemsize = np.dtype(elsewhere.dtype).itemsize
    try:
        with open(elsewhere.path, "rb") as file:
            columns = (spans.starts, spans.lengths, spans.ended, spans.begins)
            for start, length, ended, begin in zip(*(column.tolist() for column in columns), strict=True):
                low, high = max(first - begin, 0), min(last - begin, length)
                if ended and high == length:
                    high -= 1
                    ends.append(begin + high - first)
                size = (high - low) * itemsize
                read = os.pread(file.fileno(), size, elsewhere.offset + (start + low) * itemsize)
                require(len(read) == size, f"{elsewhere.path} ends early: restore the file")
                found[begin + low - first : begin + high - first] = np.frombuffer(read, elsewhere.dtype)
    except OSError as error:
        raise UserError(f"{elsewhere.path} cannot be read ({one_line(error)}): restore the file of ids") from error
    table = None if elsewhere.table is None else _table(folder / elsewhere.table)
    found = mapped(found, elsewhere.path, below, table)
    found[ends] = elsewhere.end
    return found


def write_table(folder: Path, table: np.ndarray | None) -> str | None:
    """Write a table into a token store, and return its name, which contains its checksum. Raises: OSError."""
    if table is None:
        return None
    name = f"table-{crc32(table.tobytes()):08x}.npy"
    if not (folder / name).exists():
        temporary = beside(folder / name)
        with temporary.open("wb") as file:
            np.save(file, table)
        temporary.replace(folder / name)
    return name


@functools.lru_cache(8)
def _table(path: Path) -> np.ndarray:
    """The table in a file. Raises: UserError if it is missing or damaged."""
    try:
        table = np.load(path, allow_pickle=False)
        if path.name != f"table-{crc32(table.tobytes()):08x}.npy":
            raise ValueError("it differs from its checksum")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): remove {path.parent}, and the next start builds it again"
        ) from error
    return table
