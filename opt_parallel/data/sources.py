"""Where text comes from: files, folders, globs and datasets of the hub, read record by record, apart or in order."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opt_parallel.data.encoding import Record, Text
from opt_parallel.data.files import (
    ENDINGS,
    PIECE_BYTES,
    ROWS_READ,
    Piece,
    ending_of,
    has_text,
    numbered,
    pieces_of,
    records_of,
)
from opt_parallel.errors import UserError, one_line
from opt_parallel.paths import reach
from opt_parallel.shapes import require

ROWS_APART = 4096  # of a dataset: a piece is a multiple of so many


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a dataset that `datasets` has opened; `size`: their bytes, about."""

    name: str
    dataset: Any
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Unit:
    """What is read at a time, by one process: small files together, or a part of a large one."""

    pieces: tuple[Piece | Slice, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Corpus:
    """The text of one setting `key` (data.train): files in the order of their names, then datasets of the hub, or in
    folders of their form, with their `subset` and `split`. A file that several entries lead to counts once."""

    key: str
    files: tuple[Path, ...]
    hub: tuple[str, ...]
    text: Text
    subset: str | None = None
    split: str = "train"
    content: tuple[str, ...] = ()  # of its files, where it was looked into: data/sameness.py

    @classmethod
    def find(
        cls,
        key: str,
        entries: list[str],
        text_field: str = "text",
        template: str | None = None,
        subset: str | None = None,
        split: str | None = None,
    ) -> Corpus:
        """The files and datasets that `entries` name; with `subset` or `split` all are datasets. Raises: UserError."""
        require(bool(entries), f"{key} is not set: name a file, a folder, a glob or a hub id, or a list of them")
        files: set[Path] = set()
        hub: set[str] = set()
        for entry in entries:
            reach(f"{key}=", entry)
            found = [] if subset or split else sorted(path.absolute() for path in _find_files(key, entry))
            for path in found:
                readable = os.access(path, os.R_OK)
                require(readable, f"{key}: {path} cannot be read: change its permissions or leave it out")
            require(len(found) != 1 or has_text(found[0]), f"{key}={entry} holds no text: name a file that does")
            files.update(found)
            if not found:
                hub.add(entry)
        default = "validation" if key.startswith("data.validation") else "train"
        return cls(key, tuple(sorted(files)), tuple(sorted(hub)), Text(text_field, template), subset, split or default)

    def made_from(self) -> list[Any]:
        """What changes when the text does, and not where it lies."""
        hub = [[None if Path(name).is_dir() else name, self.subset, self.split] for name in self.hub]
        return [list(self.content), hub, self.text.field]

    @property
    def folders(self) -> list[Path]:
        """Of data sets in the hub's form that lie here."""
        return [Path(name) for name in self.hub if Path(name).is_dir()]

    def identity(self) -> list[Any]:
        """What changes when a file does, read from the file system alone. Raises: UserError if a file is gone."""
        below = [path for folder in self.folders for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            status = [(path, path.stat()) for path in (*self.files, *below)]
        except OSError as error:
            raise UserError(f"{self.key}: {error.filename} cannot be read ({error.strerror}): bring it back") from error
        files = [[str(path), each.st_size, each.st_mtime_ns] for path, each in status]
        return [files, [[name, self.subset, self.split] for name in self.hub], self.text.field]

    @property
    def names(self) -> str:
        """The first of what there is, and how many more."""
        every = [*map(str, self.files), *self.hub]
        return every[0] + (f" and {len(every) - 1} more" if len(every) > 1 else "")

    def units(self, cut: bool = True) -> list[Unit]:
        """Everything, in order; `cut`: large files in parts, which cannot tell the numbers of their lines."""
        pieces: list[Piece | Slice] = [piece for path in self.files for piece in pieces_of(path, self.key, cut)]
        for name in self.hub:
            pieces += self._slices(name)
        units: list[Unit] = []
        gathered: list[Piece | Slice] = []
        size = 0
        for piece in pieces:
            if gathered and size + piece.size > PIECE_BYTES:
                units.append(Unit(tuple(gathered)))
                gathered, size = [], 0
            gathered.append(piece)
            size += piece.size
        return [*units, Unit(tuple(gathered))] if gathered else units

    def read(self, unit: Unit, count_lines: bool = False) -> Iterator[Record]:
        """The records of a unit; with `count_lines` messages name the right lines. Raises: UserError."""
        for piece in unit.pieces:
            if isinstance(piece, Slice):
                yield from _rows(piece, f"{self.key}={piece.name}")
            else:
                yield from records_of(numbered(piece) if count_lines else piece, self.key, self.text.field)

    def records(self) -> Iterator[Record]:
        """Every record, in order. Raises: UserError that names file and line."""
        for unit in self.units(cut=False):
            yield from self.read(unit)

    def documents(self) -> Iterator[str]:
        """The text of every record, white space at its end removed."""
        return (self.text.of(record).rstrip() for record in self.records())

    def sampled(self, share: float) -> Iterator[str]:
        """About `share` of the text: the beginning of each unit."""
        for unit in self.units():
            left = share * unit.size
            for record in self.read(unit):
                if left <= 0:
                    break
                left -= len(json.dumps(dict(record.fields), ensure_ascii=False, default=str)) + 1
                yield self.text.of(record).rstrip()

    def streamed(self, unit: int = 0, taken: int = 0) -> Iterator[tuple[int, Record]]:
        """The records behind the first `taken` of a unit, with the numbers of their units: files first, each whole,
        then each dataset, which arrives as it is read. Raises: UserError, also if a dataset ends before its end."""
        files = self.units(cut=False) if not self.hub else Corpus(self.key, self.files, (), self.text).units(cut=False)
        for number in range(unit, len(files) + len(self.hub)):
            skip = taken if number == unit else 0
            if number < len(files):
                records: Iterator[Record] = islice(self.read(files[number]), skip, None)
            else:
                records = self._stream(self.hub[number - len(files)], skip)
            yield from ((number, record) for record in records)

    def _slices(self, name: str) -> list[Slice]:
        dataset = self._load(name, streaming=False)
        row_bytes = dataset.data.nbytes / max(len(dataset), 1)
        rows = max(1, int(PIECE_BYTES / max(row_bytes, 1)) // ROWS_APART) * ROWS_APART
        starts = range(0, len(dataset), rows)
        stops = [min(start + rows, len(dataset)) for start in starts]
        return [
            Slice(name, dataset, start, stop, int((stop - start) * row_bytes))
            for start, stop in zip(starts, stops, strict=True)
        ]

    def _stream(self, name: str, skip: int) -> Iterator[Record]:
        dataset = self._load(name, streaming=True)
        splits = dataset.info.splits or {}
        expected = splits[self.split].num_examples if self.split in splits else None
        number = skip
        rows = iter(dataset.skip(skip) if skip else dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # the library raises many kinds, the network more
                raise UserError(
                    f"{self.key}={name} broke off after {number:,} rows ({one_line(error)}): nothing is lost, the same "
                    "command goes on from there"
                ) from error
            yield Record(f"{self.key}={name}, row {number}", row)
            number += 1
        require(
            not expected or number >= expected,
            f"{self.key}={name} ended after {number:,} rows, its split {self.split!r} has {expected or 0:,}: nothing "
            "is lost, the same command goes on from there",
        )

    def _load(self, name: str, streaming: bool) -> Any:
        import datasets  # takes a second, and files do not need it

        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(name, self.subset, split=self.split, streaming=streaming)
        except Exception as error:  # the library raises many kinds, the network more
            raise UserError(
                f"{self.key}={name}: no such file, folder or glob, and the hub did not give its split {self.split!r} "
                f"({one_line(error)}): check the path or the hub id"
            ) from error


def _rows(piece: Slice, where: str) -> Iterator[Record]:
    for first in range(piece.start, piece.stop, ROWS_READ):
        columns = piece.dataset[first : min(first + ROWS_READ, piece.stop)]
        for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
            yield Record(f"{where}, row {number}", dict(zip(columns, values, strict=True)))


def _find_files(key: str, entry: str) -> list[Path]:
    """The files of one entry; none if it can only be a hub id. Raises: `UserError`."""
    there, path = reach(f"{key}=", entry), Path(os.path.expanduser(entry))
    if there and path.is_file():
        return [path]
    if there:
        found = [file for file in path.rglob("*") if _is_text(file, path)]
        require(bool(found), f"{key}={entry} holds no text: a folder is searched for {', '.join(ENDINGS)}")
        return found
    if glob.has_magic(entry):
        found = [file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()]
        require(bool(found), f"{key}={entry} matches no file: check the pattern, or name the files")
        return found
    hub_id = re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", entry) and ending_of(path)[0] not in ENDINGS
    require(bool(hub_id), f"{key}={entry}: no such file or folder; check the path")
    return []


def _is_text(file: Path, folder: Path) -> bool:
    """Whether the search of `folder` takes `file`: by its ending, and nothing hidden."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return ending_of(file)[0] in ENDINGS and file.is_file() and not hidden
