"""Divides work between processes on several hosts that share a folder, without shared locks.

A process claims a piece of work by creating a file with its name, which only one process can do. The file contains the
process's token. Each process has a file with a counter, which it increments every few seconds. If the counter of
another process does not change for a while, the process is dead, and its claims are free again. On the same kernel, a
lock (flock) on this file shows at once whether the process lives.

A process that was only slow, and not dead, may do a piece of work again. So pieces must have the same result whoever
does them, and must be published by an atomic rename.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opt_parallel.runtime import process
from opt_parallel.runtime.log import say
from opt_parallel.storage import lock
from opt_parallel.storage.atomic import hold, remove

POLL = 0.2  # Seconds between two looks at the work of others.
CLAIM, ALIVE = ".claim", ".alive"  # Endings of the names of claims and of the files with counters.


class Claims:
    """The claims of this process in `folder`. `look` is called while the process waits, and may raise to end this."""

    def __init__(self, folder: Path, look: Callable[[], None]) -> None:
        self.folder, self.look = folder, look
        self.token = f"{process.host()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._counters: dict[str, tuple[bytes, float]] = {}  # the counter of each process and when it changed

    @contextmanager
    def living(self) -> Iterator[None]:
        """A context in which this process counts as alive. At its end, the claims are freed, and the folder is removed
        if no other process works in it. Raises: OSError if the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ended = threading.Event()
        path = self.folder / f"{self.token}{ALIVE}"
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        hold(number)
        self._count(number, 0)
        thread = threading.Thread(target=self._live, args=(number, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for mine in [each for each in self.folder.glob(f"*{CLAIM}") if self._owner(each) == self.token]:
                remove(mine)
            remove(path)
            os.close(number)
            with suppress(OSError):
                self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim the work `name`, and return whether this process has the claim.

        Raises: OSError, and what `look` raises, because the claims of completed work are removed."""
        path = self.folder / f"{name}{CLAIM}"
        try:
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return self._owner(path) == self.token
        try:
            os.write(number, self.token.encode())
        finally:
            os.close(number)
        self.look()
        return True

    def only(self, name: str) -> None:
        """Wait until this process has the claim on `name`. Raises: what `look` raises."""
        while not self.take(name):
            self.wait()

    def wait(self) -> None:
        """Wait for the work of other processes for a moment, then `free`. Raises: what `look` raises."""
        self.look()
        time.sleep(POLL)
        self.free()

    def free(self) -> None:
        """Free the claims of dead processes. Raises: OSError."""
        dead: dict[str, bool] = {}
        for path in self.folder.glob(f"*{CLAIM}"):
            owner = self._owner(path)
            if owner is None or owner == self.token:
                continue
            if owner not in dead:
                dead[owner] = self._is_dead(owner)
                if dead[owner]:
                    say(f"{self.folder.stem}: the work of {owner or 'a process'}, which has ended, is taken over")
            if dead[owner]:
                with suppress(FileNotFoundError):  # another process was faster
                    freed = path.with_name(f"{path.name}.{self.token}")
                    os.rename(path, freed)
                    remove(freed)

    def _live(self, number: int, ended: threading.Event) -> None:
        count = 0
        while not ended.wait(lock.BEAT):
            count += 1
            with suppress(OSError):  # the disk may be full, or another process has completed the work
                self._count(number, count)

    def _count(self, number: int, count: int) -> None:
        os.pwrite(number, f"{lock.running_kernel()} {count:12}".encode(), 0)
        with suppress(OSError):
            os.fsync(number)  # other hosts see the counter only after an fsync

    def _owner(self, path: Path) -> str | None:
        """The token in a claim, or None if the claim was freed. A process that died at once has left no token."""
        try:
            return path.read_text()
        except OSError:
            return None

    def _is_dead(self, token: str) -> bool:
        path = self.folder / f"{token}{ALIVE}"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        if content.split(b" ")[0] == lock.running_kernel().encode():
            return _is_free(path)
        before, since = self._counters.get(token, (b"", 0.0))
        if content != before:
            self._counters[token] = (content, time.monotonic())
            return False
        return time.monotonic() - since > lock.SILENT


def _is_free(path: Path) -> bool:
    """Whether no process holds the lock of a file."""
    try:
        number = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return hold(number) is True
    finally:
        os.close(number)
