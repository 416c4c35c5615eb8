"""Output: rank 0 prints to the terminal, every rank logs to a file, and libraries print only warnings, each once."""

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
RETRIES = "huggingface_hub.utils._http"  # logs each retry; our own line reports the final failure
OURS = logging.getLogger("opt_parallel")  # copies of printed lines, for the rank's log file


def say(text: str, anywhere: bool = False) -> None:
    """Print one line on rank 0. `anywhere`: on standard error if standard output is gone."""
    if process.is_main():
        print(text, file=sys.stderr if anywhere and 1 in terminal.gone else sys.stdout, flush=True)
        OURS.info(text)


def aligned(lines: list[list[str]]) -> str:
    """A table as text: columns two spaces apart. All lines have equally many cells."""
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
    """Silence libraries below warnings, limit their threads to the CPUs of this process, and give them a home folder if
    the user has none. Must run before they are imported."""
    machine.limit_threads()
    if home := machine.ensure_home():
        say(f"note: user {os.getuid()} has no home folder here: {home} is used instead")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    said_by_us = ("real_accelerator.py", "loss_scaler.py")  # no GPU; gradients that are not finite
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.filename not in said_by_us)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(RETRIES).setLevel(logging.ERROR)
    logging.raiseExceptions = False  # on a full disk logging would print a traceback for each line of a library's log
    OURS.setLevel(logging.INFO)
    OURS.propagate = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def log_of(folder: Path, rank: int) -> Path:
    """A rank's log file in a run's folder."""
    return folder / "logs" / f"rank-{rank:05d}.log"


@contextmanager
def log_to_file(folder: Path) -> Iterator[None]:
    """While the context lasts, log to this rank's file in the run's `folder`. Rank 0 logs its lines and the libraries'
    warnings, and prints them too. Other ranks redirect standard output and error to the file.

    Each warning is written once. An error's traceback goes to the file, one line to the terminal. On rank 0, C++
    libraries print to the terminal only."""
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
            if main or isinstance(error, (UserError, Lost)):  # other errors are printed, and so reach the file
                traceback.print_exc(file=file)
            if earlier is not None and _is_printed(error):
                with suppress(OSError):  # that terminal may be gone
                    os.write(earlier[1], f"error: {_first_line(error)}; {path} has more\n".encode())
            if earlier is not None and isinstance(error, UserError):
                _redirect(*earlier)  # this rank prints the line if rank 0 does not
            raise
        finally:
            _remove_handlers(handlers)  # after an error too: the next run of a sweep has its own file
        if earlier is not None:
            for old in _redirect(*earlier) + earlier:
                os.close(old)


class _LogFile(io.FileIO):
    """A log's raw file. A failed write loses its bytes and is reported once; the run continues.

    `terminal`: the descriptor for that report, where standard output is the log itself."""

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
    """A rank's log, opened to append; /dev/null if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(path, "a")
    except OSError as error:
        _warn_unwritable(str(path), error, None)
        return _LogFile(os.devnull, "a")


def _warn_unwritable(path: str, error: OSError, terminal: int | None) -> None:
    """Print the warning without `say`, which would write to the log again."""
    line = f"warning: {path} cannot be written ({error.strerror}): the run continues without this log"
    if terminal is None:
        print(line, flush=True)
    else:
        with suppress(OSError):  # that terminal may be gone
            os.write(terminal, f"{line}\n".encode())


def _redirect(output: int, errors: int) -> tuple[int, int]:
    """Redirect standard output and error to other descriptors. Returns duplicates of the earlier two."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    return before


def _is_printed(error: Exception) -> bool:
    """Whether this rank prints the error. Rank 0 prints a user's mistake; one rank a host prints a loss of ranks."""
    return not isinstance(error, UserError) and (not isinstance(error, Lost) or error.speaks)


def _first_line(error: Exception) -> str:
    if isinstance(error, Lost):
        return str(error)
    return f"{process.host()}, rank {process.rank()}: {type(error).__name__}: {error}".partition("\n")[0]


class _Once(logging.Filter):
    """Passes each message of a logger once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = (record.name, record.getMessage())
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


def _add_handlers(file: TextIO, also_stderr: bool) -> list[logging.Handler]:
    """Log our lines and the libraries' warnings to `file`; the warnings to standard error too if `also_stderr`."""
    handlers: list[logging.Handler] = [logging.StreamHandler(file)]
    OURS.addHandler(handlers[0])
    for stream in [file, sys.stderr] if also_stderr else [file]:
        handler = logging.StreamHandler(stream)
        handlers.append(handler)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(name)s: %(message)s"))
        handler.addFilter(_Once())
        logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    for name in QUIET:  # some have their own handlers
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return handlers


def _remove_handlers(handlers: list[logging.Handler]) -> None:
    logging.captureWarnings(False)
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        OURS.removeHandler(handler)
