"""Standard output and standard error, made so that no terminal ends a run.

A terminal may be closed from the start, hang up, be a pipe whose reader has ended or no longer reads, be a file without
room, or lack characters; and what is printed may hold control characters. `open_streams` serves every command; in one
that outlives its terminal, printing never fails.
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

# escape sequences and their like, which would move the cursor, hide text or change a terminal's state
CONTROL = re.compile(r"(?!^)\r(?!\n)|[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLORS = re.compile(r"\x1b\[[\d;]*m")
UPWARDS = re.compile(r"(\r|\x1b\[(A|Am|K|2K))+")  # a write of its own, by which tqdm and wandb go back
NAMES = {1: "standard output", 2: "standard error"}
PATIENCE = 30.0  # seconds for a reader that does not read: meanwhile the other ranks wait, too
GONE = (errno.EPIPE, errno.EIO)  # of a pipe and of a terminal

gone: dict[int, str] = {}  # descriptors that were given up, and what was said of it
_outliving = False


class Closed(BrokenPipeError):
    """Nobody reads what a command prints, which may end therefore."""


def open_streams() -> None:
    """Replace Python's own `sys.stdout` and `sys.stderr`. What was closed becomes /dev/null, and a character that the
    encoding lacks is written as its escape."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one, before a file of ours does
            if fd:
                gone[fd] = f"warning: {NAMES[fd]} is closed"
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or _is_pythons_own(stream, fd):
            setattr(sys, name, _stream(fd, stream))


def outlive() -> None:
    """From here on printing never fails: at its first failure a stream is given up, which the log says."""
    global _outliving  # noqa: PLW0603
    _outliving = True


def flush() -> None:
    """Write what was printed and is not written yet."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def plain(text: str) -> str:
    """`text` with escapes in place of control characters but line ends and tabs, and without colours, which libraries
    give. A carriage return stays at the beginning, where a progress bar has it."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), COLORS.sub("", text))


def _is_pythons_own(stream: Any, fd: int) -> bool:
    """Not one that somebody put in its place, and not ours."""
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
    """A stream of text that holds foreign words: names of files, labels, what a network wrote."""

    def write(self, text: str) -> int:
        super().write(text if UPWARDS.fullmatch(text) else plain(text))
        return len(text)


class _Descriptor(io.FileIO):
    """What lies below a stream's buffer."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._unread = False

    def write(self, data: Any) -> int:
        """Write some of the bytes, at most as many as a pipe takes at once; return their number."""
        piece = memoryview(data)[: select.PIPE_BUF]
        try:
            if _outliving and not self._is_read():
                return len(piece)
            while (written := super().write(piece)) is None:  # full, and somebody made it non-blocking
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
        """Whether there is room, or soon is. What is printed while there is none is left out, without another wait."""
        has_room = bool(select.select([], [self.fileno()], [], 0 if self._unread else PATIENCE)[1])
        if has_room is self._unread:
            self._unread = not has_room
            how = "is read again" if has_room else f"was not read for {PATIENCE:g} s: what follows is left out there"
            _log(f"warning: {NAMES[self.fileno()]} {how}")
        return has_room

    def _give_up(self, error: OSError) -> None:
        """Let all that is still printed, by C++ libraries too, go nowhere."""
        fd = self.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)
        gone[fd] = f"warning: {NAMES[fd]} is gone ({error.strerror}): what follows is not printed there"
        _log(gone[fd])
        if fd == 1:
            print(gone[fd], file=sys.stderr, flush=True)


def _log(line: str) -> None:
    """For the file of the run, where there is one (`log.OURS`)."""
    logging.getLogger("opt_parallel").info(line)
