"""Atomic writes. A file or folder is written under a temporary name, fsynced, and renamed to its final path.

Each writer has its own temporary name in the folder of the final path, so two writers never share a file. A writer
holds a lock (flock) on its temporary file, and the kernel releases this lock when the process ends. An unlocked
temporary file was therefore left by a killed process, and the next writer of the same path deletes it.
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
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from opt_parallel.runtime import process
from opt_parallel.runtime.log import say

PARTIAL = ".partial"  # Suffix of temporary names.
HELD = ".writing"  # The locked file in a temporary folder, since NFS cannot lock a folder.
ABANDONED = 3600.0  # Seconds without a locked file after which the writer of a temporary folder was killed.
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
NOT_OPENED = {errno.EACCES, errno.EPERM, errno.EISDIR}  # errors when opening a folder that is writable but not readable
_warned: set[str] = set()


@contextmanager
def new_file(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file for writing, which is renamed to `path` when the block ends and removed after an error.
    Devices and pipes under /dev and /proc are written directly.

    Args:
        replace: whether to replace an existing file.

    Raises: OSError. Without `replace`, FileExistsError if the file exists, even if another process created it
    meanwhile.
    """
    is_special = path.exists() and not path.is_file()
    if is_special and path.absolute().parts[1] in ("dev", "proc"):
        with open(path, "wb") as file:
            yield file
        return
    path = path if is_special else Path(os.path.realpath(path))  # a symbolic link stays, and its target is replaced
    with _unfinished(path, folder=False) as (partial, file):
        yield file
        file.flush()
        confirm(file.fileno(), path)
        file.close()  # some file systems cannot rename an open file
        (os.replace if replace else _rename_to_new)(partial, path)
    _confirm_names(path.parent)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a text file atomically in UTF-8. Raises: OSError, as `new_file`."""
    write_bytes(path, text.encode(), replace)


def write_bytes(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file atomically. Raises: OSError, as `new_file`."""
    with new_file(path, replace) as file:
        file.write(content)


def free_name(path: Path, why: str) -> Path:
    """An unused path to which `path` can be moved, such as `step-8.damaged`, or if that exists,
    `step-8.damaged1` or the next free number."""
    names = (path.with_name(f"{path.name}.{why}{number or ''}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `path` when the block ends and removed after an error.

    Args:
        replace: whether to replace an existing folder; an empty folder is always replaced.

    Raises: OSError. Without `replace`, the OSError has the errno ENOTEMPTY or EEXIST if the folder exists, even if
    another process created the folder meanwhile.
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


@contextmanager
def into_folder(path: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder inside the existing folder `path`. When the block ends, its files are moved into `path`,
    the file `last` after all others. After an error it is removed. Raises: OSError."""
    with _unfinished(path / "adding", folder=True) as (partial, _):
        yield partial
        fsync_tree(partial)
        for name in sorted(os.listdir(partial), key=lambda name: name == last):
            if name != HELD:
                os.replace(partial / name, path / name)
    _confirm_names(path)


def beside(path: Path) -> Path:
    """A temporary name for `path`, unique to this process."""
    return path.with_name(f"{path.name}.{process.host()}-{secrets.token_hex(4)}{PARTIAL}")


def publish(partial: Path, path: Path) -> None:
    """Fsync a complete file or folder and rename it to `path`. Raises: OSError; a folder at `path` must be empty."""
    fsync_tree(partial) if partial.is_dir() else sync(partial)
    os.rename(partial, path)
    _confirm_names(path.parent)


def fsync_tree(folder: Path) -> None:
    """Fsync `folder` and every file and folder below it. Raises: OSError."""
    for here, _, names in os.walk(folder):
        for name in names:
            sync(Path(here, name))
        sync(Path(here))


def sync(path: Path) -> None:
    """Fsync a file or folder. If the file system does not support fsync, warn once. Raises: OSError."""
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
    """Delete a file or folder and return whether the deletion succeeded. A failure is only a warning, printed once,
    since saved data does not depend on the deletion."""
    is_folder = path.is_dir() and not path.is_symlink()
    try:
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)  # this deletes as many files as possible
        if os.path.lexists(path):
            shutil.rmtree(path) if is_folder else path.unlink()
    except FileNotFoundError:
        pass  # another process deleted the file first
    except OSError as error:
        _warn(f"{path} cannot be deleted yet ({error.strerror}): the run continues, and deletes it later")
    return not os.path.lexists(path)


def remove_leftovers(path: Path, any_host: bool = False) -> None:
    """Delete the temporary files and folders of `path` that killed processes of this host left. With `any_host`, also
    delete the temporary files of other hosts. Locks of other hosts may not be visible on this host, so only the single
    writer of `path` may pass `any_host`."""
    host = "*" if any_host else glob.escape(process.host())
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.{host}-????????{PARTIAL}"):
        held = leftover / HELD if leftover.is_dir() else leftover
        with suppress(OSError):  # after an error the file stays, since it may still be in use
            if not held.exists() and (any_host or time.time() - leftover.stat().st_mtime > ABANDONED):
                remove(leftover)  # the writer was killed before it made the locked file, or after it deleted it
                continue
            number = os.open(held, os.O_RDWR)
            try:
                if hold(number):
                    renamed = beside(path)
                    os.rename(leftover, renamed)  # this call fails if the writer has renamed its file
                    remove(renamed)
            finally:
                os.close(number)


@contextmanager
def _unfinished(path: Path, folder: bool) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a temporary file or folder for `path` and its locked file. The temporary file or folder is removed at the
    end unless it was renamed."""
    remove_leftovers(path)
    file, partial = None, path
    try:
        while file is None or not os.path.exists(file.name):  # another process may delete the file before it is locked
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
            # `close` flushes again and may fail again. The first error is already being raised.
            with suppress(OSError):
                file.close()
        if partial != path:
            remove(partial)


def hold(number: int) -> bool | None:
    """Lock an open file against other processes. Returns False if another process holds the lock, and None if the file
    system has no locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _rename_to_new(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`. Raises: FileExistsError if `path` exists."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(partial, path)


def _exchange(partial: Path, path: Path) -> None:
    """Replace the folder at `path` by `partial`, and restore the original folder if the rename fails."""
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
    """Fsync an open file. If the file system does not support fsync, warn once. Raises: OSError."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        _warn(
            f"the file system of {path.parent} does not support fsync ({error.strerror}): a power failure may lose "
            "the files that were written last",
            once_for="fsync",
        )


def _confirm_names(folder: Path) -> None:
    """Fsync a folder after a file in it was renamed. A failure is only a warning, because the file itself is
    complete."""
    try:
        sync(folder)
    except OSError as error:
        _warn(f"{folder} cannot be fsynced ({error.strerror}): a power failure may lose its newest files")


@contextmanager
def optional(path: Path, done: str = "written") -> Iterator[None]:
    """Turn an OSError in the block into one warning. This context is for output that the run does not depend on, such
    as a log or a plot."""
    try:
        yield
    except OSError as error:
        _warn(f"{path} cannot be {done} ({error.strerror or error}): the run continues", once_for=str(path))


def _warn(text: str, once_for: str | None = None) -> None:
    """Print a warning once in this process. Worker processes print no warning, because there are many of them."""
    key = once_for or text
    if key not in _warned and multiprocessing.parent_process() is None:
        _warned.add(key)
        say(f"warning: {text}")
