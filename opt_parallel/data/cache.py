"""Folders of `data.cache`, made by one process while the others wait: whole or absent.

Every rank asks for what it needs before any process group exists; the first one there does the work under a file lock,
the others wait and find it done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from opt_parallel.config import Run
from opt_parallel.data.failure import failure_of, forget_failure, tell_failure
from opt_parallel.data.workers import Unfinished
from opt_parallel.errors import UserError
from opt_parallel.storage.atomic import PARTIAL, publish, remove

FORMAT = 4  # of what is in them: a change of what is written makes all older ones unfindable


def cached(run: Run, kind: str, made_from: list[Any], formerly: list[Any] | None = None) -> Path:
    """The folder of `kind` by a fingerprint of what it is made from; that of `formerly`, by which earlier versions
    called it, if there is that one alone."""
    folder, former = (Path(run.data.cache) / f"{kind}-{fingerprint(each)}" for each in (made_from, formerly or []))
    return former if formerly and former.exists() and not folder.exists() else folder


def fingerprint(made_from: list[Any]) -> str:
    """Of what a folder is made from, for its name."""
    return hashlib.sha256(json.dumps([FORMAT, *made_from]).encode()).hexdigest()[:16]


def whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, made by `fill(a temporary folder)` unless it is there: renamed once complete, so whole or absent.

    What `fill` left there when it was killed, or the disk was full, it finds again; a mistake of the user's leaves
    nothing.

    Raises: `UserError`; a rank that waited for another's failure raises that one's, not hours later its own."""
    if folder.exists():  # without the lock: a cache that is already filled may be read-only
        return folder
    partial = Path(f"{folder}{PARTIAL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        before = failure_of(folder)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return folder
            failure = failure_of(folder)
            if failure and failure != before:
                raise UserError(failure.words)
            partial.mkdir(exist_ok=True)
            try:
                fill(partial)
                publish(partial, folder)
                forget_failure(folder)
            except UserError as error:
                tell_failure(folder, str(error))
                if not isinstance(error, Unfinished):
                    remove(partial)
                raise
    except OSError as error:  # the sources' own are UserErrors
        raise UserError(f"data.cache={folder.parent} cannot be written ({error}): choose another data.cache") from error
    return folder
