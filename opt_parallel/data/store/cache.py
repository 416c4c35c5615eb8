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
from zlib import crc32

from filelock import FileLock

from opt_parallel.config.paths import reach
from opt_parallel.config.run import Run
from opt_parallel.data.store.failure import failure_of, forget_failure, tell_failure
from opt_parallel.data.store.workers import Unfinished
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import PARTIAL, publish, remove, write_text
from opt_parallel.storage.checked import dump_checked, read_checked

FORMAT = 4  # of what is in them: a change of what is written makes all older ones unfindable


def cached(run: Run, kind: str, made_from: list[Any], formerly: list[Any] | None = None) -> Path:
    """The folder of `kind` by a fingerprint of what it is made from; that of `formerly`, by which earlier versions
    called it, if there is that one alone. Raises: UserError where `data.cache` cannot be read."""
    reach("data.cache=", run.data.cache)
    folder, former = (Path(run.data.cache) / f"{kind}-{fingerprint(each)}" for each in (made_from, formerly or []))
    return former if formerly and former.exists() and not folder.exists() else folder


def fingerprint(made_from: list[Any]) -> str:
    """Of what a folder is made from, for its name."""
    return hashlib.sha256(json.dumps([FORMAT, *made_from]).encode()).hexdigest()[:16]


def whole(folder: Path, fill: Callable[[Path], None], checked: bool = True) -> Path:
    """`folder`, made by `fill(a temporary folder)` unless it is there: renamed once complete, so whole or absent.

    What `fill` left there when it was killed, or the disk was full, it finds again; a mistake of the user's leaves
    nothing. `checked`: its files are compared with their checksums each time, which are kept beside it.

    Raises: `UserError`; a rank that waited for another's failure raises that one's, not hours later its own."""
    if folder.exists():  # without the lock: a cache that is already filled may be read-only
        if checked:
            _compare(folder)
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
                if checked:
                    write_text(_checksums(folder), dump_checked(_checksums_in(partial)))
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


def _checksums(folder: Path) -> Path:
    return Path(f"{folder}.checksums")


def _checksums_in(folder: Path) -> dict[str, str]:
    return {path.name: f"{crc32(path.read_bytes()):08x}" for path in sorted(folder.iterdir())}


def _compare(folder: Path) -> None:
    """Raise UserError unless the files of a folder are as they were written, where checksums were."""
    try:
        written = read_checked(_checksums(folder))
        wrong = [name for name, checksum in _checksums_in(folder).items() if written.pop(name, checksum) != checksum]
    except FileNotFoundError:
        return  # an earlier version's
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be checked ({error}): remove it, and it is made anew") from error
    if wrong := [*wrong, *written]:
        raise UserError(f"{folder / wrong[0]} is not as it was written: remove {folder}, and it is made anew")
