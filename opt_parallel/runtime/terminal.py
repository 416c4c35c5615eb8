"""Replacements of standard output and standard error whose failures do not end a run.

A stream may be closed from the start. The terminal may hang up, the reader of a pipe may end or stop reading, the disk
may be full, and the encoding may lack characters. Printed text may hold control characters. Every command calls
`open_streams`. After `outlive`, printing never fails.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import select
import sys
from contextlib import suppress
from typing import Any

# control characters, which would move the cursor, hide text or change the terminal's state
CONTROL = re.compile(r"(?!^)\r(?!\n)|[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLORS = re.compile(r"\x1b\[[\d;]*m")
UPWARDS = re.compile(r"(\r|\x1b\[(A|Am|K|2K))+")  # tqdm and wandb write such sequences alone
NAMES = {1: "standard output", 2: "standard error"}
READ_TIMEOUT = 30.0  # Seconds that a write to a full pipe waits for its reader; the other ranks wait too.
GONE = (errno.EPIPE, errno.EIO)  # Errors after the reader of a pipe ended or the terminal closed.

gone: dict[int, str] = {}  # maps each descriptor whose writes failed to the printed warning
_outliving = False


class Closed(BrokenPipeError):
    """The reader of a command's output has ended, so the command may exit."""


def open_streams() -> None:
    """Replace Python's own `sys.stdout` and `sys.stderr`. A closed descriptor is opened on /dev/null. A character that
    the encoding lacks is written as an escape."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the new descriptor gets the lowest free number, which is `fd`
            if fd:
                gone[fd] = f"warning: {NAMES[fd]} is closed"
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or _is_pythons_own(stream, fd):
            setattr(sys, name, _stream(fd, stream))


def outlive() -> None:
    """From now on printing never raises. After its first failure a stream discards its output, with a warning in the
    log."""
    global _outliving  # noqa: PLW0603
    _outliving = True


def flush() -> None:
    """Flush standard output and standard error, and ignore errors."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def plain(text: str) -> str:
    """`text` without colours, and with control characters escaped, except line ends, tabs and a carriage return at the
    start (progress bars)."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), COLORS.sub("", text))


def _is_pythons_own(stream: Any, fd: int) -> bool:
    """Whether the stream is Python's original stream on `fd`, and not a replacement by this module or by a library."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)  # with PYTHONUNBUFFERED there is no buffer
    return type(stream) is io.TextIOWrapper and stream.fileno() == fd and not isinstance(raw, _Descriptor)


def _stream(fd: int, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    errors = before.errors if before else "strict"
    return _Plain(
        io.BufferedWriter(_Descriptor(fd)),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace" if errors in ("strict", "surrogateescape") else errors,
        line_buffering=before is None or before.line_buffering or before.write_through,
    )


class _Plain(io.TextIOWrapper):
    """A text stream that escapes control characters, which file names, labels and generated text may hold."""

    def write(self, text: str) -> int:
        super().write(text if UPWARDS.fullmatch(text) else plain(text))
        return len(text)


class _Descriptor(io.FileIO):
    """The unbuffered file under a stream."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._unread = False

    def write(self, data: Any) -> int:
        """Write up to PIPE_BUF bytes. Returns the number written."""
        piece = memoryview(data)[: select.PIPE_BUF]
        try:
            if _outliving and not self._is_read():
                return len(piece)
            # `super().write` returns None if the descriptor is non-blocking and its buffer is full.
            while (written := super().write(piece)) is None:
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            if _outliving:
                self._give_up(error)
                return len(piece)
            if error.errno in GONE:
                raise Closed(*error.args) from error
            raise OSError(error.errno, error.strerror, NAMES[self.fileno()]) from error

    def _is_read(self) -> bool:
        """Whether the descriptor accepts bytes within `READ_TIMEOUT` seconds. After a timeout, later writes do not wait
        and are dropped until the reader reads again."""
        has_room = bool(select.select([], [self.fileno()], [], 0 if self._unread else READ_TIMEOUT)[1])
        if has_room is self._unread:
            self._unread = not has_room
            how = (
                "is read again" if has_room else f"was not read for {READ_TIMEOUT:g} s: further output to it is dropped"
            )
            _log(f"warning: {NAMES[self.fileno()]} {how}")
        return has_room

    def _give_up(self, error: OSError) -> None:
        """Redirect the descriptor to /dev/null, which also stops the output of C++ libraries."""
        fd = self.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)
        gone[fd] = f"warning: {NAMES[fd]} cannot be written ({error.strerror}): further output to it is dropped"
        _log(gone[fd])
        if fd == 1:
            print(gone[fd], file=sys.stderr, flush=True)


def _log(line: str) -> None:
    """Write a line to the run's log (`log.OURS`), if the run has a log."""
    logging.getLogger("opt_parallel").info(line)
