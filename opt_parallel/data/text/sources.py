"""Reads the text that a setting such as `data.train` names: files, folders, globs and hub datasets.

Several processes can read different pieces of the text, or one process can read the whole text in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opt_parallel.config.model import require
from opt_parallel.config.paths import reach
from opt_parallel.data.ids.formats import is_ids, partners_of
from opt_parallel.data.text.files import PARQUET, PIECE_BYTES, Ids, Piece, numbered, pieces_of, records_of, shown
from opt_parallel.data.text.finding import Found, describe, find
from opt_parallel.data.text.hub_data import Dataset
from opt_parallel.data.text.parquet import class_names_in
from opt_parallel.data.text.records import BadRecords, Item, Record, Text, sift
from opt_parallel.data.text.unpacking import ending_of
from opt_parallel.runtime.errors import UserError

SPREAD = 8  # number of units from which `spread` takes records
ROWS_APART = 4096  # the number of rows in a piece of a dataset is a multiple of this number


@dataclass(frozen=True)
class Slice:
    """The rows `start` to `stop` of a loaded dataset, which have approximately `size` bytes."""

    dataset: Dataset
    opened: Any
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Unit:
    """A piece of the text that one process reads: several small files, or a piece of a large file."""

    pieces: tuple[Piece | Slice, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def ids(self) -> Piece | None:
        """The piece of a file of token ids that the unit consists of, or None for a unit of text."""
        first = self.pieces[0]
        return first if isinstance(first, Piece) and is_ids(first.path) else None

    @property
    def name(self) -> str:
        """The name of the first file or dataset, and the number of other pieces, for messages."""
        first = self.pieces[0]
        more = f" and {len(self.pieces) - 1} more" if len(self.pieces) > 1 else ""
        return f"{first.path if isinstance(first, Piece) else first.dataset.name}{more}"


@dataclass(frozen=True)
class Corpus:
    """The text that a setting `key`, such as data.train, names.

    The text consists of `files` in alphabetical order, followed by the datasets `hub` (ids or folders) with their
    `subset` and `split`. A file that several entries name is read once. `left_out` describes the files that were found
    but are not read. If `skip_bad` is true, bad records are left out, and raise no error."""

    key: str
    files: tuple[Path, ...]
    hub: tuple[str, ...]
    text: Text
    subset: str | None = None
    split: str = "train"
    left_out: str = field(default="", compare=False)
    skip_bad: bool = False
    content: tuple[str, ...] = ()  # checksums of the files, which data/store/sameness.py computes
    ids: Ids = field(default_factory=Ids)

    @classmethod
    def find(
        cls,
        key: str,
        entries: list[str],
        text_field: str = "text",
        template: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        skip_bad: bool = False,
        dtype: str | None = None,
    ) -> Corpus:
        """The corpus of the files and datasets that `entries` name. Raises: UserError.

        If `subset` or `split` is given, every entry is a dataset."""
        require(bool(entries), f"{key} is not set: name a file, a folder, a glob or a hub id, or a list of them")
        found = Found()
        for entry in entries:
            reach(f"{key}=", entry)
            found.update(Found(datasets=[entry]) if subset or split else find(key, entry))
        default = "validation" if key.startswith("data.validation") else "train"
        return cls(
            key,
            tuple(sorted(found.files.values())),
            tuple(sorted(set(found.datasets))),
            Text(text_field, template),
            subset,
            split or default,
            describe(found.left_out),
            skip_bad,
            ids=Ids(dtype),
        )

    def cache_key(self) -> list[Any]:
        """An identifier of the text, which depends on its content and not on its paths."""
        hub = [[None if Path(name).is_dir() else name, self.subset, self.split] for name in self.hub]
        return [list(self.content), hub, self.text.field, *self._reading]

    @property
    def folders(self) -> list[Path]:
        """The datasets that are local folders."""
        return [Path(name) for name in self.hub if Path(name).is_dir()]

    def identity(self) -> list[Any]:
        """An identifier made of the paths, sizes and times of the files. Raises: UserError if a file is missing."""
        below = [path for folder in self.folders for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            status = [(path, path.stat()) for path in (*self.every_file, *below)]
        except OSError as error:
            raise UserError(f"{self.key}: {error.filename} cannot be read ({error.strerror}): restore it") from error
        files = [[str(path), each.st_size, each.st_mtime_ns] for path, each in status]
        return [files, [[name, self.subset, self.split] for name in self.hub], self.text.field, *self._reading]

    @property
    def _reading(self) -> list[str]:
        """A part of the identifier for files from which earlier versions of the reader read a different text."""
        marks = ["quotation marks are text"] if any(ending_of(path)[0] == ".tsv" for path in self.files) else []
        return marks + ([f"ids {self.ids.dtype}"] if self.has_ids and self.ids.dtype else [])

    @property
    def has_ids(self) -> bool:
        """Whether the corpus has files of token ids, which are read in place."""
        return any(map(is_ids, self.files))

    @property
    def every_file(self) -> list[Path]:
        """The files, each followed by its index if it is a file of token ids."""
        return [each for path in self.files for each in (path, *(partners_of(path) if is_ids(path) else ()))]

    @property
    def names(self) -> str:
        """The name of the first file or dataset, and the number of other files and datasets, for messages."""
        every = [*map(str, self.files), *self.hub]
        return every[0] + (f" and {len(every) - 1} more" if len(every) > 1 else "")

    def units(self, cut: bool = True) -> list[Unit]:
        """The text as units, in order. With `cut`, large files are split into pieces without line numbers."""
        pieces: list[Piece | Slice] = []
        for path in self.files:
            pieces += pieces_of(path, self.key, cut, self.ids.dtype)
        for name in self.hub:
            pieces += self._slices(name)
        units: list[Unit] = []
        gathered: list[Piece | Slice] = []
        size = 0
        for piece in pieces:
            alone = any(isinstance(each, Piece) and is_ids(each.path) for each in (piece, *gathered[-1:]))
            if gathered and (alone or size + piece.size > PIECE_BYTES):
                units.append(Unit(tuple(gathered)))
                gathered, size = [], 0
            gathered.append(piece)
            size += piece.size
        return [*units, Unit(tuple(gathered))] if gathered else units

    def read(self, unit: Unit, count_lines: bool = False) -> Iterator[Item]:
        """The records of a unit, including bad records. Raises: UserError.

        With `count_lines`, error messages have the correct line numbers, for which the file is read up to the unit."""
        for piece in unit.pieces:
            if isinstance(piece, Slice):
                yield from piece.dataset.rows(piece.opened, piece.start, piece.stop)
            else:
                yield from records_of(numbered(piece) if count_lines else piece, self.key, self.text.field, self.ids)

    def items(self) -> Iterator[Item]:
        """All records in order, including bad records. Raises: UserError."""
        for unit in self.units(cut=False):
            yield from self.read(unit)

    def records(self) -> Iterator[Record]:
        """All records in order. Raises: UserError, whose message names the file and the line."""
        return sift(self.items(), lambda record: None, self._bad())

    def documents(self) -> Iterator[str]:
        """The text of each record, without trailing white space. Raises: UserError."""
        return (self.text.of(record).rstrip() for record in sift(self.items(), self.text.of, self._bad()))

    def sampled(self, share: float) -> Iterator[str]:
        """The text of some documents, which are about `share` of the corpus and are from the start of each unit."""
        for unit in self.units():
            left = share * unit.size
            for record in sift(self.read(unit), self.text.of, self._bad()):
                if left <= 0:
                    break
                left -= len(json.dumps(dict(record.fields), ensure_ascii=False, default=str)) + 1
                yield self.text.of(record).rstrip()

    def spread(self, number: int) -> Iterator[Item]:
        """At most `number` records, from the starts of units throughout the corpus. Raises: UserError."""
        units = self.units()
        places = sorted({len(units) * place // SPREAD for place in range(SPREAD)} if units else ())
        for place in places:
            yield from islice(self.read(units[place]), -(-number // len(places)))

    def streamed(self, unit: int = 0, taken: int = 0) -> Iterator[tuple[int, Item]]:
        """The records after the first `taken` records of a unit, each as a pair (number of its unit, record).

        A unit is a complete file, or a dataset that is streamed. Bad records are included. Raises: UserError, also if a
        stream ends early."""
        files = replace(self, hub=()).units(cut=False)
        for number in range(unit, len(files) + len(self.hub)):
            skip = taken if number == unit else 0
            if number < len(files):
                items: Iterator[Item] = islice(self.read(files[number]), skip, None)
            else:
                items = self._dataset(self.hub[number - len(files)]).stream(skip)
            yield from ((number, item) for item in items)

    @property
    def has_class_columns(self) -> bool:
        """Whether the data may have class columns, whose numbers stand for names of classes."""
        return bool(self.hub) or any(ending_of(path)[0] == PARQUET for path in self.files)

    def class_names(self, column: str) -> list[str]:
        """The names of the classes in a column, in the order of their numbers. Raises: UserError."""
        files = [path for path in self.files if ending_of(path)[0] == PARQUET]
        names_by_file = [class_names_in(path, f"{self.key}: {shown(path)}").get(column, []) for path in files]
        names_by_file += [self._dataset(name).class_names(column) for name in self.hub]
        return list(dict.fromkeys(name for names in names_by_file for name in names))

    def _bad(self) -> BadRecords | None:
        return BadRecords() if self.skip_bad else None

    def _dataset(self, name: str) -> Dataset:
        return Dataset(self.key, name, self.subset, self.split)

    def _slices(self, name: str) -> list[Slice]:
        dataset = self._dataset(name)
        opened = dataset.load()
        row_bytes = opened.data.nbytes / max(len(opened), 1)
        rows = max(1, int(PIECE_BYTES / max(row_bytes, 1)) // ROWS_APART) * ROWS_APART
        starts = range(0, len(opened), rows)
        stops = [min(start + rows, len(opened)) for start in starts]
        return [
            Slice(dataset, opened, start, stop, int((stop - start) * row_bytes))
            for start, stop in zip(starts, stops, strict=True)
        ]
