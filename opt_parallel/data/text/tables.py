"""Records out of tables in text: .csv by RFC 4180, and .tsv, in which quotation marks may be text as well."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from opt_parallel.config.model import require
from opt_parallel.data.text.records import BadRecord, Item, Record
from opt_parallel.runtime.errors import UserError

LONGEST_FIELD = 1 << 28  # characters: a quotation mark that nothing closes would take in all that follows
Lines = Iterable[tuple[str, BadRecord | None]]  # a line as far as it can be read, and what is wrong with it


def csv_records(lines: Lines, where: str) -> Iterator[Item]:
    """A record a row, by the names in the first."""
    yield from _records(_Rows(lines, ","), where)


def tsv_records(lines: Lines, where: str) -> Iterator[Item]:
    """A record a line, by the names in the first. A line that lacks columns is a row whose quoted field goes on in the
    next; in any other, a quotation mark that does not enclose its field is text."""
    yield from _records(_TabRows(lines, "\t"), where)


class _Rows:
    """Rows of fields. `first`, `last`: the lines of the row that was read last, and what is wrong with one of them."""

    def __init__(self, lines: Lines, delimiter: str) -> None:
        csv.field_size_limit(LONGEST_FIELD)
        self.lines, self.delimiter = iter(lines), delimiter
        self.first = self.last = self.width = 0
        self.fault: BadRecord | None = None

    def row(self) -> list[str]:
        """Raises: StopIteration, csv.Error."""
        self.first, self.fault = self.last + 1, None
        return self._split(self._line())

    def _split(self, line: str) -> list[str]:
        """The row that begins with `line`, whose quoted fields may go on in the lines behind."""
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
    """A cell without the quotation marks that enclose it; those inside of them are doubled."""
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
                raise UserError(str(bad)) from error  # a mark that nothing closes takes other rows with it
            yield bad
            continue
        here = f"{where}, line {rows.first}"
        if names is None and row:
            names, rows.width = row, len(row)
            require(rows.fault is None, str(rows.fault))
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            require(twice is None, f"{here}: a column's name stands there twice: {twice!r:.60}")
        elif row and rows.fault is not None:
            yield rows.fault
        elif row and names is not None:
            if len(row) == len(names):
                yield Record(here, dict(zip(names, row, strict=True)))
            else:
                yield BadRecord(f"{here} has {len(row)} columns, the first line {len(names)}: correct it")
