"""Ranks whose main threads hang notice that another rank was killed or stopped, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from command import ROOT, environment, fork_server
from fork_server import Forked

HANGS = Path(__file__).parents[1] / "support" / "hanging.py"
FOR_EVER = "10000"


class Ranks:
    """Several ranks of `hanging.py` with their output in files."""

    def __init__(self, folder: Path, arguments: list[list[str]]) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.ranks = [self._start(rank, len(arguments), each, meeting) for rank, each in enumerate(arguments)]

    def _start(self, rank: int, size: int, arguments: list[str], meeting: dict[str, str]) -> Forked:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        with open(self.folder / f"out-{rank}", "wb") as out, open(self.folder / f"err-{rank}", "wb") as err:
            return fork_server().start(
                [str(HANGS), *arguments], ROOT, environment(**ranks, **meeting), out.fileno(), err.fileno()
            )

    def out(self, rank: int) -> str:
        return (self.folder / f"out-{rank}").read_text()

    def errors(self) -> list[str]:
        """The lines of all ranks that are errors of ours, without the host's name."""
        texts = [(self.folder / f"err-{rank}").read_text() for rank in range(len(self.ranks))]
        found = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
        return [line.replace(f"{socket.gethostname()}, ", "") for line in found]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not holds():
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.05)

    def wait_until_all_hang(self) -> None:
        self.wait_until(lambda: all("hangs" in self.out(rank) for rank in range(len(self.ranks))))

    def ended(self) -> list[int]:
        """The ranks that have ended."""
        return [number for number, rank in enumerate(self.ranks) if rank.ended_within(0)]

    def statuses(self) -> list[int]:
        """The statuses of all ranks, once they have ended."""
        self.wait_until(lambda: len(self.ended()) == len(self.ranks))
        return [rank.status for rank in self.ranks]


@contextmanager
def hanging(folder: Path, arguments: list[list[str]]) -> Iterator[Ranks]:
    ranks = Ranks(folder, arguments)
    try:
        yield ranks
    finally:
        for rank in ranks.ranks:
            if not rank.ended_within(0):
                rank.kill()


def test_a_killed_rank_ends_ranks_that_hang(tmp_path: Path) -> None:
    """All ranks end long before the patience with silent ranks, and one of them says who is gone."""
    with hanging(tmp_path, [["1000", "1000", FOR_EVER]] * 4) as run:
        run.wait_until_all_hang()
        os.kill(run.ranks[2].pid, signal.SIGKILL)
        assert run.statuses() == [1, 1, -signal.SIGKILL, 1]
        assert run.errors() == [
            "error: rank 0: another rank is gone or cannot be reached (rank 2 closed its connection): no answer from "
            "rank 2; the same command resumes from the newest checkpoint"
        ]


def test_the_rank_of_the_store_is_killed(tmp_path: Path) -> None:
    with hanging(tmp_path, [["1000", "1000", FOR_EVER]] * 3) as run:
        run.wait_until_all_hang()
        os.kill(run.ranks[0].pid, signal.SIGKILL)
        assert run.statuses() == [-signal.SIGKILL, 1, 1]
        (line,) = run.errors()
        assert re.match("error: rank 1: another rank is gone .* no answer from rank 0; the same command", line)


def test_a_stopped_rank_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    with hanging(tmp_path, [["0.3", "3", FOR_EVER]] * 3) as run:
        run.wait_until_all_hang()
        os.kill(run.ranks[1].pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(run.ranks[1].pid, signal.SIGCONT)
        time.sleep(2.5)
        assert run.ended() == []
        os.kill(run.ranks[1].pid, signal.SIGSTOP)
        run.wait_until(lambda: run.ended() == [0, 2])
        os.kill(run.ranks[1].pid, signal.SIGCONT)
        assert run.statuses() == [1, 1, 1]
        assert run.errors()[0].startswith(
            "error: rank 0: another rank is gone or cannot be reached (rank 1 sent no beat "
        )
        assert "for 3 s): no answer from rank 1; the same command" in run.errors()[0]


def test_ranks_that_leave_at_different_times_are_not_missed(tmp_path: Path) -> None:
    """As at the end of a run, and in a process that trains several runs one after the other."""
    with hanging(tmp_path, [["0.2", "2", "0.1", str(seconds)] for seconds in (3.5, 0, 3)]) as run:
        assert run.statuses() == [0, 0, 0]
        assert run.errors() == []
        assert [run.out(rank).split() for rank in range(3)] == [["hangs", "hangs", "ended"]] * 3


def leave_early(seconds: float) -> tuple[float, list[str]]:
    """On the crew: how long rank 0 takes to leave while rank 1 is busy, and its threads that still watch then."""
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.errors import UserError

    with suppress(UserError), Topology.open(1) as topology:
        topology.barrier()
        began = time.monotonic()
        if topology.is_main:
            raise UserError("a mistake")
        time.sleep(seconds)
    return time.monotonic() - began, [each.name for each in threading.enumerate() if each.name == "liveness"]


def test_a_rank_that_leaves_first_keeps_no_thread(crew: Any) -> None:
    """A thread that waits inside gloo while Python ends would abort the process."""
    (taken, left), (_, others) = crew(2)(leave_early, 3.0)
    assert left == others == []
    assert taken < 2
