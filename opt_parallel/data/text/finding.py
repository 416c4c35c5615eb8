"""What an entry of `data.train` leads to: files, datasets in folders of their form, or an id of the hub.

Nothing goes unseen: a folder counts what it leaves out, follows each linked folder once, and whatever cannot be read is
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
from opt_parallel.data.text.files import ENDINGS, PLAIN, READ, check_document, has_text, shown
from opt_parallel.data.text.unpacking import ending_of
from opt_parallel.runtime.errors import UserError

ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar")
SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # by `datasets.save_to_disk`
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
    """Files by their real paths, with the names that led to them; folders and ids that are datasets; what was left out
    of folders, in words."""

    files: dict[str, Path] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path, real: str) -> None:
        """Add a file; of the names of one the first counts, so that the order of entries does not."""
        path = path.absolute()
        self.files[real] = min(path, self.files.get(real, path))

    def update(self, other: Found) -> None:
        for real, path in other.files.items():
            self.add(path, real)
        self.datasets += other.datasets
        self.left_out += other.left_out


def find(key: str, entry: str) -> Found:
    """What `entry` leads to. Raises: UserError."""
    path, where, found = Path(local(f"{key}=", entry)), f"{key}={entry}", Found()
    reach(f"{key}=", entry)
    if path.is_dir():
        _search(key, path, found)
        _check_splits(where, path.absolute(), found)
        missing = f"{where} holds no text: a folder is searched for {READ}"
    elif os.path.lexists(path):
        _check_ending(where, path)
        _check_file(key, path)
        require(has_text(path), f"{where} holds no text: name a file that does")
        found.add(path, os.path.realpath(path))
        return found
    elif glob.has_magic(entry):
        start, parts = (Path(path.anchor), path.parts[1:]) if path.is_absolute() else (Path(), path.parts)
        for match in _matches(key, start, parts):
            if not match.is_dir():
                _take(key, match, os.path.realpath(match), found)
            elif "**" not in parts:
                found.left_out["folders"] += 1
        missing = f"{where} matches no file that is read: check the pattern, or name the files"
    else:
        hub_id = re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", entry) and ending_of(path)[0] not in ENDINGS
        require(bool(hub_id), f"{where}: no such file or folder; check the path")
        found.datasets.append(entry)
        return found
    if not found.files and not found.datasets:
        raise UserError(f"{missing}{'; left out: ' if found.left_out else ''}{in_words(found.left_out)}")
    return found


def in_words(left_out: Counter[str]) -> str:
    """`2 .png, 1 hidden`."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items(), key=lambda each: (-each[1], each)))


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
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
    """`top` and the folders below it, linked ones too, each once, with its real path and what is in it; hidden ones
    are not entered, nor what is `closed`, which is told. Raises: UserError for one that cannot be read."""
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
    """What a pattern matches, as `glob` has it, except that linked folders are followed once, and that a folder which
    cannot be read is an error."""
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
    """Add a file that a search or a pattern came to, or count it."""
    ending, packed = ending_of(path)
    if ending not in ENDINGS:
        found.left_out[f"{ending}{packed}" or "without an ending"] += 1
        return
    if _check_file(key, path) == 0:
        found.left_out["empty"] += 1
    found.add(path, real)


def _check_ending(where: str, path: Path) -> None:
    ending, packed = ending_of(path)
    require(ending not in ARCHIVES, f"{where} is an archive, which is not read: unpack it, and name the folder")
    said = f"ends in {ending}{packed}, which is not read" if ending else "has no ending that says what it holds"
    require(ending in ENDINGS, f"{where} {said}: rename it to what it holds, or convert it; read are {READ}")


def _check_file(key: str, path: Path) -> int:
    """The bytes of a file. Raises: UserError unless it is a regular file that may be read."""
    where = f"{key}: {shown(path)}"
    try:
        status = path.stat()
    except OSError as error:
        what = "is a link to nothing" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise UserError(f"{where} {what}: repair it or remove it") from error
    require(S_ISREG(status.st_mode), f"{where} is no regular file: write the text into one")
    require(
        os.access(path, os.R_OK, effective_ids=True), f"{where} cannot be read: change its permissions or leave it out"
    )
    if ending_of(path)[0] in PLAIN:
        check_document(status.st_size, where)
    return status.st_size


def _is_dataset(folder: Path, entries: Entries) -> bool:
    """Whether a folder is a dataset that `datasets` saved, or a copy of one of the hub."""
    names = {entry.name for entry in entries}
    return any(saved <= names for saved in SAVED) or (CARD in names and _is_card(folder / CARD))


def _is_card(path: Path) -> bool:
    """Whether a README is the card of a dataset of the hub: it begins with settings, among them a card's."""
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
    """Raise UserError if a folder holds a test split, or one for validation, beside one for training."""
    splits: dict[str, Path] = {}
    for path in sorted(found.files.values()):
        if path.is_relative_to(folder) and ending_of(path)[0] not in PLAIN:
            words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
            split = next((SPLITS[word] for word in words if word in SPLITS), None)
            splits.setdefault(split or "", path.relative_to(folder))
    if {"train", "test"} <= set(splits) or {"train", "validation"} <= set(splits):
        names = " and ".join(shown(path) for split, path in splits.items() if split)
        raise UserError(
            f"{where} holds files of several splits, {names}: name those to read, or a split, "
            f"{{path: {shown(folder)}, split: train}}"
        )
