"""Read files from untrusted folders. Only regular files inside the folder are read, up to a size limit.

A symbolic link out of the folder could copy any file of this host into an export. Reading a device or a named pipe
might never end.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.checked import without_duplicates

# The start and maximum size of Git LFS's placeholder for a file.
POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
MOST_BYTES = 100_000_000  # maximum size; the weight index of OPT-175B has 0.1 MB, a large tokenizer.json 35 MB


def file_in(folder: Path, name: str) -> Path | None:
    """The path of the regular file `name` in `folder`, or None if the file does not exist.

    Raises: UserError for a link out of the folder, for a path that is not a regular file, and for a Git LFS pointer."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_symlink():
            return None
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist: copy the file there") from error
    except (OSError, RuntimeError, ValueError) as error:  # the name is too long or holds a NUL, or links form a cycle
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
    """The folders that may contain the files of `folder`. A snapshot in the hub's cache may link to files in the
    repository's `blobs` and in the `blobs` that all repositories share."""
    here = folder.resolve()
    roots = [here]
    for parent in (here, *here.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots += [repository / "blobs", repository.parent / "blobs"]
    return roots


def read_limited(path: Path) -> bytes:
    """The content of a file. Raises: OSError; ValueError if the file is larger than `MOST_BYTES`."""
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 10**6} MB")
    return content


def content_of(folder: Path, name: str) -> bytes | None:
    """The content of the regular file `name` in `folder`, or None if the file does not exist.

    Raises: UserError as `file_in`, or if the file cannot be read."""
    path = file_in(folder, name)
    try:
        return None if path is None else read_limited(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): use a complete copy") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises: OSError; ValueError as `parse_json`, or if the file is too large."""
    return parse_json(read_limited(path))


def parse_json(content: bytes) -> Any:
    """The value of a JSON text. Raises: ValueError if the text is malformed or nested too deeply, or if a key occurs
    twice."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=without_duplicates)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
