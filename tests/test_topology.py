"""The grid: groups for 4 ranks, the sums that its messages print."""

from __future__ import annotations

from typing import Any

import pytest

from opt_parallel.topology import Topology


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
