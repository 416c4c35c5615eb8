"""Files of folders that somebody else made: regular files inside the folder alone are read, and JSON of a bounded size.

A link that leads out of the folder would turn any file of this machine into a part of an export, and a device or a
named pipe would never end.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.checked import without_duplicates

POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024  # what Git LFS leaves instead of a file
MOST_BYTES = 100_000_000  # of a file that is read whole; an index of 175B's weights has 0.1 MB, a large tokenizer 35


def file_in(folder: Path, name: str) -> Path | None:
    """The regular file `name` of `folder`; None where there is nothing of that name.

    Raises: UserError if it is a link that leads out of the folder, not a file, or Git LFS's pointer to one."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_symlink():
            return None
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist: copy the file there") from error
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a circle of links, a NUL in a name
        raise UserError(f"{str(path)!r:.300} cannot be read ({one_line(error):.300}): bring a whole copy") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise UserError(f"{path} leads out of its folder, to {target}: copy the file itself there, or remove the link")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file: bring a whole copy")
    check_fetched(path, str(path))
    return path


def check_fetched(path: Path, where: str) -> None:
    """Raise UserError if only Git LFS's pointer to the file is there."""
    if path.stat().st_size < POINTER_BYTES:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{where} is a pointer of Git LFS, not the file: fetch it with git lfs pull")


def _roots(folder: Path) -> list[Path]:
    """Where a file of `folder` may lie: inside it, and if it is a snapshot of the hub's cache where that has its
    contents, in the `blobs` of the repository or in those that all repositories share."""
    here = folder.resolve()
    roots = [here]
    for place in (here, *here.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots += [repository / "blobs", repository.parent / "blobs"]
    return roots


def read_whole(path: Path) -> bytes:
    """The content of a file. Raises: OSError; ValueError if it is larger than anything of its kind."""
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 10**6} MB")
    return content


def content_of(folder: Path, name: str) -> bytes | None:
    """The content of the regular file `name` of `folder`, None where there is none.

    Raises: UserError as `file_in`, or if it cannot be read."""
    path = file_in(folder, name)
    try:
        return None if path is None else read_whole(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): bring a whole copy") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: OSError; ValueError as `parse_json`, or if it is too large."""
    return parse_json(read_whole(path))


def parse_json(content: bytes) -> Any:
    """What JSON says. Raises: ValueError if it is none, is nested too deeply or has a key twice."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
