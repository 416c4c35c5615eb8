"""Folders of `data.cache`, made by one process while the others wait: whole or absent.

Every rank asks for what it needs before any process group exists; the first one there does the work under a file lock,
the others wait and find it done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from opt_parallel.config import Run
from opt_parallel.data.filling import flush
from opt_parallel.data.workers import Unfinished
from opt_parallel.errors import UserError

FORMAT = 4  # of what is in them: a change of what is written makes all older ones unfindable


def cached(run: Run, kind: str, made_from: list[Any]) -> Path:
    """The folder of `kind` by a fingerprint of what it is made from."""
    fingerprint = hashlib.sha256(json.dumps([FORMAT, *made_from]).encode()).hexdigest()[:16]
    return Path(run.data.cache).expanduser() / f"{kind}-{fingerprint}"


def whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, made by `fill(a temporary folder)` unless it is there: renamed once complete, so whole or absent.

    What `fill` left there when it was killed, or the disk was full, it finds again; a mistake of the user's leaves
    nothing.

    Raises: `UserError`; a rank that waited for another's failure raises that one's, not hours later its own."""
    if folder.exists():  # without the lock: a cache that is already filled may be read-only
        return folder
    failure, partial = Path(f"{folder}.failed"), Path(f"{folder}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        before = failure.stat().st_mtime_ns if failure.exists() else None
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return folder
            if failure.exists() and failure.stat().st_mtime_ns != before:
                raise UserError(failure.read_text(encoding="utf-8"))
            partial.mkdir(exist_ok=True)
            try:
                fill(partial)
                flush(partial)
                partial.rename(folder)
                failure.unlink(missing_ok=True)
            except UserError as error:
                failure.write_text(str(error), encoding="utf-8")
                if not isinstance(error, Unfinished):
                    shutil.rmtree(partial)
                raise
    except OSError as error:  # the sources' own are UserErrors
        raise UserError(f"data.cache={folder.parent} cannot be written ({error}): choose another data.cache") from error
    return folder
