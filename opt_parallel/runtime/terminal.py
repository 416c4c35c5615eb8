"""Standard output and standard error that do not end a run.

They may be closed from the start, a terminal that hangs up, a pipe whose reader has ended or stopped reading, a file on
a full disk, or an encoding that lacks characters; and printed text may hold control characters. Every command calls
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

# control characters: they would move the cursor, hide text or change a terminal's state
CONTROL = re.compile(r"(?!^)\r(?!\n)|[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLORS = re.compile(r"\x1b\[[\d;]*m")
UPWARDS = re.compile(r"(\r|\x1b\[(A|Am|K|2K))+")  # written alone by tqdm and wandb to move the cursor back
NAMES = {1: "standard output", 2: "standard error"}
READ_TIMEOUT = 30.0  # seconds to wait for a reader that does not read; the other ranks wait too
GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, or the terminal, is gone

gone: dict[int, str] = {}  # descriptors that were given up, and the warning printed for each
_outliving = False


class Closed(BrokenPipeError):
    """The reader of a command's output is gone, so the command may exit."""


def open_streams() -> None:
    """Replace Python's own `sys.stdout` and `sys.stderr`. A closed descriptor becomes /dev/null; a character that the
    encoding lacks is written as an escape."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `fd`
            if fd:
                gone[fd] = f"warning: {NAMES[fd]} is closed"
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or _is_pythons_own(stream, fd):
            setattr(sys, name, _stream(fd, stream))


def outlive() -> None:
    """From here on printing never fails: a stream is given up at its first failure, with a warning in the log."""
    global _outliving  # noqa: PLW0603
    _outliving = True


def flush() -> None:
    """Flush both streams; errors are ignored."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def plain(text: str) -> str:
    """`text` without colours, and with control characters escaped, except line ends, tabs and a carriage return at the
    start (progress bars)."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), COLORS.sub("", text))


def _is_pythons_own(stream: Any, fd: int) -> bool:
    """Whether the stream is Python's original one on `fd`, not a replacement by others or by us."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)  # without a buffer: PYTHONUNBUFFERED
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
    """A text stream that escapes control characters: file names, labels and generated text may hold them."""

    def write(self, text: str) -> int:
        super().write(text if UPWARDS.fullmatch(text) else plain(text))
        return len(text)


class _Descriptor(io.FileIO):
    """A stream's raw file."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._unread = False

    def write(self, data: Any) -> int:
        """Write up to PIPE_BUF bytes. Returns the number written."""
        piece = memoryview(data)[: select.PIPE_BUF]
        try:
            if _outliving and not self._is_read():
                return len(piece)
            while (written := super().write(piece)) is None:  # None: the descriptor is non-blocking, and full
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
        """Wait up to `READ_TIMEOUT` for room; False if there is none. Later writes do not wait, and are dropped, until
        there is room again."""
        has_room = bool(select.select([], [self.fileno()], [], 0 if self._unread else READ_TIMEOUT)[1])
        if has_room is self._unread:
            self._unread = not has_room
            how = (
                "is read again" if has_room else f"was not read for {READ_TIMEOUT:g} s: what follows is left out there"
            )
            _log(f"warning: {NAMES[self.fileno()]} {how}")
        return has_room

    def _give_up(self, error: OSError) -> None:
        """Redirect the descriptor to /dev/null, for C++ libraries too."""
        fd = self.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)
        gone[fd] = f"warning: {NAMES[fd]} is gone ({error.strerror}): what follows is not printed there"
        _log(gone[fd])
        if fd == 1:
            print(gone[fd], file=sys.stderr, flush=True)


def _log(line: str) -> None:
    """Write to the run's log, if there is one (`log.OURS`)."""
    logging.getLogger("opt_parallel").info(line)
