"""A folder's lock: one process writes at a time, and a crash leaves no stale lock.

The writer keeps the folder's file `lock` open and locked (flock); the lock ends with the process. The file names the
writer and holds a heartbeat, a counter that grows every few seconds, for file systems whose locks do not reach other
hosts or do not exist. A waiting process watches whether the counter grows, so hosts' clocks need not agree.
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
BEAT, SILENT = 5.0, 60.0  # seconds between two heartbeats; seconds without one after which a writer counts as gone
EXIT_TIMEOUT = 2.0  # seconds that a dying process may take
POLL = 0.5  # seconds between two reads of the file
SIZE = 512  # bytes of the file; each heartbeat overwrites it
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Writer:
    """The process that writes. `kernel`: equal for processes that share one kernel's locks; `token`: unique."""

    host: str
    process: int
    since: str
    kernel: str
    token: str

    @classmethod
    def this(cls) -> Writer:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(process.host(), os.getpid(), now, _kernel(), secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


@contextmanager
def only_writer(folder: Path, key: str, beat: float = BEAT, silent: float = SILENT) -> Iterator[None]:
    """Create `folder` and hold its lock while the context lasts.

    If this process was silent so long that another took the lock, this process exits at once. A read-only folder needs
    no lock.

    Args:
        key: the folder as the user set it, for messages.
        beat, silent: seconds, see `BEAT` and `SILENT`.

    Raises: UserError that names the other writer, or why the folder cannot be written.
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
            with suppress(OSError):  # on failure the file looks as after a crash
                if _writer_in(path) == this:
                    os.ftruncate(number, 0)
        os.close(number)


def _open(path: Path, key: str) -> int | None:
    """Open or create the lock's file; None in a read-only folder. Raises: UserError."""
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
    """Wait until no other process writes, then name this one in the file. Raises: UserError."""
    refusal = f"{key}: another run trains there, {{}}: wait until it has ended, or choose another run.dir"
    locked, deadline = hold(number), time.monotonic() + EXIT_TIMEOUT
    while (
        locked is False and time.monotonic() < deadline
    ):  # the other process may be exiting, or about to write its name
        time.sleep(POLL)
        locked = hold(number)
    other = _writer_in(path)
    same_kernel = other is None or other.kernel == this.kernel  # then flock alone decides, if the file system has it
    if locked is False and same_kernel:
        raise UserError(refusal.format(other or "unnamed"))
    if other is not None and not (locked and same_kernel):
        say(f"{path} names {other}: waiting up to {silent:.0f} s for its heartbeat")
        if _beats(path, silent):
            raise UserError(refusal.format(other))
        if locked is False and hold(number) is False:
            raise UserError(f"{refusal.format(other)}; it has no heartbeat: if its host is gone, remove {path}")
    try:
        _write(number, path, this, 0)
    except OSError as error:
        if not locked:
            raise _unwritable(key, path, error) from error
    if locked is None:
        time.sleep(2 * POLL)
        other = _writer_in(path)
        if other is not None and other != this:  # both found the folder free, and the other wrote last
            raise UserError(refusal.format(other))


def _beats(path: Path, silent: float) -> bool:
    """Whether the writer in the file gives a heartbeat within `silent` seconds."""
    first, deadline = _content(path), time.monotonic() + silent
    while time.monotonic() < deadline:
        time.sleep(POLL)
        now = _content(path)
        if now != first:
            return bool(now.strip(b"\0"))  # an empty file: it exited normally
    return False


def _beat(number: int, path: Path, key: str, this: Writer, ended: threading.Event, beat: float) -> None:
    """Write heartbeats until the context ends."""
    count, pause = 0, POLL  # the first soon: without locks across hosts two processes may have found the folder free
    while not ended.wait(pause):
        count, pause = count + 1, beat
        other = _writer_in(path)
        if other is not None and other != this:
            leave(f"{key}: another run trains there now, {other}, and this one ends: they would mix", timeout=0.0)
        with suppress(OSError):  # the disk may be full for now; the lock still holds
            if not path.exists():
                _create_again(number, path)
            _write(number, path, this, count)


def _create_again(number: int, path: Path) -> None:
    """Create and lock the file again after a user removed it, on the same descriptor. Raises: OSError."""
    new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    hold(new)
    os.dup2(new, number, inheritable=False)
    os.close(new)


def _write(number: int, path: Path, this: Writer, count: int) -> None:
    text = json.dumps({**asdict(this), "beat": count})
    os.pwrite(number, text.ljust(SIZE - 1).encode()[: SIZE - 1] + b"\n", 0)
    confirm(number, path)  # fsync: other hosts see it only then


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # removed by hand
        return b""


def _writer_in(path: Path) -> Writer | None:
    """The writer named in the file; None if the file is empty or incomplete."""
    try:
        values = json.loads(_content(path))
        return Writer(**{field.name: values[field.name] for field in fields(Writer)})
    except (ValueError, KeyError, TypeError):
        return None


def _kernel() -> str:
    """An id of the running kernel, the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return process.host()
