"""Records out of files: what they are by their endings, compressed or not, in pieces that are read apart.

A piece of lines owns the lines that begin in it, a piece of a parquet file some of its row groups; any other file is a
piece. So several processes read one file, and none holds more of it than a record or a page. Readers yield a BadRecord
for what cannot be read and go on behind it; what is wrong with a file as a whole they raise.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from opt_parallel.config.model import require
from opt_parallel.data.text.parquet import parquet_records, row_groups
from opt_parallel.data.text.records import BadRecord, Item, Record
from opt_parallel.data.text.tables import csv_records, tsv_records
from opt_parallel.data.text.unpacking import DAMAGES, PACKED, UNPACKED_SIZE, damaged, ending_of, opened
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import check_fetched

PLAIN = (".md", ".py", ".rst", ".txt")  # a file is a document
LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
TABLES = {".csv": csv_records, ".tsv": tsv_records}
PARQUET = ".parquet"
ENDINGS = (*PLAIN, *LINES, *TABLES, PARQUET)
READ = f"{', '.join(ENDINGS)}, and packed {', '.join(PACKED)}"
PIECE_BYTES = 1 << 25
CHUNK = 1 << 20  # characters of a json array read at a time
LONGEST_LINE = 1 << 28  # bytes of a line or of an array's item, so that none fills the memory
LONGEST_DOCUMENT = 1 << 31  # bytes of a file that is one document
DEEPEST = 100  # brackets within brackets: thousands make json, and whoever walks through a record, fail
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


def shown(path: Path) -> str:
    """A path in one line: line breaks and bytes that are no UTF-8 as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))


def pieces_of(path: Path, key: str, cut: bool) -> list[Piece]:
    """The pieces of a file, in order; one if not `cut` and it need not be. Raises: UserError."""
    ending, packed = ending_of(path)
    where, size = f"{key}: {shown(path)}", path.stat().st_size
    check_fetched(path, where)
    require(ending != PARQUET or not packed, f"{where}: parquet is compressed within: unpack it")
    try:
        if ending == PARQUET:
            return [Piece(path, *group) for group in row_groups(path, where, PIECE_BYTES)]
        if packed or not cut or ending not in LINES or _is_array(path):
            return [Piece(path, 0, size, size * UNPACKED_SIZE if packed else size)]
    except DAMAGES as error:
        raise damaged(path, where, error) from error
    starts = range(0, max(size, 1), PIECE_BYTES)
    return [Piece(path, start, min(start + PIECE_BYTES, size), min(PIECE_BYTES, size - start)) for start in starts]


def check_document(size: int, where: str) -> None:
    """Raise UserError if a file that is one document would fill the memory."""
    require(
        size <= LONGEST_DOCUMENT,
        f"{where} is one document of over {LONGEST_DOCUMENT >> 30} GiB: cut it into several files, or write a .jsonl",
    )


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


def records_of(piece: Piece, key: str, text_field: str) -> Iterator[Item]:
    """The records of a piece; a file that is one document as `{text_field: …}`.

    Raises: UserError that names file and line. What cannot be read is the file's fault, whoever opens it."""
    ending, _ = ending_of(piece.path)
    where = f"{key}: {shown(piece.path)}"
    try:
        if ending in LINES:
            yield from _array(piece, where) if _is_array(piece.path) else _json_lines(piece, where)
        elif ending in TABLES:
            with opened(piece.path) as file:
                yield from TABLES[ending](_decoded_lines(file, where), where)
        elif ending == PARQUET:
            yield from parquet_records(piece.path, piece.start, piece.stop, where)
        else:
            yield _document(piece, where, text_field)
    except DAMAGES as error:
        raise damaged(piece.path, where, error) from error


def has_text(path: Path) -> bool:
    """Whether there is anything but white space in a file."""
    try:
        with opened(path) as file:
            return any(block.strip() for block in iter(lambda: file.read(CHUNK), b""))
    except DAMAGES:
        return True  # reading it will say what is wrong


def _document(piece: Piece, where: str, text_field: str) -> Item:
    """A whole file; line ends as Python's text files have them."""
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
    """Lines with their numbers. Raises: UserError for one that would fill the memory."""
    number = first
    while line := file.readline(LONGEST_LINE + 1):
        require(
            len(line) <= LONGEST_LINE,
            f"{where}, line {number} is longer than {LONGEST_LINE >> 20} MiB: write a record a line, or leave it out",
        )
        yield number, line
        number += 1


def _decoded_lines(file: BinaryIO, where: str) -> Iterator[tuple[str, BadRecord | None]]:
    """Lines of a table: what is wrong with one does not hide where its row ends."""
    for number, line in _lines(file, where):
        text = _decoded(line, f"{where}, line {number}")
        yield (line.decode(errors="replace"), text) if isinstance(text, BadRecord) else (text, None)


def _json_lines(piece: Piece, where: str) -> Iterator[Item]:
    """A record a line. A blank line is fine only if nothing follows it."""
    with opened(piece.path) as file:
        position = piece.start
        if position:
            file.seek(position - 1)
            position += len(file.readline(LONGEST_LINE)) - 1
        packed = ending_of(piece.path)[1] != ""
        if not packed and position >= piece.stop:  # one line spans the piece
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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        return BadRecord(f"{where} cannot be read ({one_line(error)}): leave it out")
    brackets = text.count("{") + text.count("[")
    return _object(row, where, "each line must be an object, {…}", brackets)


def _object(row: Any, where: str, rule: str, brackets: int) -> Item:
    """The record of a parsed object in which there are no more than so many brackets."""
    if not isinstance(row, dict):
        return BadRecord(f"{where} is a {type(row).__name__}: {rule}")
    if brackets <= DEEPEST:
        return Record(where, row)
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = list(chain.from_iterable(map(_inside, level)))
        if not level:
            return Record(where, row)
    return BadRecord(f"{where} has over {DEEPEST} brackets within each other: leave it out")


def _inside(value: Any) -> list[Any]:
    """The lists and objects directly within one."""
    return [each for each in (value.values() if isinstance(value, dict) else value) if isinstance(each, (list, dict))]


def _is_array(path: Path) -> bool:
    """Whether a file begins as a json array does."""
    with opened(path) as file:
        return file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(piece: Piece, where: str) -> Iterator[Item]:
    """The objects of an array, each parsed as soon as it is there."""
    decoder, number, buffer, place = json.JSONDecoder(), 0, "", 0
    with io.TextIOWrapper(opened(piece.path), encoding="utf-8-sig", newline="") as file:

        def more() -> bool:
            nonlocal buffer, place
            size = len(buffer) - place
            require(
                size <= LONGEST_LINE,
                f"{where}, item {number + 1} is longer than {LONGEST_LINE >> 20} MiB: leave it out",
            )
            try:  # doubling, so that a long object is not parsed often
                chunk = file.read(max(CHUNK, size))
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
                require(more(), f"{here} is not JSON, or the array does not end: correct it")
                continue
            number += 1
            brackets = buffer.count("{", place, end) + buffer.count("[", place, end)
            yield _object(row, here, "each must be an object, {…}", brackets)
            place = end + (buffer[end] == ",")
        place += 1
        require(mark() == "", f"{where}: something follows the array: remove it")


def _behind_space(text: str, place: int) -> int:
    space = SPACE.match(text, place)
    assert space is not None
    return space.end()


def _decoded(text: bytes, where: str) -> str | BadRecord:
    """The text without the mark that some editors put before it."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return BadRecord(f"{where} is not UTF-8 but UTF-16: convert it or leave it out")
    if b"\0" in text:  # in UTF-16 without a mark, in binary files, in what a crash left of a file
        return BadRecord(f"{where} holds a NUL byte, so it is no text in UTF-8: convert it or leave it out")
    try:
        return text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return BadRecord(
            f"{where} is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}): convert it or leave it out"
        )
