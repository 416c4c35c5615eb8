"""Trains on the worker processes with the arguments of train.py, without starting a process."""

from __future__ import annotations

import contextlib
import io
import subprocess

from composing import quick_run_of
from crew import Crew

from opt_parallel.config.run import Run
from opt_parallel.runtime.errors import UserError


def trained(crew: Crew, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The result of `train.py` with these arguments on all processes of `crew`: the status and rank 0's output.

    Hydra's command line, `reporting` and the launcher are left out. A signal or a lost rank needs real processes."""
    status, said, error = 0, io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(said):
            run = quick_run_of(*arguments)
            run.check_world(crew.size)
        status, printed, error = crew(_train, run)[0]
        said.write(printed)
    except UserError as mistake:
        status, error = 2, f"error: {mistake}\n"
    return subprocess.CompletedProcess(["train.py", *arguments], status, said.getvalue(), error)


def _train(run: Run) -> tuple[int, str, str]:
    """On a worker process: train, and return the status, the output and the user's mistake."""
    from opt_parallel.loop import train

    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            return train(run), said.getvalue(), ""
        except UserError as error:
            return 2, said.getvalue(), f"error: {error}\n"
