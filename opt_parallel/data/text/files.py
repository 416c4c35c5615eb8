"""Reads records from files. The ending of a file's name determines its format and compression.

Several processes can read different pieces of a large file, and each process needs memory for one record or page at a
time. A piece of a file with lines contains the lines that start in the piece. A piece of a parquet file contains some
of its row groups. Any other file is one piece. If a record cannot be read, a reader yields a BadRecord and continues.
If a file is damaged, the reader raises an error.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from opt_parallel.config.model import require
from opt_parallel.data.ids import documents, formats
from opt_parallel.data.text.parquet import parquet_records, row_groups
from opt_parallel.data.text.records import BadRecord, Item, Record
from opt_parallel.data.text.tables import csv_records, tsv_records
from opt_parallel.data.text.unpacking import DAMAGES, PACKED, UNPACKED_SIZE, damaged, ending_of, opened
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import check_fetched

DOCUMENTS = (".md", ".py", ".rst", ".txt")  # Each file with these endings is one document.
JSON = (".jsonl", ".ndjson", ".jsonlines", ".json")  # Such a file has one object per line, or is one array.
TABLES = {".csv": csv_records, ".tsv": tsv_records}
PARQUET = ".parquet"
ENDINGS = (*DOCUMENTS, *JSON, *TABLES, PARQUET)
READ = f"{', '.join(ENDINGS)}, packed {', '.join(PACKED)}, and token ids in {', '.join(formats.ENDINGS)}"
PIECE_BYTES = 1 << 25
CHUNK = 1 << 20  # Number of bytes or characters that are read at a time.
LONGEST_LINE = 1 << 28  # Maximum bytes of a line or of an array's item, so that it fits the memory.
LONGEST_DOCUMENT = 1 << 31  # Maximum bytes of a file that is one document.
DEEPEST = 100  # Maximum number of nested brackets; thousands would exceed Python's recursion limit.
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Piece:
    """A piece of a file.

    `start` and `stop` are byte positions in a file of lines, numbers of row groups in a parquet file, and numbers of
    documents or ids in a file of ids. Any other file is one piece. `size` is the approximate number of bytes.
    `first_line` is the number of the first line that starts in the piece."""

    path: Path
    start: int
    stop: int
    size: int
    first_line: int = 1


@dataclass(frozen=True)
class Ids:
    """How token ids are read: the type of a file without header, and the id that ends a document.

    `table` maps the ids to those of the run's tokenizer, or is None if they are equal (`encode/numbering.py`)."""

    dtype: str | None = None
    end: int = -1
    table: np.ndarray | None = field(default=None, compare=False)


def shown(path: Path) -> str:
    """A path as text for messages, in which line breaks and invalid UTF-8 are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))


def pieces_of(path: Path, key: str, cut: bool, dtype: str | None = None) -> list[Piece]:
    """The pieces of a file, in order. Without `cut`, a file with lines is one piece. Raises: UserError.

    `dtype` is the type of a file of ids without header."""
    ending, packed = ending_of(path)
    where, size = f"{key}: {shown(path)}", path.stat().st_size
    if ending in formats.ENDINGS:
        return [Piece(path, *piece) for piece in documents.pieces_of(formats.open_ids(path, where, dtype))]
    check_fetched(path, where)
    require(ending != PARQUET or not packed, f"{where}: parquet has its own compression: unpack it")
    try:
        if ending == PARQUET:
            return [Piece(path, *group) for group in row_groups(path, where, PIECE_BYTES)]
        if packed or not cut or ending not in JSON or _is_array(path):
            return [Piece(path, 0, size, size * UNPACKED_SIZE if packed else size)]
    except DAMAGES as error:
        raise damaged(path, where, error) from error
    starts = range(0, max(size, 1), PIECE_BYTES)
    return [Piece(path, start, min(start + PIECE_BYTES, size), min(PIECE_BYTES, size - start)) for start in starts]


def check_document(size: int, where: str) -> None:
    """Raise UserError if a file that is one document is too large for memory."""
    require(
        size <= LONGEST_DOCUMENT,
        f"{where} is one document of over {LONGEST_DOCUMENT >> 30} GiB: split it into several files, or write a .jsonl",
    )


def numbered(piece: Piece) -> Piece:
    """The same piece with the number of its first line, for messages. The file is read up to the piece."""
    if ending_of(piece.path)[0] not in JSON or piece.start == 0:
        return piece
    lines, left = 0, piece.start - 1  # the piece starts after the first line break at or after this byte
    with piece.path.open("rb") as file:
        while left > 0:
            block = file.read(min(left, CHUNK))
            lines, left = lines + block.count(b"\n"), left - len(block)
    return replace(piece, first_line=lines + 2)


def records_of(piece: Piece, key: str, text_field: str, ids: Ids | None = None) -> Iterator[Item]:
    """The records of a piece of a file. A file that is one document becomes the record `{text_field: …}`, and so does
    each document of a file of ids.

    Raises: UserError, whose message names the file and the line."""
    ending, _ = ending_of(piece.path)
    where = f"{key}: {shown(piece.path)}"
    if ending in formats.ENDINGS:
        yield from _documents_of_ids(piece, where, text_field, ids or Ids())
        return
    try:
        if ending in JSON:
            yield from _array(piece, where) if _is_array(piece.path) else _json_lines(piece, where)
        elif ending in TABLES:
            with opened(piece.path) as file:
                yield from TABLES[ending](_decoded_lines(file, where), where)
        elif ending == PARQUET:
            yield from parquet_records(piece.path, piece.start, piece.stop, where)
        else:
            assert ending in DOCUMENTS, ending
            yield _document(piece, where, text_field)
    except DAMAGES as error:
        raise damaged(piece.path, where, error) from error


def _documents_of_ids(piece: Piece, where: str, text_field: str, ids: Ids) -> Iterator[Record]:
    file = formats.open_ids(piece.path, where, ids.dtype)
    for starts, stops in documents.documents(file, piece.start, piece.stop, ids.end):
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield Record(f"{where}, id {start:,}", {text_field: file.read(start, stop)})


def has_text(path: Path) -> bool:
    """Whether a file contains more than white space."""
    try:
        with opened(path) as file:
            return any(block.strip() for block in iter(lambda: file.read(CHUNK), b""))
    except DAMAGES:
        return True  # the damage is reported when the records are read


def _document(piece: Piece, where: str, text_field: str) -> Item:
    """The record of a file that is one document. All line breaks of the document become \\n."""
    blocks, size = [], 0
    with opened(piece.path) as file:
        while block := file.read(CHUNK):
            size += len(block)
            check_document(size, where)
            blocks.append(block)
    text = _decoded(b"".join(blocks), where)
    if isinstance(text, BadRecord):
        return text
    return Record(where, {text_field: text.replace("\r\n", "\n").replace("\r", "\n")})


def _lines(file: BinaryIO, where: str, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers. Raises: UserError if a line is longer than `LONGEST_LINE`."""
    number = first
    while line := file.readline(LONGEST_LINE + 1):
        require(
            len(line) <= LONGEST_LINE,
            f"{where}, line {number} is longer than {LONGEST_LINE >> 20} MiB: shorten or remove the line",
        )
        yield number, line
        number += 1


def _decoded_lines(file: BinaryIO, where: str) -> Iterator[tuple[str, BadRecord | None]]:
    """The lines of a table, each with its decoding error or None.

    A line with an error is yielded too, because it may be the end of a row."""
    for number, line in _lines(file, where):
        text = _decoded(line, f"{where}, line {number}")
        yield (line.decode(errors="replace"), text) if isinstance(text, BadRecord) else (text, None)


def _json_lines(piece: Piece, where: str) -> Iterator[Item]:
    """The records of a file with one JSON object per line. Blank lines are allowed only at the end."""
    with opened(piece.path) as file:
        position = piece.start
        if position:
            file.seek(position - 1)
            position += len(file.readline(LONGEST_LINE)) - 1
        packed = ending_of(piece.path)[1] != ""
        if not packed and position >= piece.stop:  # no line of the file starts in this piece
            return
        blank = None
        for number, line in _lines(file, where, piece.first_line):
            here, mine = f"{where}, line {number}", packed or position < piece.stop
            position += len(line)
            if not line.isspace():
                if blank is not None:
                    yield blank
                blank = None
                if mine:
                    yield _row(line, here)
            elif mine and blank is None:
                blank = BadRecord(f"{here} is blank: remove it")
            if blank is None and not packed and position >= piece.stop:
                return


def _row(line: bytes, where: str) -> Item:
    text = _decoded(line, where)
    if isinstance(text, BadRecord):
        return text
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        return BadRecord(f"{where} is not JSON ({reason}): each line must be an object, {{…}}")
    except (ValueError, RecursionError) as error:  # the line has a number of thousands of digits, or nested brackets
        return BadRecord(f"{where} cannot be read ({one_line(error)}): leave it out")
    brackets = text.count("{") + text.count("[")
    return _object(row, where, "each line must be an object, {…}", brackets)


def _object(row: Any, where: str, rule: str, brackets: int) -> Item:
    """The record of a JSON value `row`. The nesting depth of the value is at most the number of `brackets`."""
    if not isinstance(row, dict):
        return BadRecord(f"{where} is a {type(row).__name__}: {rule}")
    if brackets <= DEEPEST:
        return Record(where, row)
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = list(chain.from_iterable(map(_inside, level)))
        if not level:
            return Record(where, row)
    return BadRecord(f"{where} has more than {DEEPEST} nested brackets: leave it out")


def _inside(value: Any) -> list[Any]:
    """The lists and objects that are elements of a list or object."""
    return [each for each in (value.values() if isinstance(value, dict) else value) if isinstance(each, (list, dict))]


def _is_array(path: Path) -> bool:
    """Whether a file starts with the bracket of a JSON array."""
    with opened(path) as file:
        return file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(piece: Piece, where: str) -> Iterator[Item]:
    """The records of a file that is a JSON array. The objects are parsed one by one."""
    decoder, number, buffer, position = json.JSONDecoder(), 0, "", 0
    with io.TextIOWrapper(opened(piece.path), encoding="utf-8-sig", newline="") as file:

        def more() -> bool:
            nonlocal buffer, position
            size = len(buffer) - position
            require(
                size <= LONGEST_LINE,
                f"{where}, item {number + 1} is longer than {LONGEST_LINE >> 20} MiB: leave it out",
            )
            try:  # the buffer doubles, so that a long object is parsed only a few times
                chunk = file.read(max(CHUNK, size))
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 after item {number}: convert it or leave it out") from error
            buffer, position = buffer[position:] + chunk, 0
            return bool(chunk)

        def mark() -> str:
            """Move `position` to the next character that is not white space, and return this character.

            At the end of the file, the result is an empty string."""
            nonlocal position
            position = _after_space(buffer, position)
            while position == len(buffer) and more():
                position = _after_space(buffer, position)
            return buffer[position : position + 1]

        mark()
        position += 1  # skips the bracket
        while mark() != "]":
            here = f"{where}, item {number + 1}"
            try:
                row, end = decoder.raw_decode(buffer, position)
                end = _after_space(buffer, end)
            except json.JSONDecodeError:
                row, end = None, len(buffer)
            except (ValueError, RecursionError) as error:  # as in `_row`
                raise UserError(f"{here} cannot be read ({one_line(error)}): leave it out") from error
            if buffer[end : end + 1] not in (",", "]"):
                require(more(), f"{here} is not JSON, or the array does not end: correct it")
                continue
            number += 1
            brackets = buffer.count("{", position, end) + buffer.count("[", position, end)
            yield _object(row, here, "each item must be an object, {…}", brackets)
            position = end + (buffer[end] == ",")
        position += 1
        require(mark() == "", f"{where}: the file contains more text after the array: remove this text")


def _after_space(text: str, position: int) -> int:
    space = SPACE.match(text, position)
    assert space is not None
    return space.end()


def _decoded(text: bytes, where: str) -> str | BadRecord:
    """The text decoded from UTF-8 without its byte-order mark, or a BadRecord."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return BadRecord(f"{where} is not UTF-8 but UTF-16: convert it or leave it out")
    if b"\0" in text:  # a binary file, UTF-16 without a byte-order mark, or a file damaged by a crash
        return BadRecord(f"{where} contains a NUL byte, so it is not UTF-8 text: convert it or leave it out")
    try:
        return text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return BadRecord(
            f"{where} is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}): convert it or leave it out"
        )
