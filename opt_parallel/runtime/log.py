"""Rank 0 prints to the terminal and every rank logs to a file. Libraries print only warnings, and each warning once."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from opt_parallel.runtime import machine, process, terminal
from opt_parallel.runtime.errors import Lost, UserError

QUIET = ("deepspeed", "DeepSpeed", "torch.distributed", "accelerate", "datasets", "filelock", "wandb", "matplotlib")
RETRIES = "huggingface_hub.utils._http"  # This logger reports each retry of a download; we report the final failure.
OURS = logging.getLogger("opt_parallel")  # This logger receives a copy of each printed line for the log file.


def say(text: str, anywhere: bool = False) -> None:
    """Print one line on rank 0. `anywhere` prints the line to standard error if standard output can no longer be
    written."""
    if process.is_main():
        print(text, file=sys.stderr if anywhere and 1 in terminal.gone else sys.stdout, flush=True)
        OURS.info(text)


def aligned(lines: list[list[str]]) -> str:
    """A table as text with two spaces between columns. All lines must have the same number of cells."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def bytes_in_words(number: float) -> str:
    """A size in decimal units: `812 B`, `12.3 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 999.5 else f"{number:,.0f} TB"


def quiet_libraries() -> None:
    """Silence libraries' messages below warnings, limit their threads to the CPUs of this process, and create a home
    folder if the user has none. Call this function before these libraries are imported."""
    machine.limit_threads()
    if home := machine.ensure_home():
        say(f"note: user {os.getuid()} has no home folder here: {home} is used instead")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # DeepSpeed's file that logs a missing GPU, which we report ourselves, and its warning of optimizers that are not
    # torch's.
    unwanted = {"real_accelerator.py", "_do_optimizer_sanity_check"}
    logging.getLogger("DeepSpeed").addFilter(lambda record: not unwanted & {record.filename, record.funcName})
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(RETRIES).setLevel(logging.ERROR)
    logging.raiseExceptions = False  # otherwise a full disk causes a traceback for each logged line
    OURS.setLevel(logging.INFO)
    OURS.propagate = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def log_of(folder: Path, rank: int) -> Path:
    """The path of a rank's log file in a run's folder."""
    return folder / "logs" / f"rank-{rank:05d}.log"


@contextmanager
def log_to_file(folder: Path) -> Iterator[None]:
    """While the context lasts, log to this rank's file in the run's `folder`. Rank 0 both prints and logs its messages
    and the libraries' warnings. All other ranks redirect standard output and standard error to their log file.

    Each warning is written once. An error's traceback is written to the log file and its message to the terminal. On
    rank 0, the output of C++ libraries appears only on the terminal."""
    path, main = log_of(folder, process.rank()), process.is_main()
    raw = _open(path)
    with io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    ) as file:
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}  {process.host()}, process {os.getpid()}", file=file)
        for line in terminal.gone.values():
            print(line, file=file)
        earlier = None if main else _redirect(file.fileno(), file.fileno())
        raw.terminal = earlier and earlier[1]
        handlers = _add_handlers(file, also_stderr=main)
        try:
            yield
        except Exception as error:
            # Tracebacks of other errors are printed, and the output of ranks other than 0 goes to the log file.
            if main or isinstance(error, (UserError, Lost)):
                traceback.print_exc(file=file)
            if earlier is not None and _is_printed(error):
                with suppress(OSError):  # the terminal may have been closed
                    os.write(earlier[1], f"error: {_first_line(error)}; {path} has more\n".encode())
            if earlier is not None and isinstance(error, UserError):
                _redirect(*earlier)  # this rank prints the message if rank 0 does not
            raise
        finally:
            # The handlers are removed after an error too, since the next run of a sweep has its own log file.
            _remove_handlers(
                handlers
            )  # handlers are removed after an error too, since a sweep's next run has its own log
        if earlier is not None:
            for old in _redirect(*earlier) + earlier:
                os.close(old)


class _LogFile(io.FileIO):
    """The unbuffered file under a log. If a write fails, its bytes are lost, the first failure is reported, and the run
    continues.

    `terminal` is the descriptor for this report if standard output itself is redirected to the log."""

    terminal: int | None = None
    reported = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not self.reported:
                self.reported = True
                _warn_unwritable(str(self.name), error, self.terminal)
            return len(data)


def _open(path: Path) -> _LogFile:
    """A rank's log file opened to append, or /dev/null if the log file cannot be opened."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(path, "a")
    except OSError as error:
        _warn_unwritable(str(path), error, None)
        return _LogFile(os.devnull, "a")


def _warn_unwritable(path: str, error: OSError, terminal: int | None) -> None:
    """Print the warning without `say`, which would also write the warning to the failing log."""
    line = f"warning: {path} cannot be written ({error.strerror}): the run continues without this log"
    if terminal is None:
        print(line, flush=True)
    else:
        with suppress(OSError):  # the terminal may have been closed
            os.write(terminal, f"{line}\n".encode())


def _redirect(output: int, errors: int) -> tuple[int, int]:
    """Redirect standard output and error to other descriptors. Returns duplicates of the previous two descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    return before


def _is_printed(error: Exception) -> bool:
    """Whether this rank prints the error's message to the terminal. `leave` prints a `UserError` instead, and only one
    rank of each host prints a `Lost`."""
    return not isinstance(error, UserError) and (not isinstance(error, Lost) or error.speaks)


def _first_line(error: Exception) -> str:
    if isinstance(error, Lost):
        return str(error)
    return f"{process.host()}, rank {process.rank()}: {type(error).__name__}: {error}".partition("\n")[0]


class _Once(logging.Filter):
    """A filter that lets each message of a logger pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = (record.name, record.getMessage())
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


def _add_handlers(file: TextIO, also_stderr: bool) -> list[logging.Handler]:
    """Log our messages and the libraries' warnings to `file`. If `also_stderr`, print the warnings to standard error
    too."""
    handlers: list[logging.Handler] = [logging.StreamHandler(file)]
    OURS.addHandler(handlers[0])
    for stream in [file, sys.stderr] if also_stderr else [file]:
        handler = logging.StreamHandler(stream)
        handlers.append(handler)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(name)s: %(message)s"))
        handler.addFilter(_Once())
        logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    for name in QUIET:  # some of these libraries install handlers of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return handlers


def _remove_handlers(handlers: list[logging.Handler]) -> None:
    logging.captureWarnings(False)
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        OURS.removeHandler(handler)
