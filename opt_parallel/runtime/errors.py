"""Error types, exit statuses, and the one-line report of a user's mistake."""

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

# Exit statuses after a signal. During training the process first finishes the step and saves a checkpoint.
INTERRUPTED = 130  # Status after Ctrl-C, by the convention of shells.
STOPPED = 75  # Status after SIGTERM or SIGUSR1. EX_TEMPFAIL of sysexits.h means that the job should be started again.


class UserError(Exception):
    """A user's mistake. The message of a `UserError` is one line with the wrong value, the cause and a remedy. `shared`
    is true if every rank raises this error."""

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class WrongArgument(UserError, ValueError):
    """A wrong argument in a call of the Python classes. Hugging Face's raise ValueError."""


class Diverged(UserError):
    """Gradients or the loss scale left the finite range. Divergence ends a single run, but a sweep continues with its
    next run."""


class Unread(UserError):
    """Prepared text became unreadable during training. The weights are not affected and can be saved."""


class Lost(Exception):
    """Another rank has ended or does not answer. The loss of a rank is not the user's mistake, and a restart resumes
    from the newest checkpoint. `speaks` is true on the one rank of each host that prints the message."""

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turn a UserError within the context into a WrongArgument that starts with `where`, the class or method. Names of
    configuration keys become names of arguments."""
    try:
        yield
    except UserError as error:
        raise WrongArgument(f"{where}: {error}".replace("model.", "")) from None


def one_line(error: BaseException) -> str:
    """A library's error message joined into one line, without OmegaConf's lines of internal details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return "; ".join(kept) or type(error).__name__


def leave(line: str, status: int = 2, timeout: float = 10.0, shared: bool = False) -> NoReturn:
    """End this process with `status`. Under a launcher, only rank 0 prints the message `line`.

    A launcher kills all ranks when one rank exits. The other ranks therefore wait up to `timeout` seconds to be killed,
    while rank 0 prints the message. Rank 0 then waits half of `timeout` for ranks that are still starting, or 1 s if
    all ranks raised the same error (`shared`). A rank that is not killed in time prints the message itself, because
    only that rank had the error.
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
    terminal.flush()  # `os._exit` does not flush the streams.
    os._exit(status)  # Not sys.exit: closing a process group would wait for ranks that are gone.


def out_of_memory(error: BaseException) -> str:
    """The message for an error that `is_out_of_memory` recognises."""
    why = one_line(error).partition("; ")[0]
    return (
        f"out of memory ({why}): reduce the batch, the sequence length or the dtype, start more processes, or raise a "
        "memory limit of this shell (ulimit -v) or of this job"
    )


@contextmanager
def reporting(
    expected: tuple[type[Exception], ...] = (), explain: Callable[[BaseException], str] = str
) -> Iterator[None]:
    """Report a user's mistake in one line and exit with status 2. Report the loss of another rank in one line and exit
    with status 1. A command that only prints exits silently when the reader of its pipe has ended (`| head`).

    `expected` lists error types of libraries that parse user input (Hydra, OmegaConf). Errors of these types count as
    user mistakes, and `explain` returns their message. All other errors are bugs and keep their traceback.
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
        if error.speaks or not process.is_main():  # the output of other ranks goes to their log files
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
        os._exit(1)  # a normal exit would join threads that wait for other ranks
