"""Worker processes for the whole test session, so that a multi-process test starts in milliseconds.

The parent process sends the name of a function and its arguments to all ranks. Each rank calls the function, and
returns the result or a traceback. The parent process asserts. The ranks find each other through a file, and not
through a port.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import current_process
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from command import ROOT, environment, fork_server
from matrix import record

from opt_parallel.config.run import Run

TIMEOUT = 240.0  # maximum seconds for one function call
IDLE_THREADS = 10  # number of threads of a process between two calls, above which it looks for groups to free


class Crew:
    """A pool of `size` processes with one thread each, in a gloo group.

    `all_seconds` is the number of CPU seconds that all pools have used so far."""

    all_seconds = 0.0

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.members = size, []
        with Listener(str(folder / f"crew-{size}.socket")) as listener:
            for rank in range(size):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                arguments = [__file__, listener.address, str(folder / f"crew-{size}")]
                process = fork_server().start(arguments, ROOT, environment(**ranks), 1, 2)
                pipe = listener.accept()
                pipe.send((sys.path, bytes(current_process().authkey)))  # sockets that transfer tensors need it
                self.members.append((process, pipe))

    def __call__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """The results of `function` on all ranks, in the order of the ranks.

        Raises: AssertionError with the tracebacks of the ranks."""
        for run in arguments:
            if isinstance(run, Run):
                record(run, self.size)
        for _, pipe in self.members:
            pipe.send((function, arguments, named))
        answers, failures = [], []
        for rank, (_, pipe) in enumerate(self.members):
            if not pipe.poll(TIMEOUT):
                failures.append(f"rank {rank} did not answer within {TIMEOUT} s")
                continue
            succeeded, answer, seconds = pipe.recv()
            Crew.all_seconds += seconds
            (answers if succeeded else failures).append(answer)
        assert not failures, "\n".join(failures)
        return answers

    def dismiss(self) -> None:
        for process, _ in self.members:
            process.kill()


def _work(pipe: Connection, meeting_point: str) -> None:
    sys.path[:], current_process().authkey = pipe.recv()
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(meeting_point, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
    while True:
        before = time.process_time()
        try:
            function, arguments, named = pipe.recv()  # which imports the function's module
        except EOFError:  # the test session has ended
            os._exit(0)
        try:
            succeeded, answer = True, function(*arguments, **named)
        except BaseException:
            succeeded, answer = False, f"rank {rank}:\n{traceback.format_exc()}"
        seconds = time.process_time() - before
        # Groups that wait for the garbage collector have threads, which wake up a hundred times in a second.
        if len(os.listdir("/proc/self/task")) > IDLE_THREADS:
            gc.collect()
        try:
            pipe.send((succeeded, answer, seconds))
        except Exception:  # the answer cannot be pickled
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}", seconds))


if __name__ == "__main__":
    _work(Client(sys.argv[1]), sys.argv[2])
