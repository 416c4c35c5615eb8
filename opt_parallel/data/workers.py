"""Processes that work through a list of jobs; they end with this one, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from opt_parallel.errors import UserError
from opt_parallel.interrupt import ignore_all
from opt_parallel.machine import cpus  # noqa: F401 (whoever sizes `run_jobs` finds it here, too)
from opt_parallel.terminal import open_streams, outlive

Report = Callable[[int], None]
Job = Callable[[Any, Report], None]
SPOKEN = 30.0  # seconds between two lines where there is no bar


class Unfinished(UserError):
    """What stopped the work is no fault of the data: starting again goes on from there."""


def run_jobs(jobs: Iterable[Job], shared: Any, workers: int, report: Report) -> None:
    """Call `job(shared, report)` for every job, in as many processes; with one, here. `report` takes the bytes done.

    Raises: what a job raised first; Unfinished if a process died."""
    if workers == 1:
        for job in jobs:
            job(shared, report)
        return
    pending = iter(jobs)
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, and this one's memory
    processes, pipes = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, shared), daemon=True)
            process.start()
            theirs.close()  # so that its end ends the pipe
            processes.append(process)
            pipes.append(ours)
        busy = [pipe for pipe in pipes if _give(pipe, pending)]
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise Unfinished(
                        f"a process that prepared text was killed, perhaps for its memory: start again with fewer than "
                        f"data.workers={workers}; what is done stays"
                    ) from error
                if isinstance(answer, int):
                    report(answer)
                elif answer is not None:
                    raise answer
                elif not _give(pipe, pending):
                    busy.remove(pipe)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _give(pipe: Connection, pending: Iterator[Job]) -> bool:
    job = next(pending, None)
    if job is not None:
        pipe.send(job)
    return job is not None


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
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)


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
