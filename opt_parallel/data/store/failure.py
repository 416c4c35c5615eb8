"""Records why a folder of `data.cache` could not be filled, for the processes that wait for this folder."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.storage.atomic import write_text

UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class Failure:
    """The message of a failure, and a random `mark` that distinguishes failures with equal messages.

    The mark is not a time, because the clocks of hosts differ."""

    message: str
    mark: str

    @property
    def is_final(self) -> bool:
        """Whether the data are the cause, so that other hosts fail too."""
        return not self.mark.startswith(UNFINISHED)


def record_failure(folder: Path, message: str, unfinished: bool = False) -> None:
    """Write a failure with this message to a file beside `folder`. Raises: OSError.

    After an `unfinished` failure, other hosts can continue the work."""
    write_text(_file_of(folder), f"{message}\n{UNFINISHED if unfinished else ''}{secrets.token_hex(8)}\n")


def failure_of(folder: Path) -> Failure | None:
    """The last failure to fill `folder`, or None if the folder was filled since."""
    try:
        message, _, mark = _file_of(folder).read_text(encoding="utf-8").removesuffix("\n").rpartition("\n")
    except FileNotFoundError:
        return None
    return Failure(message or mark, mark)


def forget_failure(folder: Path) -> None:
    _file_of(folder).unlink(missing_ok=True)


def _file_of(folder: Path) -> Path:
    return Path(f"{folder}.failed")
