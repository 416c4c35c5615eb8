"""Where text comes from: files, folders, globs and datasets of the hub, read document by document."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_parallel.data.encoding import Record
from opt_parallel.errors import UserError, one_line
from opt_parallel.shapes import require

SEARCHED = (".md", ".py", ".rst", ".txt", ".jsonl")  # what a folder is searched for
LINES = (".json", ".jsonl")  # files with a document a line; any other file is one document


@dataclass(frozen=True)
class Corpus:
    """The text of one setting `key` (data.train): files in the order of their names, then datasets of the hub.

    A file that several entries lead to counts once."""

    key: str
    files: tuple[Path, ...]
    hub: tuple[str, ...]
    text_field: str

    @classmethod
    def find(cls, key: str, entries: list[str], text_field: str) -> Corpus:
        """The files and hub datasets that `entries` name. Raises: `UserError`."""
        require(bool(entries), f"{key} is not set: name a file, a folder, a glob or a hub id, or a list of them")
        files: set[Path] = set()
        hub: set[str] = set()
        for entry in entries:
            found = sorted(path.absolute() for path in _find_files(key, entry))
            for path in found:
                readable = os.access(path, os.R_OK)
                require(readable, f"{key}: {path} cannot be read: change its permissions or leave it out")
            require(len(found) != 1 or _has_text(found[0]), f"{key}={entry} holds no text: name a file that does")
            files.update(found)
            if not found:
                hub.add(entry)
        return cls(key, tuple(sorted(files)), tuple(sorted(hub)), text_field)

    def identity(self) -> list[Any]:
        """What changes when the text does, read from the file system alone."""
        status = [path.stat() for path in self.files]
        files = [[str(path), s.st_size, s.st_mtime_ns] for path, s in zip(self.files, status, strict=True)]
        return [files, [[name, self._split] for name in self.hub], self.text_field]

    def records(self) -> Iterator[Record]:
        """Every row, and every file of plain text as one. Raises: `UserError` that names file and line."""
        for path in self.files:
            if path.suffix in LINES:
                yield from self._read_lines(path)
            else:
                where = f"{self.key}: {path}"
                yield Record(where, {"text": _decode(path.read_bytes(), where)})
        for name in self.hub:
            yield from self._read_hub(name)

    def documents(self) -> Iterator[str]:
        """The text of every record."""
        return (record.fields["text"] for record in self.records())

    def _read_lines(self, path: Path) -> Iterator[Record]:
        blank = 0  # the first blank line: fine only if nothing follows
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    blank = blank or number
                    continue
                require(not blank, f"{self.key}: {path}, line {blank} is blank: remove it")
                where = f"{self.key}: {path}, line {number}"
                try:
                    row = json.loads(_decode(line, where))
                except json.JSONDecodeError as error:
                    reason = f"{error.msg} at column {error.colno}"
                    raise UserError(f"{where} is not JSON ({reason}): {self._expected}") from error
                yield Record(where, {**row, "text": self._text(row, where)})

    def _read_hub(self, name: str) -> Iterator[Record]:
        import datasets  # takes a second, and files do not need it

        datasets.disable_progress_bars()
        try:
            dataset = datasets.load_dataset(name, split=self._split)
        except Exception as error:  # the library raises many kinds, the network more
            raise UserError(
                f"{self.key}={name}: no such file, folder or glob, and the hub did not give its split {self._split!r} "
                f"({one_line(error)}): check the path or the hub id"
            ) from error
        for number, row in enumerate(dataset):
            where = f"{self.key}={name}, row {number}"
            yield Record(where, {**row, "text": self._text(row, where)})

    def _text(self, row: Any, where: str) -> str:
        """The document that one line or row holds."""
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}: {self._expected}")
        if self.text_field not in row:
            raise UserError(f"{where} has no field {self.text_field!r}, only {list(row)}: set data.text_field")
        text = row[self.text_field]
        if not isinstance(text, str):
            raise UserError(f"{where}: {self.text_field!r} is {text!r:.40}, not a string: {self._expected}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {error.object[error.start]!r} is half a character: remove it") from error
        return text

    @property
    def _split(self) -> str:
        """The split of a hub dataset: train or validation."""
        return self.key.removeprefix("data.")

    @property
    def _expected(self) -> str:
        return f'each line must be an object such as {{"{self.text_field}": "…"}} (data.text_field={self.text_field})'


def _find_files(key: str, entry: str) -> list[Path]:
    """The files of one entry; none if it can only be a hub id. Raises: `UserError`."""
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.exists():
        found = [file for file in path.rglob("*") if _is_text(file, path)]
        require(bool(found), f"{key}={entry} holds no text: a folder is searched for {', '.join(SEARCHED)}")
        return found
    if glob.has_magic(entry):
        found = [file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()]
        require(bool(found), f"{key}={entry} matches no file: check the pattern, or name the files")
        return found
    hub_id = re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", entry) and path.suffix not in (*SEARCHED, *LINES)
    require(bool(hub_id), f"{key}={entry}: no such file or folder; check the path")
    return []


def _is_text(file: Path, folder: Path) -> bool:
    """Whether the search of `folder` takes `file`: by its suffix, and nothing hidden."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix in SEARCHED and file.is_file() and not hidden


def _has_text(path: Path) -> bool:
    with path.open("rb") as file:
        return any(line.strip() for line in file)


def _decode(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}): convert it or leave it out"
        ) from error
