"""Error types, exit statuses, and the one line that reports a user's mistake."""

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

# Exit statuses after a signal: with the step finished and saved, or at once if training had not started.
INTERRUPTED = 130  # Ctrl-C, by the shell's convention
STOPPED = 75  # SIGTERM or SIGUSR1: EX_TEMPFAIL of sysexits.h, start it again


class UserError(Exception):
    """A user's mistake. The message is one line: the value, the cause, the way out. `shared`: every rank raises it."""

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class Diverged(UserError):
    """Gradients or the loss scale left the finite range. An error of a single run; one result among others in a
    sweep."""


class Unread(UserError):
    """Prepared text became unreadable during training. The weights are good and can be saved."""


class Lost(Exception):
    """Another rank is gone or unreachable. Not the user's mistake: a restart resumes from the newest checkpoint.
    `speaks`: whether this rank prints the line for its host."""

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


def one_line(error: BaseException) -> str:
    """The first telling lines of a library's message, joined into one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return "; ".join(kept) or type(error).__name__


def leave(line: str, status: int = 2, timeout: float = 10.0, shared: bool = False) -> NoReturn:
    """End this process with `status`; under a launcher only rank 0 prints `line`.

    Launchers kill every rank when one exits. So the other ranks wait up to `timeout` seconds for that signal, and rank
    0 prints first. Rank 0 waits half as long for ranks that are still starting, or 1 s if all ranks raised together
    (`shared`). A rank that no signal reaches prints the line itself: the mistake is this rank's alone.
    """
    if process.is_main():
        print(f"error: {line}", file=sys.stderr, flush=True)
        if process.world_size() > 1 and timeout:
            time.sleep(1.0 if shared else timeout / 2)
    elif timeout:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(timeout)
        if not shared:
            print(f"error: {process.host()}, rank {process.rank()}: {line}", file=sys.stderr)
    terminal.flush()  # `os._exit` does not
    os._exit(status)  # not sys.exit: closing a process group would wait for ranks that are gone


def out_of_memory(error: BaseException) -> str:
    """The line for an error that `is_out_of_memory`."""
    why = one_line(error).partition("; ")[0]
    return (
        f"out of memory ({why}): a smaller batch, length or dtype takes less, more processes take a part each, and a "
        "limit of this shell (ulimit -v) or job may be raised"
    )


@contextmanager
def reporting(
    expected: tuple[type[Exception], ...] = (), explain: Callable[[BaseException], str] = str
) -> Iterator[None]:
    """Turn a user's mistake into one line and status 2, and the loss of another rank into one line and status 1. A
    command that only prints exits silently when its reader is gone (`| head`).

    `expected`: error types of a library that parses user input (Hydra, OmegaConf); they are user mistakes too, and
    `explain` makes their line. Other errors are bugs and keep their traceback.
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
        if error.speaks or not process.is_main():  # other ranks print into their log files
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except terminal.Closed:
        os._exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        leave("interrupted", status=INTERRUPTED, timeout=0.0)
    except Exception as error:
        if is_out_of_memory(error):
            leave(out_of_memory(error))
        if isinstance(error, OSError) and error.filename in terminal.NAMES.values():
            leave(f"{error.filename} cannot be written ({error.strerror})")
        if isinstance(error, PermissionError) and error.filename:
            leave(f"{error.filename} cannot be read or written ({error.strerror}): change its permissions or move it")
        if process.world_size() == 1:
            raise
        traceback.print_exc()
        terminal.flush()
        os._exit(1)  # at once: the interpreter would join threads that wait for other ranks
