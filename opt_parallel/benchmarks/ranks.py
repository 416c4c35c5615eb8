"""Measure what it costs to connect ranks: the time, and each process's sockets, threads and process groups. The ranks
have no model, so that many of them fit on one host."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from opt_parallel.checkpoint.writer import Saver
from opt_parallel.parallel.topology import Topology


class Cost(NamedTuple):
    """What one rank needs. `seconds` is the time to open the topology, and `sockets` are those that are open after each
    group has communicated."""

    seconds: float
    sockets: int
    threads: int
    groups: int


HEAD = ["ranks", "seconds of the slowest", "sockets of a rank", "sockets of rank 0", "threads", "groups"]


def measure(processes: int, tensor: int) -> list[Cost]:
    """The cost of each rank. Rank 0 also hosts the key-value store of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(processes, context) as pool:
        ranks = [pool.submit(_open, rank, processes, tensor, port) for rank in range(processes)]
        return [rank.result() for rank in ranks]


def row(costs: list[Cost]) -> list[str]:
    """A row of the table under `HEAD`."""
    first, others = costs[0], costs[1:]
    return [
        str(len(costs)), f"{max(cost.seconds for cost in costs):.1f}", _span(cost.sockets for cost in others),
        str(first.sockets), _span(cost.threads for cost in costs), _span(cost.groups for cost in costs),
    ]  # fmt: skip


def _open(rank: int, size: int, tensor: int, port: int) -> Cost:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(number) for name, number in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    before, started = _sockets(), time.perf_counter()
    with Topology.open(tensor) as topology:
        seconds = time.perf_counter() - started
        saver = Saver(topology)
        for group in (topology.world, topology.tensor, topology.data):
            topology.sum(1, group)
        dist.all_reduce(torch.zeros(1), group=saver.group)
        topology.exchange(None)
        groups = len(distributed_c10d._world.pg_map)
        cost = Cost(seconds, _sockets() - before, len(os.listdir("/proc/self/task")), groups)
        topology.exchange(None)
        saver.close()
    return cost


def _sockets() -> int:
    """The number of open sockets of this process."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(name).startswith("socket:") for name in names if os.path.lexists(name))


def _span(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}–{found[-1]}"
