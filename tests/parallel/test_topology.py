"""The grid: groups for 4 ranks, the sums that its messages print."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest

from opt_parallel.parallel.topology import Topology
from opt_parallel.runtime.errors import Lost, UserError


def grid(tensor: int) -> tuple[Any, ...]:
    import torch.distributed as dist

    with Topology.open(tensor) as topology:
        tensor_ranks = dist.get_process_group_ranks(topology.tensor.handle)
        data_ranks = dist.get_process_group_ranks(topology.data.handle)
        total = topology.sum(topology.world.rank, topology.world)
        anyone = topology.any(topology.world.rank == 2), topology.any(False)
        return tensor_ranks, topology.tensor.rank, data_ranks, topology.data.rank, topology.is_main, total, anyone


def test_the_grid_of_four(crew: Any) -> None:
    assert crew(4)(grid, 2) == [
        ([0, 1], 0, [0, 2], 0, True, 6, (True, False)),
        ([0, 1], 1, [1, 3], 0, False, 6, (True, False)),
        ([2, 3], 0, [0, 2], 1, False, 6, (True, False)),
        ([2, 3], 1, [1, 3], 1, False, 6, (True, False)),
    ]


def test_a_tensor_degree_that_does_not_divide(crew: Any) -> None:
    with pytest.raises(AssertionError, match="UserError: tensor degree 3 does not divide world size 4"):
        crew(4)(grid, 3)


def one_stays_away(seconds: float) -> str:
    """On the crew: what rank 0 says of a collective that rank 1 does not come to; only that group is hurt."""
    import torch
    import torch.distributed as dist

    with Topology.open(1) as topology:
        topology.set_timeout(seconds)
        topology.exchange(None)  # both have set it
        line = ""
        try:
            with topology.losing(seconds):
                if topology.is_main:
                    dist.all_reduce(torch.zeros(3), group=topology.data.handle)
        except Lost as lost:
            line = str(lost)
        topology.set_timeout(60.0)
        topology.exchange(None)  # its timeout is not changed: rank 1 has waited here
        return line


def test_a_rank_that_does_not_answer_is_given_up(crew: Any) -> None:
    began = datetime.datetime.now()
    line, silent = crew(2)(one_stays_away, 1.0)
    assert "rank 0: another rank is gone, cannot be reached, or did not answer within parallel.timeout=1 s (" in line
    assert "\n" not in line
    assert silent == ""
    assert datetime.datetime.now() - began < datetime.timedelta(seconds=30)  # of the crew's 60


def one_writes_longer(folder: Path, seconds: float) -> str | None:
    """On the crew: why a checkpoint failed of which rank 1 writes its file longer than a step may take."""
    from opt_parallel.checkpoint.writer import Saver

    with Topology.open(1) as topology:
        saver = Saver(topology)
        topology.set_timeout(seconds)
        write = saver._write_file

        def slowly(*arguments: Any) -> None:
            if not topology.is_main:
                time.sleep(3 * seconds)
            write(*arguments)

        saver._write_file = slowly  # type: ignore[method-assign, assignment]
        saver.start([], [], folder, lambda: None)
        failure = saver.wait()
        topology.set_timeout(60.0)
        topology.exchange(None)
        saver.close()
        return failure


def test_a_checkpoint_may_take_longer_than_a_step(crew: Any, tmp_path: Path) -> None:
    assert crew(2)(one_writes_longer, tmp_path, 1.0) == [None, None]


def raised_after(message: str) -> Exception | None:
    """On the crew: what `losing` makes of a RuntimeError."""
    with Topology.open(1) as topology:
        try:
            with topology.losing(1.0):
                raise RuntimeError(message)
        except (RuntimeError, Lost) as error:
            return error
        finally:
            topology.exchange(None)  # rank 0 keeps the store that the other rank asks


def test_a_collective_that_fails_because_another_one_did_is_a_lost_rank(crew: Any) -> None:
    """gloo gives it a message without the name of a source file."""
    for error in crew(2)(raised_after, "Application timeout caused pair closure"):
        assert isinstance(error, Lost)
        assert "another rank is gone" in str(error)


def test_a_fault_of_our_own_is_no_lost_rank(crew: Any) -> None:
    errors = crew(2)(raised_after, "mat1 and mat2 shapes cannot be multiplied")
    assert [type(error) for error in errors] == [RuntimeError] * 2


def mistakes(lines: list[str | None]) -> list[str]:
    """On the crew: what `together` makes of each rank's mistake."""
    with Topology.open(1) as topology:
        line = lines[topology.world.rank]

        def work() -> str:
            if line is not None:
                raise UserError(line)
            return "fine"

        try:
            return [topology.together(work)]
        except UserError as error:
            return [str(error), str(error.shared)]


def test_a_mistake_of_one_rank_is_everybodys(crew: Any) -> None:
    assert crew(2)(mistakes, [None, None]) == [["fine"]] * 2
    assert crew(2)(mistakes, ["wrong", "wrong"]) == [["wrong", "True"]] * 2
    where, shared = crew(2)(mistakes, [None, "wrong"])[0]
    assert where.endswith(", rank 1: wrong")
    assert shared == "True"
    first = crew(2)(mistakes, ["this", "that"])
    assert first[0] == first[1]
    assert first[0][0].endswith(", rank 0: this")
