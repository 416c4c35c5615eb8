"""Measure the time that a collective takes on the host, by torch's functional collectives and by ours.

The group is torch's fake group, which does not communicate. A GPU whose queue is empty waits for the measured time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from opt_parallel.parallel.collectives import all_gather_last, all_reduce
from opt_parallel.parallel.topology import Group

CALLS = 1000  # in a round
RANKS = 8


def measure(rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU time of a call in each round, in which the collectives take turns."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    assert dist.group.WORLD is not None
    group, tensor = Group(dist.group.WORLD, 0, RANKS), torch.ones(8)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce, functional": lambda: functional.wait_tensor(functional.all_reduce(tensor, "sum", group.handle)),
        "all-reduce, of a copy": lambda: all_reduce(tensor, group),
        "all-reduce, in place": lambda: dist.all_reduce(tensor, group=group.handle),
        "all-gather, functional": lambda: functional.wait_tensor(functional.all_gather_tensor(tensor, 0, group.handle)),
        "all-gather, ours": lambda: all_gather_last(tensor, group),
    }
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(CALLS):
                call()
            if turn >= 0:  # the first turn loads libraries
                measured[name].append((time.process_time() - start) / CALLS * 1e6)
    dist.destroy_process_group()
    return measured


def table(measured: dict[str, list[float]]) -> list[list[str]]:
    """The rows of the table, with medians and ranges."""
    rows = [["collective", "CPU time of a call (range)"]]
    for name, times in measured.items():
        rows.append([name, f"{statistics.median(times):,.0f} µs ({min(times):,.0f}–{max(times):,.0f})"])
    return rows
