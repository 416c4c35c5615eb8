"""Folders of `data.cache`, each built by one process while the others wait. A folder is complete or absent.

Ranks prepare data before any process group exists. The first rank that gets the file lock builds the folder;
the others wait for the lock and then find the folder complete.
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
from opt_parallel.data.store.failure import failure_of, forget_failure, record_failure
from opt_parallel.data.store.workers import Unfinished
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import PARTIAL, publish, remove, write_text
from opt_parallel.storage.checked import dump_checked, read_checked

FORMAT = 4  # part of every fingerprint: raise it when the content changes, so that older folders are not found


def cached(run: Run, kind: str, key: list[Any], former_key: list[Any] | None = None) -> Path:
    """The folder of `kind` named by the fingerprint of `key`. If only the folder of `former_key` exists, which earlier
    versions used, that folder. Raises: UserError if `data.cache` cannot be read."""
    reach("data.cache=", run.data.cache)
    folder, former = (Path(run.data.cache) / f"{kind}-{fingerprint(each)}" for each in (key, former_key or []))
    return former if former_key and former.exists() and not folder.exists() else folder


def fingerprint(key: list[Any]) -> str:
    """16 hexadecimal digits for a folder's name."""
    return hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()[:16]


def build_once(folder: Path, fill: Callable[[Path], None], checked: bool = True) -> Path:
    """Return `folder`; if it is absent, first call `fill(temporary folder)` and rename the result.

    After a kill or a full disk, the temporary folder stays, and the next `fill` continues in it. Another UserError
    removes it. `checked`: keep checksums beside the folder and compare them at each call.

    Raises: `UserError`. A rank that waited while another rank failed raises that rank's error at once."""
    if folder.exists():  # without the lock: a filled cache may be read-only
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
                raise UserError(failure.message)
            partial.mkdir(exist_ok=True)
            try:
                fill(partial)
                if checked:
                    write_text(_checksums(folder), dump_checked(_checksums_in(partial)))
                publish(partial, folder)
                forget_failure(folder)
            except UserError as error:
                record_failure(folder, str(error))
                if not isinstance(error, Unfinished):
                    remove(partial)
                raise
    except OSError as error:  # an unreadable source is a UserError already
        raise UserError(f"data.cache={folder.parent} cannot be written ({error}): choose another data.cache") from error
    return folder


def _checksums(folder: Path) -> Path:
    return Path(f"{folder}.checksums")


def _checksums_in(folder: Path) -> dict[str, str]:
    return {path.name: f"{crc32(path.read_bytes()):08x}" for path in sorted(folder.iterdir())}


def _compare(folder: Path) -> None:
    """Raise UserError if a file of the folder differs from its checksum, where checksums exist."""
    try:
        written = read_checked(_checksums(folder))
        wrong = [name for name, checksum in _checksums_in(folder).items() if written.pop(name, checksum) != checksum]
    except FileNotFoundError:
        return  # earlier versions wrote no checksums
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be checked ({error}): remove it, and it is built again") from error
    if wrong := [*wrong, *written]:
        raise UserError(f"{folder / wrong[0]} differs from its checksum: remove {folder}, and it is built again")
