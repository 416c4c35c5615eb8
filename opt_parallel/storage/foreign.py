"""Files of untrusted folders: only regular files inside the folder are read, up to a size limit.

A symbolic link out of the folder could put any file of this machine into an export; reading a device or a named pipe
might never end.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.checked import without_duplicates

POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024  # what Git LFS leaves instead of a file
MOST_BYTES = 100_000_000  # size limit; an index of 175B's weights has 0.1 MB, a large tokenizer 35 MB


def file_in(folder: Path, name: str) -> Path | None:
    """The regular file `name` of `folder`; None if there is none.

    Raises: UserError for a link out of the folder, anything but a regular file, or a Git LFS pointer."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_symlink():
            return None
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist: copy the file there") from error
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a circle of links, a NUL in a name
        raise UserError(f"{str(path)!r:.300} cannot be read ({one_line(error):.300}): use a complete copy") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise UserError(f"{path} leads out of its folder, to {target}: copy the file itself there, or remove the link")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file: use a complete copy")
    check_fetched(path, str(path))
    return path


def check_fetched(path: Path, where: str) -> None:
    """Raise UserError if the file is a Git LFS pointer."""
    if path.stat().st_size < POINTER_BYTES:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{where} is a pointer of Git LFS, not the file: fetch it with git lfs pull")


def _roots(folder: Path) -> list[Path]:
    """Folders that a file of `folder` may be in: `folder` itself and, if it is a snapshot in the hub's cache, the
    repository's `blobs` and the `blobs` shared by all repositories."""
    here = folder.resolve()
    roots = [here]
    for parent in (here, *here.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots += [repository / "blobs", repository.parent / "blobs"]
    return roots


def read_limited(path: Path) -> bytes:
    """The content of a file. Raises: OSError; ValueError if it is larger than `MOST_BYTES`."""
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 10**6} MB")
    return content


def content_of(folder: Path, name: str) -> bytes | None:
    """The content of the regular file `name` of `folder`; None if there is none.

    Raises: UserError as `file_in`, or if it cannot be read."""
    path = file_in(folder, name)
    try:
        return None if path is None else read_limited(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): use a complete copy") from error


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises: OSError; ValueError as `parse_json`, or if it is too large."""
    return parse_json(read_limited(path))


def parse_json(content: bytes) -> Any:
    """The value of a JSON text. Raises: ValueError if it is malformed, nested too deeply or has a key twice."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
