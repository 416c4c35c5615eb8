"""Builds each folder of the cache (`data.cache`) once, while other processes wait for the folder.

A folder has its final name only after it is complete. Ranks prepare data before any process group exists. The first
rank of a host that gets the host's file lock builds the folder. The other ranks of the host wait for the lock, and then
use the complete folder. Hosts that share the cache divide the work by claims (`storage/claims.py`): of a token store,
each host builds some parts, and any other folder is built by one host.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from filelock import FileLock

from opt_parallel.config.paths import reach
from opt_parallel.data.store.failure import Failure, failure_of, forget_failure, record_failure
from opt_parallel.data.store.workers import Unfinished
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.process import host
from opt_parallel.storage.atomic import PARTIAL, publish, remove, write_text
from opt_parallel.storage.checked import dump_checked, read_checked
from opt_parallel.storage.claims import Claims

FORMAT = 4  # part of every fingerprint. When the content of folders changes, a new number makes all folders invalid.


def cached(cache: str, kind: str, key: list[Any], former_key: list[Any] | None = None) -> Path:
    """The path of a folder in `cache`, whose name consists of its `kind` and of the fingerprint of `key`.

    Earlier versions used `former_key`. The result is the folder of that key if only that folder exists. Raises:
    UserError if `data.cache` cannot be read."""
    reach("data.cache=", cache)
    folder, former = (Path(cache) / f"{kind}-{fingerprint(each)}" for each in (key, former_key or []))
    return former if former_key and former.exists() and not folder.exists() else folder


def fingerprint(key: list[Any]) -> str:
    """A hash of `key` with 16 hexadecimal digits, as a part of a folder's name."""
    return hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()[:16]


class Published(Exception):
    """Ends the work on a folder that another host has completed."""


class Failed(UserError):
    """The error of another process that failed to fill a folder."""


def build_once(folder: Path, fill: Callable[[Path], None], checked: bool = True) -> Path:
    """`build_together` for a folder that one process fills alone."""

    def alone(temporary: Path, claims: Claims) -> None:
        claims.only("fill")
        fill(temporary)

    return build_together(folder, alone, checked)


def build_together(folder: Path, fill: Callable[[Path, Claims], None], checked: bool = True) -> Path:
    """Return `folder`, and if necessary call `fill` with a temporary folder before, which is renamed to `folder`.

    Several hosts call `fill` with the same temporary folder. It divides the work by its claims, and returns in the
    process that has the claim to complete the folder.

    If the process is killed or the disk is full, the temporary folder remains, and the next call of `fill` continues in
    it. After any other UserError, the temporary folder is removed. If `checked`, a file beside the folder holds
    checksums, which are compared in each call.

    Raises: `UserError`. A rank or host that waited while another one failed raises the same error."""
    if folder.exists():  # does not need the lock, because a complete cache may be read-only
        if checked:
            _compare(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        before, temporary = failure_of(folder), Path(f"{folder}{PARTIAL}")
        with FileLock(f"{folder}.{host()}.lock"):
            look = partial(_look, folder, failure_of(folder))
            try:
                _look(folder, before, every=True)
                try:
                    _build(folder, temporary, fill, Claims(Path(f"{folder}.claims"), look), checked)
                except OSError:
                    look()  # another host has completed the folder, or has removed it after an error
                    raise
            except Published:
                remove(temporary)
    except OSError as error:  # the cache has failed, because a text file that cannot be read raises a UserError
        raise UserError(f"data.cache={folder.parent} cannot be written ({error}): choose another data.cache") from error
    return folder


def _look(folder: Path, before: Failure | None, every: bool = False) -> None:
    """Raise Published if the folder is complete, and Failed if another process has failed to fill it since.

    Unless `every` failure counts, those after which this process can continue the work do not."""
    if folder.exists():
        raise Published
    failure = failure_of(folder)
    if failure and failure != before and (every or failure.is_final):
        raise Failed(failure.message)


def _build(folder: Path, temporary: Path, fill: Callable[[Path, Claims], None], claims: Claims, checked: bool) -> None:
    """Fill and publish a folder. If this fails, record the failure for other processes."""
    with claims.living():
        temporary.mkdir(exist_ok=True)
        claims.look()
        try:
            try:
                fill(temporary, claims)
                if checked:
                    write_text(_checksums(folder), dump_checked(_checksums_in(temporary)))
                publish(temporary, folder)
                forget_failure(folder)
            except (OSError, UserError):
                claims.look()  # another host may have completed the folder, or removed it after an error
                raise
        except Failed:
            remove(temporary)
            raise
        except UserError as error:
            record_failure(folder, str(error), isinstance(error, Unfinished))
            if not isinstance(error, Unfinished):
                remove(temporary)
            raise
    remove(claims.folder)  # another host that has just arrived notices that the folder is complete


def _checksums(folder: Path) -> Path:
    return Path(f"{folder}.checksums")


def _checksums_in(folder: Path) -> dict[str, str]:
    return {path.name: f"{crc32(path.read_bytes()):08x}" for path in sorted(folder.iterdir())}


def _compare(folder: Path) -> None:
    """Raise UserError if a file in `folder` differs from its checksum. Old folders may have no checksums."""
    try:
        written = read_checked(_checksums(folder))
        wrong = [name for name, checksum in _checksums_in(folder).items() if written.pop(name, checksum) != checksum]
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be checked ({error}): remove this folder, and the next start builds it again"
        ) from error
    if wrong := [*wrong, *written]:
        raise UserError(
            f"{folder / wrong[0]} differs from its checksum: remove {folder}, and the next start builds it again"
        )
