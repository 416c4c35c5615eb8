"""What stopped the filling of a folder of `data.cache`, told to all who wait for it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.storage.atomic import write_text


@dataclass(frozen=True)
class Failure:
    """`mark` sets one failure apart from another of the same words; no clock does, as two hosts' may differ."""

    words: str
    mark: str


def tell_failure(folder: Path, words: str) -> None:
    """Leave a failure beside the folder. Raises: OSError."""
    write_text(_file_of(folder), f"{words}\n{secrets.token_hex(8)}\n")


def failure_of(folder: Path) -> Failure | None:
    """The last failure, None if there was none since the folder was filled."""
    try:
        words, _, mark = _file_of(folder).read_text(encoding="utf-8").removesuffix("\n").rpartition("\n")
    except FileNotFoundError:
        return None
    return Failure(words or mark, mark)


def forget_failure(folder: Path) -> None:
    _file_of(folder).unlink(missing_ok=True)


def _file_of(folder: Path) -> Path:
    return Path(f"{folder}.failed")
