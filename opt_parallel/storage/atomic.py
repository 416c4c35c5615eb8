"""Files and folders that are complete or absent: written beside their place, confirmed by the disk (fsync), renamed.

Each writer has a name of its own beside the place, so that two of them never meet in one file. While it writes it holds
a lock (flock), which ends with the process: what nobody holds was left by a killed one, and the next writer of the same
file deletes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import multiprocessing
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from opt_parallel.runtime import process
from opt_parallel.runtime.log import say

PARTIAL = ".partial"  # what the name of anything unfinished ends with
HELD = ".writing"  # the locked file in an unfinished folder: a folder itself cannot be locked on NFS
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
NOT_OPENED = {errno.EACCES, errno.EPERM, errno.EISDIR}  # a folder that may be written to, but not opened
_said: set[str] = set()


@contextmanager
def new_file(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write, called `path` once the block has ended without an error; after one nothing of it is left. What
    is in /dev and no file is written to as it is.

    Args:
        replace: whether an existing file gives way.

    Raises: OSError; FileExistsError without `replace`, also where another process was faster.
    """
    is_special = path.exists() and not path.is_file()
    if is_special and path.absolute().parts[1] in ("dev", "proc"):
        with open(path, "wb") as file:
            yield file
        return
    path = path if is_special else Path(os.path.realpath(path))  # a link to a file stays one
    with _unfinished(path, folder=False) as (partial, file):
        yield file
        file.flush()
        confirm(file.fileno(), path)
        file.close()  # some file systems rename no open file
        (os.replace if replace else _rename_to_new)(partial, path)
    _confirm_names(path.parent)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a whole file in UTF-8. Raises: OSError, as `new_file`."""
    write_bytes(path, text.encode(), replace)


def write_bytes(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a whole file. Raises: OSError, as `new_file`."""
    with new_file(path, replace) as file:
        file.write(content)


def free_name(path: Path, why: str) -> Path:
    """Where something can be moved aside: `step-8.damaged`, or with the first number after it that is not taken."""
    names = (path.with_name(f"{path.name}.{why}{number or ''}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, called `path` once the block has ended without an error; after one nothing of it is left.

    Args:
        replace: whether an existing folder gives way; an empty one always does.

    Raises: OSError; without `replace` ENOTEMPTY or EEXIST, also where another process was faster.
    """
    with _unfinished(path, folder=True) as (partial, held):
        yield partial
        sync_below(partial)
        held.close()
        (partial / HELD).unlink()
        sync(partial)
        if replace:
            _exchange(partial, path)
        else:
            os.rename(partial, path)
    _confirm_names(path.parent)


def beside(path: Path) -> Path:
    """A name for what will be `path`, that no other process writes to."""
    return path.with_name(f"{path.name}.{process.host()}-{secrets.token_hex(4)}{PARTIAL}")


def publish(partial: Path, path: Path) -> None:
    """Give a file or folder that is complete its name. Raises: OSError; a folder at `path` must be empty."""
    sync_below(partial) if partial.is_dir() else sync(partial)
    os.rename(partial, path)
    _confirm_names(path.parent)


def sync_below(folder: Path) -> None:
    """Have the disk confirm every file in a folder, and the names of them all. Raises: OSError."""
    for here, _, names in os.walk(folder):
        for name in names:
            sync(Path(here, name))
        sync(Path(here))


def sync(path: Path) -> None:
    """Have the disk confirm a file's bytes, or the names in a folder; a file system that has no such thing is passed
    over, and that said once. Raises: OSError."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in NOT_OPENED and path.is_dir():
            return
        raise
    try:
        confirm(number, path)
    finally:
        os.close(number)


def remove(path: Path) -> bool:
    """Delete a file or folder; whether it is gone. Why it is not is said once, and is no error: whether something else
    was saved does not depend on it."""
    is_folder = path.is_dir() and not path.is_symlink()
    try:
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)  # as much as goes
        if os.path.lexists(path):
            shutil.rmtree(path) if is_folder else path.unlink()
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        _warn(f"{path} cannot be deleted yet ({error.strerror}); it does no harm, and is tried again later")
    return not os.path.lexists(path)


def remove_leftovers(path: Path, any_host: bool = False) -> None:
    """Delete what killed processes left beside `path` of what they wrote there: those of this host, since locks may not
    reach another; those of `any_host` where only one process writes at a time."""
    host = "*" if any_host else glob.escape(process.host())
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.{host}-????????{PARTIAL}"):
        held = leftover / HELD if leftover.is_dir() else leftover
        if any_host and not held.exists():
            remove(leftover)  # killed as it was deleted
            continue
        with suppress(OSError):  # then nobody can tell whether it is still written
            number = os.open(held, os.O_RDWR)
            try:
                if hold(number):
                    aside = beside(path)
                    os.rename(leftover, aside)  # fails if its writer has finished it meanwhile
                    remove(aside)
            finally:
                os.close(number)


@contextmanager
def _unfinished(path: Path, folder: bool) -> Iterator[tuple[Path, BinaryIO]]:
    """An unfinished file or folder beside `path`, and the file that is held; what is left of it at the end goes."""
    remove_leftovers(path)
    file, partial = None, path
    try:
        while file is None or not os.path.exists(file.name):  # another process may have taken it for a leftover
            partial = beside(path)
            if folder:
                partial.mkdir(parents=True)
            file = open(partial / HELD if folder else partial, "xb")  # noqa: SIM115
            if hold(file.fileno()) is False:
                file.close()
                file = None
        yield partial, file
    finally:
        if file is not None:
            with suppress(OSError):  # what could not be written is tried once more; after an error, which is on its way
                file.close()
        if partial != path:
            remove(partial)


def hold(number: int) -> bool | None:
    """Lock an open file against other processes: False if another holds it, None where there are no locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _rename_to_new(partial: Path, path: Path) -> None:
    """Rename, but not over an existing file."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(partial, path)


def _exchange(partial: Path, path: Path) -> None:
    """Rename, what is at `path` out of the way; that comes back if the other cannot be renamed."""
    aside = beside(path)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
    try:
        os.rename(partial, path)
    except OSError:
        with suppress(OSError):
            os.rename(aside, path)
        raise
    remove(aside)


def confirm(number: int, path: Path) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        _warn(
            f"the file system of {path.parent} confirms nothing (fsync: {error.strerror}): a power failure may cost "
            "what was written last",
            once_for="fsync",
        )


def _confirm_names(folder: Path) -> None:
    """After a rename, when all is there: what fails here is a warning."""
    try:
        sync(folder)
    except OSError as error:
        _warn(f"the disk did not confirm the names in {folder} ({error.strerror}): a power failure may cost the last")


@contextmanager
def optional(path: Path, done: str = "written") -> Iterator[None]:
    """Around what a run does not depend on, as the writing of a file that only tells of it: a failure is said, once."""
    try:
        yield
    except OSError as error:
        _warn(f"{path} cannot be {done} ({error.strerror or error}): the run goes on", once_for=str(path))


def _warn(text: str, once_for: str | None = None) -> None:
    """Once a process, and not in those that prepare text: there are many."""
    key = once_for or text
    if key not in _said and multiprocessing.parent_process() is None:
        _said.add(key)
        say(f"warning: {text}")
