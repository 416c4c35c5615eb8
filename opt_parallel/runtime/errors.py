"""What a user got wrong, said in one line."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from opt_parallel.runtime import process, terminal
from opt_parallel.runtime.machine import is_out_of_memory

# How a process ends that a signal asked to: after its step and saved where it was training, at once before that.
INTERRUPTED = 130  # Ctrl-C, by the shell's convention
STOPPED = 75  # SIGTERM or SIGUSR1: EX_TEMPFAIL of sysexits.h, start it again


class UserError(Exception):
    """A mistake of the user's. The message is one line that names the value and the way out.

    `shared`: every rank raises it."""

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class Diverged(UserError):
    """The training came to numbers that are not finite: a mistake of one run, and a result among those of a sweep."""


class Unread(UserError):
    """Text that was there at the start cannot be read any more: what was trained is as good as before."""


class Lost(Exception):
    """Another rank is gone, or cannot be reached: no mistake, and the newest checkpoint goes on. `speaks`: whether this
    rank is the one of its host that says so on the terminal."""

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


def one_line(error: BaseException) -> str:
    """The first telling lines of a library's message, joined into one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return "; ".join(kept) or type(error).__name__


def leave(line: str, status: int = 2, patience: float = 10.0, shared: bool = False) -> NoReturn:
    """End this process with `status`; under a launcher rank 0 alone prints `line`.

    A launcher ends every rank as soon as one of them stops. So the others wait to be told, `patience` seconds at most,
    since rank 0 must get to speak first; and rank 0 stays a moment, for those that are still starting, unless the line
    is `shared`: then all are here.
    """
    if process.is_main():
        print(f"error: {line}", file=sys.stderr, flush=True)
        if process.world_size() > 1 and patience:
            time.sleep(1.0 if shared else patience / 2)
    elif patience:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(patience)
        if not shared:
            # nobody ended us: the mistake is this rank's alone
            print(f"error: {process.host()}, rank {process.rank()}: {line}", file=sys.stderr)
    terminal.flush()  # `os._exit` would lose it
    os._exit(status)  # not sys.exit: a half-open process group would wait for ranks that are gone


def out_of_memory(error: BaseException) -> str:
    """The line for an error that says so."""
    why = one_line(error).partition("; ")[0]
    return (
        f"out of memory ({why}): a smaller batch, length or dtype takes less, more processes take a part each, and a "
        "limit of this shell (ulimit -v) or job may be raised"
    )


@contextmanager
def reporting(
    expected: tuple[type[Exception], ...] = (), explain: Callable[[BaseException], str] = str
) -> Iterator[None]:
    """Turn a user's mistake into one line and status 2, the loss of another rank into one line and status 1. A command
    that only prints ends without a word when nobody reads it any more, as `head` does.

    `expected` are the types of a library in front of us (Hydra, OmegaConf) whose errors are the user's too; `explain`
    puts them into words. Everything else is our own fault and keeps its traceback.
    """
    terminal.open_streams()
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        leave(str(error), shared=error.shared)
    except expected as error:
        leave(explain(error))
    except Lost as error:
        if error.speaks or not process.is_main():  # what others print is in their log
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except terminal.Closed:
        os._exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        leave("interrupted", status=INTERRUPTED, patience=0.0)
    except Exception as error:
        if is_out_of_memory(error):
            leave(out_of_memory(error))
        if isinstance(error, OSError) and error.filename in terminal.NAMES.values():
            leave(f"{error.filename} cannot be written ({error.strerror})")
        if isinstance(error, PermissionError) and error.filename:
            leave(f"{error.filename} cannot be read or written ({error.strerror}): change its permissions or its place")
        if process.world_size() == 1:
            raise
        traceback.print_exc()
        terminal.flush()
        os._exit(1)  # at once: the interpreter would wait for threads that wait for other ranks
