"""Runs jobs in several processes, which end when this process ends, for any reason."""

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
INTERVAL = 30.0  # seconds between two progress lines if there is no terminal
LOOK = 5.0  # seconds between two checks of busy processes
WARNED, GIVEN_UP = 4, 12  # checks without progress before a warning, and before an error


class Unfinished(UserError):
    """The work was interrupted, not by bad data: the next start continues it."""


class Pulse:
    """Detects a process that makes no progress: one that uses no CPU time between two checks, because it is stopped or
    waits for a disk. Counts checks, not seconds: this process may have been stopped itself."""

    def __init__(self, number: int | None) -> None:
        self._process = psutil.Process(number)
        self._used, self._idle = -1.0, 0

    def look(self, doing: str) -> None:
        """Check the process; `doing` describes its work in messages. Raises: Unfinished, after a warning."""
        try:
            times, status = self._process.cpu_times(), self._process.status()
        except psutil.NoSuchProcess:
            return  # the caller, which waits for the process, notices its end
        used = times.user + times.system
        self._idle = 0 if used > self._used else self._idle + 1
        self._used = max(used, self._used)
        how = "is stopped" if status == psutil.STATUS_STOPPED else "does nothing"
        line = f"process {self._process.pid} on {host()}, {doing}, {how}"
        if self._idle == WARNED:
            say(f"warning: {line}: the run ends if this lasts {LOOK * GIVEN_UP:g} s")
        if self._idle == GIVEN_UP:
            raise Unfinished(
                f"{line} for {LOOK * GIVEN_UP:g} s: check its disk, or continue a stopped process with "
                "kill -CONT, then start again; completed parts are kept"
            )


def run_jobs(jobs: Iterable[tuple[str, Job]], shared: Any, workers: int, report: Report) -> None:
    """Call `job(shared, report)` for each (name, job) in `workers` processes; with `workers` 1, in this process. Jobs
    pass `report` the number of bytes they have processed.

    Raises: the first error of a job; Unfinished if a process dies or makes no progress."""
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
    """Start `number` processes; yield a Pulse for the pipe to each; kill them at the end."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locked locks and this process's memory
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
            process.join(LOOK)  # a process that waits for a disk ends when the disk answers


def _answer(pipe: Connection, workers: int) -> int | None:
    """The bytes that a process reports, or None when its job is done. Raises: the job's error; Unfinished."""
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
    """Send the next job through a pipe; return its name, or None if no job is left."""
    name, job = next(pending, (None, None))
    if name is not None:
        pipe.send(job)
    return name


def _work(pipe: Connection, shared: Any) -> None:
    """Run jobs from the pipe until it ends, when the parent ends."""
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
        except BaseException as error:  # a Rust panic is not an Exception
            answer = _portable(error)
        pipe.send(answer)


def _portable(error: BaseException) -> BaseException:
    """An error with its traceback as a note. One that cannot be pickled becomes a RuntimeError with the same text."""
    portable = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a library's error may hold an object that cannot be pickled
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(traceback.format_exc())
    return portable


@contextmanager
def progress(what: str, total: int) -> Iterator[Report]:
    """Report processed bytes by a progress bar on a terminal, else by a line every `INTERVAL` seconds."""
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
