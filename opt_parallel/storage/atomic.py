"""Files and folders that are complete or absent: written under a temporary name, fsynced, renamed.

Each writer has its own temporary name beside the final path, so two writers never share a file. A writer holds a lock
(flock) on it, which ends with the process. An unlocked temporary file was left by a killed process, and the next writer
of the same path deletes it.
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

PARTIAL = ".partial"  # suffix of temporary names
HELD = ".writing"  # the locked file in an unfinished folder: NFS cannot lock a folder
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
NOT_OPENED = {errno.EACCES, errno.EPERM, errno.EISDIR}  # errors of opening a folder that is writable but not readable
_warned: set[str] = set()


@contextmanager
def new_file(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write. It is renamed to `path` when the block ends, and removed after an error. Devices and pipes under
    /dev and /proc are written to directly.

    Args:
        replace: whether to replace an existing file.

    Raises: OSError; FileExistsError without `replace`, also if another process created the file meanwhile.
    """
    is_special = path.exists() and not path.is_file()
    if is_special and path.absolute().parts[1] in ("dev", "proc"):
        with open(path, "wb") as file:
            yield file
        return
    path = path if is_special else Path(os.path.realpath(path))  # a symbolic link is kept, its target replaced
    with _unfinished(path, folder=False) as (partial, file):
        yield file
        file.flush()
        confirm(file.fileno(), path)
        file.close()  # some file systems cannot rename an open file
        (os.replace if replace else _rename_to_new)(partial, path)
    _confirm_names(path.parent)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a file atomically, in UTF-8. Raises: OSError, as `new_file`."""
    write_bytes(path, text.encode(), replace)


def write_bytes(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file atomically. Raises: OSError, as `new_file`."""
    with new_file(path, replace) as file:
        file.write(content)


def free_name(path: Path, why: str) -> Path:
    """A free path to move `path` to: `step-8.damaged`, or with the first free number, `step-8.damaged1`."""
    names = (path.with_name(f"{path.name}.{why}{number or ''}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill. It is renamed to `path` when the block ends, and removed after an error.

    Args:
        replace: whether to replace an existing folder; an empty one is always replaced.

    Raises: OSError; without `replace` ENOTEMPTY or EEXIST, also if another process created the folder meanwhile.
    """
    with _unfinished(path, folder=True) as (partial, held):
        yield partial
        fsync_tree(partial)
        held.close()
        (partial / HELD).unlink()
        sync(partial)
        if replace:
            _exchange(partial, path)
        else:
            os.rename(partial, path)
    _confirm_names(path.parent)


def beside(path: Path) -> Path:
    """A temporary name for `path`, unique to this process."""
    return path.with_name(f"{path.name}.{process.host()}-{secrets.token_hex(4)}{PARTIAL}")


def publish(partial: Path, path: Path) -> None:
    """Fsync a complete file or folder and rename it to `path`. Raises: OSError; a folder at `path` must be empty."""
    fsync_tree(partial) if partial.is_dir() else sync(partial)
    os.rename(partial, path)
    _confirm_names(path.parent)


def fsync_tree(folder: Path) -> None:
    """Fsync every file and folder below `folder`, and `folder`. Raises: OSError."""
    for here, _, names in os.walk(folder):
        for name in names:
            sync(Path(here, name))
        sync(Path(here))


def sync(path: Path) -> None:
    """Fsync a file or folder. A file system without fsync gives one warning. Raises: OSError."""
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
    """Delete a file or folder. Returns whether it is gone; a failure is a warning, given once, since nothing that was
    saved depends on it."""
    is_folder = path.is_dir() and not path.is_symlink()
    try:
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)  # deletes what it can
        if os.path.lexists(path):
            shutil.rmtree(path) if is_folder else path.unlink()
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        _warn(f"{path} cannot be deleted yet ({error.strerror}); it does no harm, and is tried again later")
    return not os.path.lexists(path)


def remove_leftovers(path: Path, any_host: bool = False) -> None:
    """Delete the temporary files and folders of `path` that killed processes of this host left. `any_host`: those of
    other hosts too, whose locks may not be visible here; only where the caller is the single writer."""
    host = "*" if any_host else glob.escape(process.host())
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.{host}-????????{PARTIAL}"):
        held = leftover / HELD if leftover.is_dir() else leftover
        if any_host and not held.exists():
            remove(leftover)  # its writer was killed while it deleted the folder
            continue
        with suppress(OSError):  # leave it: it may still be in use
            number = os.open(held, os.O_RDWR)
            try:
                if hold(number):
                    renamed = beside(path)
                    os.rename(leftover, renamed)  # fails if its writer has published it meanwhile
                    remove(renamed)
            finally:
                os.close(number)


@contextmanager
def _unfinished(path: Path, folder: bool) -> Iterator[tuple[Path, BinaryIO]]:
    """A temporary file or folder beside `path`, and its locked file; removed at the end unless renamed."""
    remove_leftovers(path)
    file, partial = None, path
    try:
        while file is None or not os.path.exists(file.name):  # another process may have deleted it before it was locked
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
            with suppress(OSError):  # close flushes once more; the first error is already being raised
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
    """Rename; fail if `path` exists."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(partial, path)


def _exchange(partial: Path, path: Path) -> None:
    """Replace the folder at `path`; restore it if the rename fails."""
    earlier = beside(path)
    with suppress(FileNotFoundError):
        os.rename(path, earlier)
    try:
        os.rename(partial, path)
    except OSError:
        with suppress(OSError):
            os.rename(earlier, path)
        raise
    remove(earlier)


def confirm(number: int, path: Path) -> None:
    """Fsync an open file; a file system without fsync gives one warning. Raises: OSError."""
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
    """Fsync a folder after a rename. A failure is a warning: the file is complete."""
    try:
        sync(folder)
    except OSError as error:
        _warn(f"the disk did not confirm the names in {folder} ({error.strerror}): a power failure may cost the last")


@contextmanager
def optional(path: Path, done: str = "written") -> Iterator[None]:
    """Around work that the run does not depend on, such as a log or a plot: an OSError becomes one warning."""
    try:
        yield
    except OSError as error:
        _warn(f"{path} cannot be {done} ({error.strerror or error}): the run continues", once_for=str(path))


def _warn(text: str, once_for: str | None = None) -> None:
    """Warn once a process; not in worker processes, which are many."""
    key = once_for or text
    if key not in _warned and multiprocessing.parent_process() is None:
        _warned.add(key)
        say(f"warning: {text}")
