"""Reads records from .csv files (RFC 4180) and from .tsv files, in which quotation marks may also be text."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from opt_parallel.config.model import require
from opt_parallel.data.text.records import BadRecord, Item, Record
from opt_parallel.runtime.errors import UserError

LONGEST_FIELD = 1 << 28  # Maximum characters of a field. An unclosed quotation mark includes the following rows.
Lines = Iterable[tuple[str, BadRecord | None]]  # Each line, and the error if the line could not be decoded completely.


def csv_records(lines: Lines, where: str) -> Iterator[Item]:
    """The records of a .csv file. Each row is a record, except for the first row, which has the names of the fields."""
    yield from _records(_Rows(lines, ","), where)


def tsv_records(lines: Lines, where: str) -> Iterator[Item]:
    """The records of a .tsv file. Each line is a record, except for the first line, which has the names of the fields.

    A line with too few columns starts a row whose quoted field continues in the next lines. In other lines, a quotation
    mark that does not enclose a field is text."""
    yield from _records(_TabRows(lines, "\t"), where)


class _Rows:
    """The rows of a table. The latest row has the lines `first` to `last`, and `fault` is an error in these lines."""

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
        """The row that starts with `line`. A quoted field of the row may continue in the next lines."""
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
    """The cell without enclosing quotation marks. A doubled quotation mark in a quoted cell becomes a single mark."""
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
                raise UserError(str(bad)) from error  # an unclosed quotation mark may have included other rows
            yield bad
            continue
        here = f"{where}, line {rows.first}"
        if names is None and row:
            names, rows.width = row, len(row)
            require(rows.fault is None, str(rows.fault))
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            require(twice is None, f"{here}: the column name {twice!r:.60} occurs twice: rename one of the columns")
        elif row and rows.fault is not None:
            yield rows.fault
        elif row and names is not None:
            if len(row) == len(names):
                yield Record(here, dict(zip(names, row, strict=True)))
            else:
                yield BadRecord(f"{here} has {len(row)} columns, but the first line has {len(names)}: correct it")
