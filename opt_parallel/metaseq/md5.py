"""Compares the files of a metaseq checkpoint with a list of MD5 sums, such as those that Meta publishes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from opt_parallel.config.paths import reach
from opt_parallel.metaseq.folder import Description
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import read_limited

CHUNK = 1 << 20  # Number of bytes that are read at a time.
SUM = re.compile(r"(?i)\b[0-9a-f]{32}\b")
NAME = re.compile(r"(?i)[^\s,;\"'*()/\\]+\.pt\b")


def check_md5(description: Description, key: str, name: str | Path) -> None:
    """Raise UserError unless each file of the checkpoint has its MD5 sum in the list `name`.

    Every process reads its share of the files. `key` is the key or option that set `name`, for messages."""
    sums, paths = read_sums(key, name), description.files
    unlisted = [path.name for path in paths if path.name.lower() not in sums]
    missing = sorted(sums.keys() - {path.name.lower() for path in paths})
    if unlisted or missing:
        what = f"{unlisted[0]} is not in it" if unlisted else f"{description.folder} lacks {missing[0]}"
        raise UserError(f"{key}{name} lists other files, {what}: name the list of this checkpoint")
    for path in paths[process.rank() :: process.world_size()]:
        found = md5_of(path)
        if found != (listed := sums[path.name.lower()]):
            raise UserError(f"{path} has the MD5 sum {found}, but {name} says {listed}: copy the file again")


def read_sums(key: str, name: str | Path) -> dict[str, str]:
    """The MD5 sums of a list by file name in lower case. A line has a sum and a name, in any order.

    Raises: UserError if the list is missing, contradicts itself, or has no such line."""
    path = reach(key, name)
    try:
        text = read_limited(path).decode() if path else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{key}{name} cannot be read ({one_line(error)}): name a list of MD5 sums") from error
    sums: dict[str, str] = {}
    for file, total in _pairs(text):
        if sums.setdefault(file, total) != total:
            raise UserError(f"{key}{name} has two sums of {file}, {sums[file]} and {total}: remove the wrong line")
    if not sums:
        why = "does not exist" if path is None else "has no line with an MD5 sum and the name of a .pt file"
        raise UserError(f"{key}{name} {why}: name a list of MD5 sums")
    return sums


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The names and sums in a list. A line may have several pairs, as in JSON, or the paths of a file before its name.
    Other lines are ignored."""
    for line in text.splitlines():
        names, totals = NAME.findall(line), [total.lower() for total in SUM.findall(line)]
        if len(totals) == 1:
            names = names[-1:]
        if len(names) == len(totals):
            yield from zip(map(str.lower, names), totals, strict=True)


def md5_of(path: Path) -> str:
    """The MD5 sum of a file."""
    total = hashlib.md5(usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()
