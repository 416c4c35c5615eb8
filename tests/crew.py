"""Worker processes that live as long as the test session, so that a multi-process test costs milliseconds.

The parent sends a function by name with its arguments; every rank runs it and answers with its result or its
traceback; assertions stand in the parent. The processes meet through a file, so no port is taken.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 240.0  # seconds for one function; DeepSpeed's first use compiles nothing but imports much


class Crew:
    """`size` processes of one thread each, joined in a gloo group."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size, self.members = size, []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, folder / f"crew-{size}", theirs), daemon=True)
            process.start()
            self.members.append((process, ours))

    def __call__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """What `function` returned on each rank.

        Raises: AssertionError with the ranks' tracebacks."""
        for _, pipe in self.members:
            pipe.send((function, arguments, named))
        answers, failures = [], []
        for rank, (_, pipe) in enumerate(self.members):
            if not pipe.poll(PATIENCE):
                failures.append(f"rank {rank} did not answer within {PATIENCE} s")
                continue
            succeeded, answer = pipe.recv()
            (answers if succeeded else failures).append(answer)
        assert not failures, "\n".join(failures)
        return answers

    def dismiss(self) -> None:
        for process, _ in self.members:
            process.kill()


def _work(rank: int, size: int, meeting_point: Path, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    from opt_parallel.log import quiet_libraries

    quiet_libraries()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting_point), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
    while True:
        function, arguments, named = pipe.recv()
        try:
            pipe.send((True, function(*arguments, **named)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
