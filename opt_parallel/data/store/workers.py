"""Processes that work through a list of jobs; they end with this one, however it ends."""

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
from opt_parallel.runtime.machine import cpus  # noqa: F401 (whoever sizes `run_jobs` finds it here, too)
from opt_parallel.runtime.process import host
from opt_parallel.runtime.signals import ignore_all
from opt_parallel.runtime.terminal import open_streams, outlive

Report = Callable[[int], None]
Job = Callable[[Any, Report], None]
SPOKEN = 30.0  # seconds between two lines where there is no bar
LOOK = 5.0  # seconds between two looks at the processes that work
SAID, GIVEN_UP = 4, 12  # looks at one that does nothing until a warning, and the end


class Unfinished(UserError):
    """What stopped the work is no fault of the data: starting again goes on from there."""


class Pulse:
    """Whether a process works, by the CPU time that it used between two looks: none if it is stopped, or waits for a
    disk that does not answer. Looks are counted, not seconds: this process may have been stopped itself."""

    def __init__(self, number: int | None) -> None:
        self._process = psutil.Process(number)
        self._used, self._idle = -1.0, 0

    def look(self, doing: str) -> None:
        """Look at a process that is `doing` something. Raises: Unfinished, after a warning."""
        try:
            times, status = self._process.cpu_times(), self._process.status()
        except psutil.NoSuchProcess:
            return  # who waits for it sees that, too
        used = times.user + times.system
        self._idle = 0 if used > self._used else self._idle + 1
        self._used = max(used, self._used)
        how = "is stopped" if status == psutil.STATUS_STOPPED else "does nothing"
        line = f"process {self._process.pid} on {host()}, {doing}, {how}"
        if self._idle == SAID:
            say(f"warning: {line}: it is given up after {LOOK * GIVEN_UP:g} s")
        if self._idle == GIVEN_UP:
            raise Unfinished(
                f"{line} for {LOOK * GIVEN_UP:g} s: see whether its disk answers, or who stopped it (kill -CONT), and "
                "start again; what is done stays"
            )


def run_jobs(jobs: Iterable[tuple[str, Job]], shared: Any, workers: int, report: Report) -> None:
    """Call `job(shared, report)` for every name and job, in as many processes; with one, here. `report` takes the bytes
    done.

    Raises: what a job raised first; Unfinished if a process died, or does nothing."""
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
            for told in ready:
                assert isinstance(told, Connection)
                done = _answer(told, workers)
                if done is not None:
                    report(done)
                elif (name := _give(told, pending)) is not None:
                    busy[told] = name
                else:
                    del busy[told]


@contextmanager
def _processes(number: int, shared: Any) -> Iterator[dict[Connection, Pulse]]:
    """So many processes at work, by the pipes to them, while the context lasts."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, and this one's memory
    processes, pulses = [], {}
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, shared), daemon=True)
            process.start()
            theirs.close()  # so that its end ends the pipe
            processes.append(process)
            pulses[ours] = Pulse(process.pid)
        yield pulses
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(LOOK)  # one that waits for a disk ends when that answers


def _answer(pipe: Connection, workers: int) -> int | None:
    """Bytes that a process has done, None where a job is. Raises: what the job raised; Unfinished."""
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise Unfinished(
            f"a process that prepared text was killed, perhaps for its memory: start again with fewer than "
            f"data.workers={workers}; what is done stays"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _give(pipe: Connection, pending: Iterator[tuple[str, Job]]) -> str | None:
    """The name of the job that the process at a pipe's other end gets, if there is one left."""
    name, job = next(pending, (None, None))
    if name is not None:
        pipe.send(job)
    return name


def _work(pipe: Connection, shared: Any) -> None:
    """What a process does until its parent is gone, which ends the pipe."""
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
        except BaseException as error:  # a panic of Rust is no Exception
            answer = _portable(error)
        pipe.send(answer)


def _portable(error: BaseException) -> BaseException:
    """An error with its traceback, as another of the same words where the other process could not read it."""
    told = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # libraries' errors may hold anything
        told = RuntimeError(f"{type(error).__name__}: {error}")
    told.add_note(traceback.format_exc())
    return told


@contextmanager
def progress(what: str, total: int) -> Iterator[Report]:
    """A bar of bytes on a terminal; else a line now and then."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=what, total=total, unit="B", unit_scale=True, smoothing=0.1) as bar:
            yield bar.update
        return
    done, spoken = 0, time.monotonic()

    def report(size: int) -> None:
        nonlocal done, spoken
        done += size
        if time.monotonic() - spoken > SPOKEN:
            spoken = time.monotonic()
            print(f"{what}: {min(done / max(total, 1), 1):.0%} of {total / 1e6:,.0f} MB", flush=True)

    yield report
