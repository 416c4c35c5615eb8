"""Runs jobs in several child processes, which always end when this process ends."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import cpus  # noqa: F401 (callers that size `run_jobs` import it from here, too)
from opt_parallel.runtime.process import host
from opt_parallel.runtime.signals import ignore_all
from opt_parallel.runtime.terminal import open_streams, outlive

Report = Callable[[int], None]
Job = Callable[[Any, Report], None]
INTERVAL = 30.0  # Seconds between two progress lines if there is no terminal.
LOOK = 5.0  # Seconds between two checks of the progress of child processes.
WARNED, GIVEN_UP = 4, 12  # Number of checks without progress before a warning, and before an error.


class Unfinished(UserError):
    """The error for interrupted work, which the next start continues, because the data are not the cause."""


class Pulse:
    """Detects a process that makes no progress, because it is stopped or waits for a disk.

    A process makes no progress if it uses no CPU time between two checks. Checks are counted instead of seconds,
    because the checking process may have been stopped too."""

    def __init__(self, number: int | None) -> None:
        self._process = psutil.Process(number)
        self._used, self._idle = -1.0, 0

    def look(self, doing: str) -> None:
        """Check the process, print a warning if it makes no progress, and later raise Unfinished.

        `doing` describes the work of the process in messages."""
        try:
            times, status = self._process.cpu_times(), self._process.status()
        except psutil.NoSuchProcess:
            return  # the caller waits for the process, and will notice its end
        used = times.user + times.system
        self._idle = 0 if used > self._used else self._idle + 1
        self._used = max(used, self._used)
        how = "is stopped" if status == psutil.STATUS_STOPPED else "does nothing"
        line = f"process {self._process.pid} on {host()}, {doing}, {how}"
        if self._idle == WARNED:
            say(f"warning: {line}: the run ends if the process makes no progress for {LOOK * GIVEN_UP:g} s")
        if self._idle == GIVEN_UP:
            raise Unfinished(
                f"{line} for {LOOK * GIVEN_UP:g} s: check its disk, or continue a stopped process with "
                "kill -CONT, then start again; completed parts are kept"
            )


def run_jobs(jobs: Iterable[tuple[str, Job]], shared: Any, workers: int, report: Report) -> None:
    """Call `job(shared, report)` for each pair (name, job), in `workers` processes.

    With one worker, this process runs the jobs itself and starts no other process. A job passes the number of bytes
    that it has processed to `report`.

    Raises: the first error of a job, or Unfinished if a process dies or makes no progress."""
    if workers == 1:
        for _, job in jobs:
            job(shared, report)
        return
    pending = iter(jobs)
    with _processes(workers, shared) as pulses:
        busy = {pipe: name for pipe in pulses if (name := _give(pipe, pending)) is not None}
        next_look = time.monotonic() + LOOK
        while busy:
            ready = wait(list(busy), LOOK)
            if time.monotonic() >= next_look:
                for pipe, name in busy.items():
                    pulses[pipe].look(f"which prepares {name}")
                next_look = time.monotonic() + LOOK
            for answered in ready:
                assert isinstance(answered, Connection)
                done = _answer(answered, workers)
                if done is not None:
                    report(done)
                elif (name := _give(answered, pending)) is not None:
                    busy[answered] = name
                else:
                    del busy[answered]


@contextmanager
def _processes(number: int, shared: Any) -> Iterator[dict[Connection, Pulse]]:
    """A context that starts `number` child processes, yields a pipe and a `Pulse` for each, and then kills them."""
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's memory and its locked locks
    processes, pulses = [], {}
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, shared), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the process ends
            processes.append(process)
            pulses[ours] = Pulse(process.pid)
        yield pulses
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(LOOK)  # a process that waits for a disk ends only when the disk answers


def _answer(pipe: Connection, workers: int) -> int | None:
    """The number of bytes that a child process reports, or None when its job is done.

    Raises: the error of the job, or Unfinished if the process has died."""
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise Unfinished(
            f"a process that prepared text was killed, perhaps for lack of memory: start again with fewer than "
            f"data.workers={workers}; completed parts are kept"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _give(pipe: Connection, pending: Iterator[tuple[str, Job]]) -> str | None:
    """Send the next job through a pipe, and return the job's name, or None if no job is left."""
    name, job = next(pending, (None, None))
    if name is not None:
        pipe.send(job)
    return name


def _work(pipe: Connection, shared: Any) -> None:
    """The main function of a child process, which runs the jobs from `pipe` until the parent process closes it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    open_streams()
    outlive()
    ignore_all()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            job(shared, pipe.send)
            answer = None
        except (BrokenPipeError, ConnectionResetError):
            return
        except BaseException as error:  # a panic in a Rust library is not an Exception
            answer = _portable(error)
        pipe.send(answer)


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note. An error that cannot be pickled becomes a RuntimeError with its text."""
    portable = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a library's error may contain an object that cannot be pickled
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(traceback.format_exc())
    return portable


@contextmanager
def progress(what: str, total: int) -> Iterator[Report]:
    """A context that shows how many bytes have been processed, as reported by its callers.

    On a terminal it shows a progress bar, and elsewhere it prints a line every `INTERVAL` seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=what, total=total, unit="B", unit_scale=True, smoothing=0.1) as bar:
            yield bar.update
        return
    done, printed = 0, time.monotonic()

    def report(size: int) -> None:
        nonlocal done, printed
        done += size
        if time.monotonic() - printed > INTERVAL:
            printed = time.monotonic()
            print(f"{what}: {min(done / max(total, 1), 1):.0%} of {total / 1e6:,.0f} MB", flush=True)

    yield report
