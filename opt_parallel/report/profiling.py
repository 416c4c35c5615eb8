"""Trace training steps with torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import optional

PROFILE = "profile"  # the folder of the traces in the run's folder


@contextmanager
def profiled(steps: int, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps of this process, after two steps that are not traced, and write the trace of this `rank` to
    `folder`/profile. The context's value is a function to call at the end of each step. Nothing is traced with
    `steps=0`."""
    if not steps:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        path = folder / PROFILE / f"rank-{rank}.json"
        with optional(path):
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
            say(f"trace of {steps} steps: {path.parent}, for ui.perfetto.dev or chrome://tracing")

    # The first step of a process compiles and allocates. The profiler itself warms up during the second step.
    timetable = schedule(wait=1, warmup=1, active=steps, repeat=1)
    with profile(schedule=timetable, on_trace_ready=write, profile_memory=torch.cuda.is_available()) as profiler:
        yield profiler.step
