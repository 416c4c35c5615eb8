"""A lock on a folder, so that one process at a time writes there. A crash leaves no stale lock.

The writing process keeps the file `lock` in the folder open and locked (flock), and the kernel releases this lock when
the process ends. On some file systems locks are missing or not visible to other hosts. The file `lock` therefore also
names the process and holds a heartbeat counter, which the process increments every few seconds. A waiting process
watches whether the counter grows, so hosts' clocks need not agree.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError, leave
from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import confirm, hold

LOCK = "lock"
# Seconds between two heartbeats, and seconds without a heartbeat after which a process counts as dead.
BEAT, SILENT = 5.0, 60.0
EXIT_TIMEOUT = 2.0  # Seconds that a process may take to exit.
POLL = 0.5  # Seconds between two reads of the lock file.
SIZE = 512  # Size of the lock file in bytes; each heartbeat overwrites the file.
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Writer:
    """The process that holds a folder's lock. `kernel` is equal for processes on the same running kernel, which see
    each other's locks. `token` is unique to the process."""

    host: str
    process: int
    since: str
    kernel: str
    token: str

    @classmethod
    def this(cls) -> Writer:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(process.host(), os.getpid(), now, running_kernel(), secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


@contextmanager
def only_writer(folder: Path, key: str, beat: float = BEAT, silent: float = SILENT) -> Iterator[None]:
    """Create `folder` and hold its lock while the context lasts.

    If this process wrote no heartbeat for so long that another process took the lock, this process exits at once. A
    read-only folder needs no lock.

    Args:
        key: the key and value that set the folder, such as `run.dir=runs/a`, for messages.
        beat, silent: times in seconds, see `BEAT` and `SILENT`.

    Raises: UserError that names the other process, or the reason why the folder cannot be written.
    """
    path, this, ended = folder / LOCK, Writer.this(), threading.Event()
    number = _open(path, key)
    if number is None:
        yield
        return
    thread = threading.Thread(target=_beat, args=(number, path, key, this, ended, beat), daemon=True)
    try:
        _take(number, path, key, this, silent)
        thread.start()
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
            with suppress(OSError):  # if this fails, the next process treats the file as left by a crash
                if _writer_in(path) == this:
                    os.ftruncate(number, 0)
        os.close(number)


def _open(path: Path, key: str) -> int | None:
    """Open or create the lock file. Returns None in a read-only folder. Raises: UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno in CLOSED and not os.access(path.parent, os.W_OK):
            return None
        raise _unwritable(key, path, error) from error


def _unwritable(key: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{key}: {path} cannot be written ({error.strerror}): choose another folder")


def _take(number: int, path: Path, key: str, this: Writer, silent: float) -> None:
    """Wait until no other process holds the lock, then write this process's name to the lock file. Raises:
    UserError."""
    refusal = f"{key}: another run writes to this folder, {{}}: wait until that run ends, or choose another run.dir"
    locked, deadline = hold(number), time.monotonic() + EXIT_TIMEOUT
    while (
        locked is False and time.monotonic() < deadline
    ):  # the process that holds the lock may be exiting, or about to write its name
        time.sleep(POLL)
        locked = hold(number)
    other = _writer_in(path)
    # Processes on the same kernel always see each other's locks, so `locked` is certain. Between hosts it may not be.
    same_kernel = other is None or other.kernel == this.kernel
    if locked is False and same_kernel:
        raise UserError(refusal.format(other or "unnamed"))
    if other is not None and not (locked and same_kernel):
        say(f"{path} names {other}: waiting up to {silent:.0f} s for its heartbeat")
        if _beats(path, silent):
            raise UserError(refusal.format(other))
        if locked is False and hold(number) is False:
            raise UserError(f"{refusal.format(other)}; that run gives no heartbeat: if its host is down, remove {path}")
    try:
        _write(number, path, this, 0)
    except OSError as error:
        if not locked:
            raise _unwritable(key, path, error) from error
    if locked is None:
        time.sleep(2 * POLL)
        other = _writer_in(path)
        # Both processes found the folder free, and the other process wrote its name last.
        if other is not None and other != this:
            raise UserError(refusal.format(other))


def _beats(path: Path, silent: float) -> bool:
    """Whether the process named in the lock file writes a heartbeat within `silent` seconds."""
    first, deadline = _content(path), time.monotonic() + silent
    while time.monotonic() < deadline:
        time.sleep(POLL)
        now = _content(path)
        if now != first:
            return bool(now.strip(b"\0"))  # an empty file means that the process exited normally
    return False


def _beat(number: int, path: Path, key: str, this: Writer, ended: threading.Event, beat: float) -> None:
    """Write heartbeats until the context ends."""
    count, pause = 0, POLL  # the first pause is short, since without locks two processes may have found the folder free
    while not ended.wait(pause):
        count, pause = count + 1, beat
        other = _writer_in(path)
        if other is not None and other != this:
            leave(f"{key}: another run, {other}, now writes to this folder, so this run ends", timeout=0.0)
        with suppress(OSError):  # the disk may be full for a while, but the flock still holds
            if not path.exists():
                _create_again(number, path)
            _write(number, path, this, count)


def _create_again(number: int, path: Path) -> None:
    """Create and lock the lock file again, on the same descriptor, after a user removed the file. Raises: OSError."""
    new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    hold(new)
    os.dup2(new, number, inheritable=False)
    os.close(new)


def _write(number: int, path: Path, this: Writer, count: int) -> None:
    text = json.dumps({**asdict(this), "beat": count})
    os.pwrite(number, text.ljust(SIZE - 1).encode()[: SIZE - 1] + b"\n", 0)
    confirm(number, path)  # other hosts see the heartbeat only after an fsync


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a user removed the file
        return b""


def _writer_in(path: Path) -> Writer | None:
    """The process named in the lock file, or None if the file is empty or incomplete."""
    try:
        values = json.loads(_content(path))
        return Writer(**{field.name: values[field.name] for field in fields(Writer)})
    except (ValueError, KeyError, TypeError):
        return None


def running_kernel() -> str:
    """An id of the running kernel, equal in all containers of a host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return process.host()
