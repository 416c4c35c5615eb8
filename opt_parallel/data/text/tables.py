"""Reads records from .csv (RFC 4180) and .tsv, in which quotation marks may also be text."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from opt_parallel.config.model import require
from opt_parallel.data.text.records import BadRecord, Item, Record
from opt_parallel.runtime.errors import UserError

LONGEST_FIELD = 1 << 28  # characters; an unclosed quotation mark would include the rest of the file
Lines = Iterable[tuple[str, BadRecord | None]]  # a line, decoded as far as possible, and its error if it has one


def csv_records(lines: Lines, where: str) -> Iterator[Item]:
    """One record per row; the first row has the names."""
    yield from _records(_Rows(lines, ","), where)


def tsv_records(lines: Lines, where: str) -> Iterator[Item]:
    """One record per line; the first line has the names. A line with too few columns starts a row with a multi-line
    quoted field. In other lines, a quotation mark that does not enclose its field is text."""
    yield from _records(_TabRows(lines, "\t"), where)


class _Rows:
    """Rows of fields. `first`, `last`: line numbers of the latest row. `fault`: the error of one of its lines."""

    def __init__(self, lines: Lines, delimiter: str) -> None:
        csv.field_size_limit(LONGEST_FIELD)
        self.lines, self.delimiter = iter(lines), delimiter
        self.first = self.last = self.width = 0
        self.fault: BadRecord | None = None

    def row(self) -> list[str]:
        """The next row. Raises: StopIteration, csv.Error."""
        self.first, self.fault = self.last + 1, None
        return self._split(self._line())

    def _split(self, line: str) -> list[str]:
        """The row that starts with `line`; quoted fields may continue in the next lines."""
        rest = iter(self._line, None)
        return next(csv.reader(chain([line], rest), delimiter=self.delimiter, strict=True))

    def _line(self) -> str:
        line, fault = next(self.lines)
        self.last += 1
        self.fault = self.fault or fault
        return line


class _TabRows(_Rows):
    def _split(self, line: str) -> list[str]:
        if '"' not in line:
            return _cells(line)
        row = _cells(line)
        return [_unquoted(cell) for cell in row] if len(row) == self.width or not self.width else super()._split(line)


def _cells(line: str) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split("\t") if line else []


def _unquoted(cell: str) -> str:
    """The cell without enclosing quotation marks; inner ones are doubled."""
    enclosed = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if enclosed else cell


def _records(rows: _Rows, where: str) -> Iterator[Item]:
    names: list[str] | None = None
    while True:
        try:
            row = rows.row()
        except StopIteration:
            return
        except csv.Error as error:
            bad = BadRecord(f"{where}, line {rows.first} is malformed ({error}): correct it")
            if names is None or rows.last > rows.first or "end of data" in str(error):
                raise UserError(str(bad)) from error  # an unclosed quotation mark includes other rows
            yield bad
            continue
        here = f"{where}, line {rows.first}"
        if names is None and row:
            names, rows.width = row, len(row)
            require(rows.fault is None, str(rows.fault))
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            require(twice is None, f"{here}: the column name {twice!r:.60} occurs twice: rename one")
        elif row and rows.fault is not None:
            yield rows.fault
        elif row and names is not None:
            if len(row) == len(names):
                yield Record(here, dict(zip(names, row, strict=True)))
            else:
                yield BadRecord(f"{here} has {len(row)} columns, the first line {len(names)}: correct it")
