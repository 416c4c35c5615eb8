"""Records out of files: what they are by their endings, compressed or not, in pieces that are read apart.

A piece of lines owns the lines that begin in it, a piece of a parquet file some of its row groups; any other file is a
piece. So several processes read one file, and none holds more of it than a record or a page.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from opt_parallel.data.encoding import Record
from opt_parallel.errors import UserError, one_line
from opt_parallel.shapes import require

PLAIN = (".md", ".py", ".rst", ".txt")  # a file is a document, as any file whose ending is not known
LINES = (".jsonl", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
ENDINGS = (*PLAIN, *LINES, *TABLES, PARQUET)
PACKED = (".gz", ".bz2", ".xz", ".zst")
UNPACKED_SIZE = 4  # times the packed one, about: for the choice of units, and progress
PIECE_BYTES = 1 << 25
CHUNK = 1 << 20  # characters of a json array read at a time
ROWS_READ = 256  # of a parquet file at a time
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Piece:
    """A stretch of a file: bytes `start` to `stop` of lines, row groups of a parquet file, else all of it.

    `size`: its bytes, about. `first_line`: the number of the line after byte `start`."""

    path: Path
    start: int
    stop: int
    size: int
    first_line: int = 1


def ending_of(path: Path) -> tuple[str, str]:
    """The ending that says what `path` holds, and that of its compression or ""."""
    packed = path.suffix if path.suffix in PACKED else ""
    return (Path(path.stem).suffix if packed else path.suffix), packed


def pieces_of(path: Path, key: str, cut: bool) -> list[Piece]:
    """The pieces of a file, in order; one if not `cut` and it need not be. Raises: UserError."""
    ending, packed = ending_of(path)
    size = path.stat().st_size
    if ending == PARQUET and not packed:
        return _row_groups(path, key)
    if packed or not cut or ending not in LINES or _is_array(path):
        return [Piece(path, 0, size, size * UNPACKED_SIZE if packed else size)]
    starts = range(0, max(size, 1), PIECE_BYTES)
    return [Piece(path, start, min(start + PIECE_BYTES, size), min(PIECE_BYTES, size - start)) for start in starts]


def numbered(piece: Piece) -> Piece:
    """The same piece with the number of its first line, for messages: finding it reads all that is before."""
    if ending_of(piece.path)[0] not in LINES or piece.start == 0:
        return piece
    lines, left = 0, piece.start - 1  # the piece begins behind the first line end from there on
    with piece.path.open("rb") as file:
        while left > 0:
            block = file.read(min(left, CHUNK))
            lines, left = lines + block.count(b"\n"), left - len(block)
    return replace(piece, first_line=lines + 2)


def records_of(piece: Piece, key: str, text_field: str) -> Iterator[Record]:
    """The records of a piece; a file that is one document as `{text_field: …}`.

    Raises: UserError that names file and line. What cannot be read is the file's fault, whoever opens it."""
    ending, packed = ending_of(piece.path)
    where = f"{key}: {piece.path}"
    require(ending != PARQUET or not packed, f"{where}: parquet is compressed within: unpack it")
    try:
        if ending in LINES:
            yield from _array(piece, where) if _is_array(piece.path) else _lines(piece, where)
        elif ending in TABLES:
            yield from _table(piece, where, TABLES[ending])
        elif ending == PARQUET:
            yield from _parquet(piece, where)
        else:
            yield from _document(piece, where, text_field)
    except _damages() as error:
        reason = f"is no whole {packed} file" if packed else "cannot be read"
        raise UserError(f"{where} {reason} ({one_line(error)}): bring a good copy or leave it out") from error


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked. Raises: UserError if a library is missing."""
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    packed = ending_of(path)[1]
    if packed == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} needs zstandard to be unpacked: pip install zstandard") from error
        return cast(BinaryIO, io.BufferedReader(zstandard.open(path, "rb")))
    return cast(BinaryIO, openers[packed](path)) if packed else path.open("rb")


def has_text(path: Path) -> bool:
    """Whether there is anything but white space in a file."""
    try:
        with opened(path) as file:
            return any(line.strip() for line in file)
    except _damages():
        return True  # reading it will say what is wrong


def _damages() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    zstandard = sys.modules.get("zstandard")
    return (OSError, EOFError, lzma.LZMAError, zlib.error, *([zstandard.ZstdError] if zstandard else []))


def _document(piece: Piece, where: str, text_field: str) -> Iterator[Record]:
    with opened(piece.path) as file:
        yield Record(where, {text_field: _decoded(file.read(), where)})


def _lines(piece: Piece, where: str) -> Iterator[Record]:
    """A record a line. A blank line is fine only if nothing follows it."""
    with opened(piece.path) as file:
        place = piece.start
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        packed = ending_of(piece.path)[1] != ""
        number = piece.first_line - 1
        while packed or place < piece.stop:
            line = file.readline()
            if not line:
                return
            place, number = place + len(line), number + 1
            here = f"{where}, line {number}"
            if line.isspace():
                require(not any(map(bytes.strip, file)), f"{here} is blank: remove it")
                return
            row = _parsed(_decoded(line, here), here)
            require(isinstance(row, dict), f"{here} is a {type(row).__name__}: each line must be an object, {{…}}")
            yield Record(here, row)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where} is not JSON ({reason}): each line must be an object, {{…}}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{where} cannot be read ({one_line(error)}): leave it out") from error


def _is_array(path: Path) -> bool:
    """Whether a file begins as a json array does."""
    with opened(path) as file:
        return file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(piece: Piece, where: str) -> Iterator[Record]:
    """The objects of an array, each parsed as soon as it is there."""
    decoder, number, buffer, place = json.JSONDecoder(), 0, "", 0
    with io.TextIOWrapper(opened(piece.path), encoding="utf-8-sig", newline="") as file:

        def more() -> bool:
            nonlocal buffer, place
            try:  # doubling, so that a long object is not parsed often
                chunk = file.read(max(CHUNK, len(buffer) - place))
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 after item {number}: convert it or leave it out") from error
            buffer, place = buffer[place:] + chunk, 0
            return bool(chunk)

        def mark() -> str:
            """The next character that is no white space, which `place` is at; "" at the end."""
            nonlocal place
            place = _behind_space(buffer, place)
            while place == len(buffer) and more():
                place = _behind_space(buffer, place)
            return buffer[place : place + 1]

        mark()
        place += 1  # the bracket
        while mark() != "]":
            here = f"{where}, item {number + 1}"
            try:
                row, end = decoder.raw_decode(buffer, place)
                end = _behind_space(buffer, end)
            except json.JSONDecodeError:
                row, end = None, len(buffer)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
                raise UserError(f"{here} cannot be read ({one_line(error)}): leave it out") from error
            if buffer[end : end + 1] not in (",", "]"):
                require(more(), f"{here} is not JSON, or the array does not end: mend it")
                continue
            number += 1
            require(isinstance(row, dict), f"{here} is a {type(row).__name__}: each must be an object, {{…}}")
            yield Record(here, row)
            place = end + (buffer[end] == ",")
        place += 1
        require(mark() == "", f"{where}: something follows the array: remove it")


def _behind_space(text: str, place: int) -> int:
    space = SPACE.match(text, place)
    assert space is not None
    return space.end()


def _table(piece: Piece, where: str, delimiter: str) -> Iterator[Record]:
    """A record a row, by the names in the first."""
    csv.field_size_limit(sys.maxsize)
    with opened(piece.path) as file:
        lines = (_decoded(line, f"{where}, line {number}") for number, line in enumerate(file, start=1))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            require(len(set(names)) == len(names), f"{where}, line 1: a column's name stands there twice: {names}")
            for row in rows:
                if not row:
                    continue
                here = f"{where}, line {rows.line_num}"
                require(len(row) == len(names), f"{here} has {len(row)} columns, the first line {len(names)}: mend it")
                yield Record(here, dict(zip(names, row, strict=True)))
        except csv.Error as error:
            raise UserError(f"{where}, line {rows.line_num} is not as it should be ({error}): mend it") from error


def _row_groups(path: Path, key: str) -> list[Piece]:
    groups = _parquet_file(path, f"{key}: {path}").metadata
    pieces, start, size = [], 0, 0
    for number in range(groups.num_row_groups):
        size += groups.row_group(number).total_byte_size
        if size >= PIECE_BYTES or number == groups.num_row_groups - 1:
            pieces.append(Piece(path, start, number + 1, size))
            start, size = number + 1, 0
    return pieces


def _parquet(piece: Piece, where: str) -> Iterator[Record]:
    file = _parquet_file(piece.path, where)
    groups = range(piece.start, piece.stop)
    number = sum(file.metadata.row_group(before).num_rows for before in range(piece.start))
    import pyarrow

    try:
        for batch in file.iter_batches(ROWS_READ, row_groups=list(groups), use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{where}, row {number}", row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{where}, after row {number} cannot be read ({one_line(error)}): mend it") from error


def _parquet_file(path: Path, where: str) -> Any:
    import pyarrow.parquet  # takes half a second

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} is no parquet file ({one_line(error)}): bring a good copy or leave it out") from error


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}): convert it or leave it out"
        ) from error
