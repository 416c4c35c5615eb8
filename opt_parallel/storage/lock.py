"""One writer in a folder, and a lock that a crash leaves behind harmlessly.

The writer holds the folder's file `lock` open and locked (flock), so that it is free as soon as the process is gone,
however that ended. In the file stands who it is, and a number that grows every few seconds: a heartbeat, to go by where
locks do not reach other hosts or do not exist. Hosts' clocks decide nothing: who waits looks whether the number grows.
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
BEAT, SILENT = 5.0, 60.0  # seconds between two beats, and without one until a writer counts as gone
PATIENCE = 2.0  # seconds that a process may take to die
LOOK = 0.5  # seconds between two looks at another's file
SIZE = 512  # bytes of the file, always the same: each beat is written over the one before
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Writer:
    """Who writes. `kernel`: the same for all whose locks one kernel keeps; `token`: one process's and no other's."""

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
    """Be the only process that writes to `folder`, which is made, while the context lasts.

    Where another takes the folder all the same, since this process was silent for long, this process ends at once.
    Nobody is kept out of a folder that is closed to writing.

    Args:
        key: what the user calls the folder, for messages.
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
            with suppress(OSError):  # then it looks as after a crash
                if _writer_in(path) == this:
                    os.ftruncate(number, 0)
        os.close(number)


def _open(path: Path, key: str) -> int | None:
    """The lock's file, made where it is missing; None in a folder that is closed to writing. Raises: UserError."""
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
    """Write down who writes, once nobody else does. Raises: UserError."""
    refusal = f"{key}: another run trains there, {{}}: wait until it has ended, or choose another run.dir"
    locked, deadline = hold(number), time.monotonic() + PATIENCE
    while locked is False and time.monotonic() < deadline:  # it may be dying, or have named nobody yet
        time.sleep(LOOK)
        locked = hold(number)
    other = _writer_in(path)
    same_kernel = other is None or other.kernel == this.kernel  # then the lock tells all, where there are locks
    if locked is False and same_kernel:
        raise UserError(refusal.format(other or "which says nothing of itself"))
    if other is not None and not (locked and same_kernel):
        say(f"{path} names {other}: waiting up to {silent:.0f} s for a sign that it lives")
        if _beats(path, silent):
            raise UserError(refusal.format(other))
        if locked is False and hold(number) is False:
            raise UserError(f"{refusal.format(other)}; it is silent: if its host is gone, remove {path}")
    try:
        _write(number, path, this, 0)
    except OSError as error:
        if not locked:
            raise _unwritable(key, path, error) from error
    if locked is None:
        time.sleep(2 * LOOK)
        other = _writer_in(path)
        if other is not None and other != this:  # both found the folder free, and it was later
            raise UserError(refusal.format(other))


def _beats(path: Path, silent: float) -> bool:
    """Whether the writer named in the file shows within a time that it lives."""
    first, deadline = _content(path), time.monotonic() + silent
    while time.monotonic() < deadline:
        time.sleep(LOOK)
        now = _content(path)
        if now != first:
            return bool(now.strip(b"\0"))  # else it has ended in good order
    return False


def _beat(number: int, path: Path, key: str, this: Writer, ended: threading.Event, beat: float) -> None:
    """Show that this process lives, until the context ends."""
    count, pause = 0, LOOK  # soon: where locks do not reach another host, both may have found the folder free
    while not ended.wait(pause):
        count, pause = count + 1, beat
        other = _writer_in(path)
        if other is not None and other != this:
            leave(f"{key}: another run trains there now, {other}, and this one ends: they would mix", patience=0.0)
        with suppress(OSError):  # the disk may be full for now; the lock holds all the same
            if not path.exists():
                _make_anew(number, path)
            _write(number, path, this, count)


def _make_anew(number: int, path: Path) -> None:
    """After somebody removed the file: lock a new one, under the same descriptor. Raises: OSError."""
    new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    hold(new)
    os.dup2(new, number, inheritable=False)
    os.close(new)


def _write(number: int, path: Path, this: Writer, count: int) -> None:
    text = json.dumps({**asdict(this), "beat": count})
    os.pwrite(number, text.ljust(SIZE - 1).encode()[: SIZE - 1] + b"\n", 0)
    confirm(number, path)  # other hosts see it only then


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # removed by hand
        return b""


def _writer_in(path: Path) -> Writer | None:
    """Whom the file names; None if it is empty, or not readable yet."""
    try:
        said = json.loads(_content(path))
        return Writer(**{field.name: said[field.name] for field in fields(Writer)})
    except (ValueError, KeyError, TypeError):
        return None


def _kernel() -> str:
    """What all processes of one running system have in common, in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return process.host()
