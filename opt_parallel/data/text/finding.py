"""Finds the files, the datasets in local folders, or the hub id that an entry of `data.train` names.

Files that are found but not read are counted. A linked folder is followed once. A file or folder that cannot be read is
an error.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISREG

import yaml

from opt_parallel.config.model import require
from opt_parallel.config.paths import local, reach
from opt_parallel.data.ids import formats
from opt_parallel.data.text.files import DOCUMENTS, ENDINGS, READ, check_document, has_text, shown
from opt_parallel.data.text.unpacking import ending_of
from opt_parallel.runtime.errors import UserError

IDS = (*formats.ENDINGS, *formats.PARTNERS)
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar")
SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # files that `datasets.save_to_disk` writes
CARD = "README.md"
CARD_BYTES = 1 << 16
CARD_KEYS = {
    "annotations_creators", "configs", "dataset_info", "language", "license", "pretty_name", "size_categories",
    "source_datasets", "task_categories", "task_ids",
}  # fmt: skip
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


@dataclass
class Found:
    """The files and datasets that an entry names.

    `files` maps the real path of a file to its path. `datasets` are folders and hub ids. `left_out` counts the files
    that are not read, by reason. `ids` are files of token ids and their indices, which are read if the entry has no
    text, because folders with text may contain other files with these endings."""

    files: dict[str, Path] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    ids: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, path: Path, real: str) -> None:
        """Add a file. The alphabetically first path of a file is kept, so the order of entries does not matter."""
        path = path.absolute()
        self.files[real] = min(path, self.files.get(real, path))

    def update(self, other: Found) -> None:
        for real, path in other.files.items():
            self.add(path, real)
        self.datasets += other.datasets
        self.left_out += other.left_out


def find(key: str, entry: str) -> Found:
    """The files and datasets that `entry` of the setting `key` names. Raises: UserError."""
    path, where, found = Path(local(f"{key}=", entry)), f"{key}={entry}", Found()
    reach(f"{key}=", entry)
    if path.is_dir():
        _search(key, path, found)
        _settle(key, found)
        _check_splits(where, path.absolute(), found)
        missing = f"{where} contains no text: a folder is searched for {READ}"
    elif os.path.lexists(path):
        path = formats.data_file_of(path, where)
        _check_ending(where, path)
        _check_file(key, path)
        if formats.is_ids(path):
            found.add(path, os.path.realpath(path))
            return found
        require(has_text(path), f"{where} contains no text: name a file with text")
        found.add(path, os.path.realpath(path))
        return found
    elif glob.has_magic(entry):
        start, parts = (Path(path.anchor), path.parts[1:]) if path.is_absolute() else (Path(), path.parts)
        for match in _matches(key, start, parts):
            if not match.is_dir():
                _take(key, match, os.path.realpath(match), found)
            elif "**" not in parts:
                found.left_out["folders"] += 1
        _settle(key, found)
        missing = f"{where} matches no file that is read: check the pattern, or name the files"
    else:
        index = Path(f"{path}.idx")
        require(not index.is_file(), f"{where}: no such file or folder, but {index.name} exists: set {where}.idx")
        hub_id = re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", entry) and ending_of(path)[0] not in (*ENDINGS, *IDS)
        require(bool(hub_id), f"{where}: no such file or folder; check the path")
        found.datasets.append(entry)
        return found
    if not found.files and not found.datasets:
        raise UserError(f"{missing}{'; left out: ' if found.left_out else ''}{describe(found.left_out)}")
    return found


def describe(left_out: Counter[str]) -> str:
    """A text that states the numbers of files that are not read, such as `2 .png, 1 hidden`."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items(), key=lambda each: (-each[1], each)))


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any(all((folder / name).is_file() for name in names) for names in SAVED)


def _search(key: str, top: Path, found: Found) -> None:
    for folder, real, entries, is_dataset in _folders(key, top, _is_dataset):
        if is_dataset:
            found.datasets.append(str(folder))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                found.left_out["hidden"] += 1
            elif not entry.is_dir():
                linked = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                _take(key, Path(entry.path), linked, found)


Entries = list[os.DirEntry[str]]


def _folders(
    key: str, top: Path, closed: Callable[[Path, Entries], bool] = lambda *_: False
) -> Iterator[tuple[Path, str, Entries, bool]]:
    """Walk `top` and the folders below it, and yield (folder, real path, entries, result of `closed`) for each folder.

    Linked folders are followed, and each folder occurs once. Hidden folders are skipped. Subfolders of a folder are
    skipped if `closed` is true for the folder. Raises: UserError if a folder cannot be read."""
    seen: set[str] = set()
    pending = [top]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with _reading(key, folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            below = [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        shut = closed(folder, entries)
        yield folder, real, entries, shut
        pending += [] if shut else reversed(below)


def _matches(key: str, folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """The paths in `folder` that match a pattern with these `parts`, as in `glob`.

    Unlike in `glob`, linked folders are followed once, and a folder that cannot be read is an error."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below, _, _, _ in _folders(key, folder):
            yield from _matches(key, below, rest or ("*",))
        return
    names = [part] if os.path.lexists(folder / part) else []
    if glob.has_magic(part):
        with _reading(key, folder):
            names = [name for name in sorted(os.listdir(folder)) if fnmatchcase(name, part)]
        names = [name for name in names if part[0] == "." or name[0] != "."]
    for name in names:
        if not rest:
            yield folder / name
        elif (folder / name).is_dir():
            yield from _matches(key, folder / name, rest)


@contextmanager
def _reading(key: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = shown(Path(error.filename or folder))
        raise UserError(
            f"{key}: {path} cannot be read ({error.strerror}): change its permissions or leave it out"
        ) from error


def _take(key: str, path: Path, real: str, found: Found) -> None:
    """Add a file that a search or a pattern found, or count the file as not read."""
    ending, packed = ending_of(path)
    if ending in IDS and not packed:
        found.ids.append((path, real))
        return
    if ending not in ENDINGS:
        found.left_out[f"{ending}{packed}" or "without an ending"] += 1
        return
    if _check_file(key, path) == 0:
        found.left_out["empty"] += 1
    found.add(path, real)


def _settle(key: str, found: Found) -> None:
    """Take the files of token ids if there is no text, and count them as not read otherwise."""
    has_text = bool(found.files or found.datasets)
    has_ids = any(formats.is_ids(path) for path, _ in found.ids)
    for path, real in found.ids:
        if has_text or not has_ids:
            found.left_out[ending_of(path)[0]] += 1
        elif path.suffix.lower() != ".metadata":
            data = formats.data_file_of(path, f"{key}: {shown(path)}")
            _check_file(key, data)
            found.add(data, real if data == path else os.path.realpath(data))


def _check_ending(where: str, path: Path) -> None:
    ending, packed = ending_of(path)
    if ending in formats.ENDINGS:
        require(not packed, f"{where} is packed, but ids are read in place: unpack it")
        return
    require(ending not in ARCHIVES, f"{where} is an archive, which is not read: unpack it, and name the folder")
    problem = f"ends in {ending}{packed}, which is not read" if ending else "has no ending that names its format"
    require(ending in ENDINGS, f"{where} {problem}: rename it to its format, or convert it; readable are {READ}")


def _check_file(key: str, path: Path) -> int:
    """The size of a file in bytes. Raises: UserError unless the path is a readable regular file."""
    where = f"{key}: {shown(path)}"
    try:
        status = path.stat()
    except OSError as error:
        what = "is a broken link" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise UserError(f"{where} {what}: repair it or remove it") from error
    require(S_ISREG(status.st_mode), f"{where} is not a regular file: write the text into one")
    require(
        os.access(path, os.R_OK, effective_ids=True), f"{where} cannot be read: change its permissions or leave it out"
    )
    if ending_of(path)[0] in DOCUMENTS:
        check_document(status.st_size, where)
    return status.st_size


def _is_dataset(folder: Path, entries: Entries) -> bool:
    """Whether a folder is a dataset that the library `datasets` saved, or a copy of a hub dataset."""
    names = {entry.name for entry in entries}
    return any(saved <= names for saved in SAVED) or (CARD in names and _is_card(folder / CARD))


def _is_card(path: Path) -> bool:
    """Whether a README is the card of a hub dataset, which starts with YAML that contains a key of such cards."""
    try:
        if not path.is_file():
            return False
        with path.open(encoding="utf-8") as file:
            start = file.read(CARD_BYTES)
        settings = yaml.safe_load(start.split("---", 2)[1]) if start.startswith("---\n") else None
    except (OSError, ValueError, yaml.YAMLError, IndexError, RecursionError):
        return False
    return isinstance(settings, dict) and not CARD_KEYS.isdisjoint(settings)


def _check_splits(where: str, folder: Path, found: Found) -> None:
    """Raise UserError if a folder contains a training split together with a test or validation split."""
    splits: dict[str, Path] = {}
    for path in sorted(found.files.values()):
        if path.is_relative_to(folder) and ending_of(path)[0] not in DOCUMENTS:
            parts = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
            split = next((SPLITS[part] for part in parts if part in SPLITS), None)
            splits.setdefault(split or "", path.relative_to(folder))
    if {"train", "test"} <= set(splits) or {"train", "validation"} <= set(splits):
        names = " and ".join(shown(path) for split, path in splits.items() if split)
        raise UserError(
            f"{where} contains files of several splits, {names}: name the files to read, or name a split by "
            f"{{path: {shown(folder)}, split: train}}"
        )
