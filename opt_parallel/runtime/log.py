"""Words to the user: rank 0 speaks, the others are silent; each rank keeps a file; libraries speak only when something
is wrong, and once."""

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
SAYS_IT_AGAIN = "huggingface_hub.utils._http"  # each retry, of what our own line says at the end
OURS = logging.getLogger("opt_parallel")  # what was said, for the rank's file; the terminal has it from print


def say(text: str, anywhere: bool = False) -> None:
    """Print one line on rank 0; if `anywhere`, on standard error where standard output is gone."""
    if process.is_main():
        print(text, file=sys.stderr if anywhere and 1 in terminal.gone else sys.stdout, flush=True)
        OURS.info(text)


def aligned(lines: list[list[str]]) -> str:
    """Lines of equally many cells in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def bytes_in_words(number: float) -> str:
    """`812 B`, `12.3 GB`; decimal, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 999.5 else f"{number:,.0f} TB"


def quiet_libraries() -> None:
    """Hold back the libraries' chatter below a warning, and their threads beyond the CPUs that there are, and give
    them a home folder where the system knows none.

    Must run before they are imported."""
    machine.limit_threads()
    if home := machine.stand_in_for_account():
        say(f"note: user {os.getuid()} has no home folder here: {home} stands in for it")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    said_by_us = ("real_accelerator.py", "loss_scaler.py")  # that there is no GPU, that gradients are not finite
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.filename not in said_by_us)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(SAYS_IT_AGAIN).setLevel(logging.ERROR)
    logging.raiseExceptions = False  # else a library's own log on a full disk would be a traceback a line
    OURS.setLevel(logging.INFO)
    OURS.propagate = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def log_of(folder: Path, rank: int) -> Path:
    """A rank's file in a run's folder."""
    return folder / "logs" / f"rank-{rank:05d}.log"


@contextmanager
def own_file(folder: Path) -> Iterator[None]:
    """While the context lasts, this rank's words go to its file in the run's `folder`: rank 0's, and the warnings of
    libraries there, besides the terminal; all that the others print, in whatever way, instead of it.

    A warning is written once. What fails here is named on the terminal, too: by a line, the rest is in the file.
    Libraries in C++ print past Python: on rank 0 they reach the terminal alone."""
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
        handlers = _collect(file, also_here=main)
        try:
            yield
        except Exception as error:
            if main or isinstance(error, (UserError, Lost)):  # else it is printed into the file anyway
                traceback.print_exc(file=file)
            if earlier is not None and _worth_a_line(error):
                with suppress(OSError):  # that terminal may be gone
                    os.write(earlier[1], f"error: {_first_line(error)}; {path} has more\n".encode())
            if earlier is not None and isinstance(error, UserError):
                _redirect(*earlier)  # if rank 0 does not say it, this rank will
            raise
        finally:
            _collect_no_more(handlers)  # after an error, too: the next run of a multirun has a file of its own
        if earlier is not None:
            for old in _redirect(*earlier) + earlier:
                os.close(old)


class _LogFile(io.FileIO):
    """What lies below a log's buffer. What the disk does not take is lost, and said once: no run ends for it.

    `terminal`: a descriptor to say it to, where standard output is the log itself."""

    terminal: int | None = None
    said = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not self.said:
                self.said = True
                _tell_unwritable(str(self.name), error, self.terminal)
            return len(data)


def _open(path: Path) -> _LogFile:
    """A rank's log to append to; nowhere, if it cannot be opened."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(path, "a")
    except OSError as error:
        _tell_unwritable(str(path), error, None)
        return _LogFile(os.devnull, "a")


def _tell_unwritable(path: str, error: OSError, terminal: int | None) -> None:
    """Not by `say`, which writes to the log, too."""
    line = f"warning: {path} cannot be written ({error.strerror}): the run goes on, and lacks what is said there"
    if terminal is None:
        print(line, flush=True)
    else:
        with suppress(OSError):  # that terminal may be gone
            os.write(terminal, f"{line}\n".encode())


def _redirect(output: int, errors: int) -> tuple[int, int]:
    """Have standard output and errors go to other descriptors; copies of the earlier ones."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    return before


def _worth_a_line(error: Exception) -> bool:
    """A user's mistake rank 0 says; that other ranks are gone, one of each host."""
    return not isinstance(error, UserError) and (not isinstance(error, Lost) or error.speaks)


def _first_line(error: Exception) -> str:
    if isinstance(error, Lost):
        return str(error)
    return f"{process.host()}, rank {process.rank()}: {type(error).__name__}: {error}".partition("\n")[0]


class _Once(logging.Filter):
    """Lets what is said again and again pass the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        words = (record.name, record.getMessage())
        new = words not in self._said
        self._said.add(words)
        return new


def _collect(file: TextIO, also_here: bool) -> list[logging.Handler]:
    """Have the libraries' warnings in `file`, and on standard error if `also_here`; and what we say in `file`."""
    handlers: list[logging.Handler] = [logging.StreamHandler(file)]
    OURS.addHandler(handlers[0])
    for stream in [file, sys.stderr] if also_here else [file]:
        handler = logging.StreamHandler(stream)
        handlers.append(handler)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(name)s: %(message)s"))
        handler.addFilter(_Once())
        logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    for name in QUIET:  # some print by themselves
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return handlers


def _collect_no_more(handlers: list[logging.Handler]) -> None:
    logging.captureWarnings(False)
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        OURS.removeHandler(handler)
