"""The grid of processes: data × tensor, and the groups along its axes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from opt_parallel.config.run import Precision
from opt_parallel.parallel.roll_call import RollCall
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import Lost, UserError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of the words between ranks: one may prepare text while the others wait
UNHURRIED = "unhurried"  # the description of a group that keeps the patience it was made with
DEVICE_PATIENCE = timedelta(seconds=60)  # until a device shows that it is alive; its libraries may lie on a slow disk


@dataclass(frozen=True)
class Group:
    """Processes that talk to each other, and this process's place among them.

    `handle` is None for a group of one that never communicates (a model on one process, or on the meta device).
    """

    handle: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Group(None, 0, 1)
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def local_device() -> torch.device:
    """This process's GPU, or the CPU on a machine without one.

    Raises: UserError if the launcher started more processes on this machine than it has GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    processes, devices = process.local_world_size(), torch.cuda.device_count()
    if processes > devices:
        raise UserError(
            f"{processes} processes were started on a machine with {devices} GPUs: start at most {devices} here, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return torch.device("cuda", process.local_rank())


@dataclass(frozen=True)
class Topology:
    """World size = data × tensor; neighbouring ranks share a tensor group, which talks most.

    For 8 ranks at tensor 2 the grid is ((0, 1), (2, 3), (4, 5), (6, 7)): tensor groups are its rows, {0, 1} {2, 3}
    {4, 5} {6, 7}; data groups its columns, {0, 2, 4, 6} {1, 3, 5, 7}.

    `hosts` names each rank's host. `words` is a group on the CPU whose patience does not end, for what ranks tell each
    other. The `get_…` methods are the face that DeepSpeed asks for as `mpu`.
    """

    world: Group
    data: Group
    tensor: Group
    device: torch.device
    hosts: tuple[str, ...]
    words: dist.ProcessGroup | None
    calls: RollCall | None

    @classmethod
    @contextmanager
    def open(cls, tensor: int, allow_cross_node: bool = True) -> Iterator[Topology]:
        """Join the processes that the launcher started, or stand alone; the axes' groups end with the context.

        The default group outlives it: one process runs several experiments of a multirun one after the other.

        Raises: UserError, on every rank, if `tensor` does not divide the world size or is not the same everywhere, if
        a host has too few GPUs, or if a tensor group lies on several hosts and `allow_cross_node` does not."""
        _join()
        rank, size = dist.get_rank(), dist.get_world_size()
        words = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc=UNHURRIED) if size > 1 else None
        told = _exchange(
            (process.host(), tensor, time.time_ns()), words
        )  # before the groups: ranks that disagree would make others
        hosts = tuple(host for host, _, _ in told)
        _check_grid([theirs for _, theirs, _ in told], hosts, allow_cross_node)
        device = _together(_own_device, words, hosts, DEVICE_PATIENCE)
        grid = torch.arange(size).view(size // tensor, tensor)
        made = [words] if words else []
        rows = _axis_group(grid, rank, made)
        columns = _axis_group(grid.T, rank, made)
        calls = None
        if size > 1:
            calls = RollCall(partial(store_of, f"roll-call-{told[0][2]}"), rank, hosts)
        try:
            yield cls(Group(dist.group.WORLD, rank, size), columns, rows, device, hosts, words, calls)
        finally:
            if calls:
                calls.close()
        for handle in made:  # not after an error: a group would wait for work that its other ranks never do
            dist.destroy_process_group(handle)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.world.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank. A small all-reduce on the CPU: no device waits for it."""
        return bool(self.largest(int(flag)))

    def largest(self, value: int) -> int:
        """The largest of the ranks' integers."""
        return self._reduced(value, self.world, dist.ReduceOp.MAX)

    def sum(self, value: int, group: Group) -> int:
        """Sum of a host integer over `group`."""
        return self._reduced(value, group, dist.ReduceOp.SUM)

    def _reduced(self, value: int, group: Group, operation: Any) -> int:
        total = torch.tensor(value, dtype=torch.int64)
        if group.size > 1:
            dist.all_reduce(total, operation, group=group.handle)
        return int(total)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            dist.all_reduce(torch.zeros(1))

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks; however long the slowest takes."""
        return _exchange(value, self.words)

    def together(self, work: Callable[[], T], within: timedelta | None = None) -> T:
        """What `work` returns here, once it is done everywhere; ranks that are not `within` a time are named.

        Raises: UserError, on every rank, if it does on any: with host and rank unless all say the same."""
        return _together(work, self.words, self.hosts, within)

    def where(self, rank: int) -> str:
        """A rank in words: `nodeB, rank 3`."""
        return f"{self.hosts[rank]}, rank {rank}"

    def ranks_on(self, host: str) -> list[int]:
        """The ranks of a host."""
        return [rank for rank, name in enumerate(self.hosts) if name == host]

    def set_timeout(self, seconds: float) -> None:
        """How long a collective of any group made so far, DeepSpeed's too, waits for a rank; not those of `words` and
        of checkpoints being written.

        For the steps, which the ranks take together: what comes before may take some of them much longer."""
        for group in distributed_c10d._world.pg_map:
            if group.group_desc != UNHURRIED:
                distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    @contextmanager
    def losing(self, timeout: float) -> Iterator[None]:
        """Turn the failure of a collective into a line that says where. Raises: Lost."""
        try:
            yield
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            if not (isinstance(error, dist.DistError) or "gloo" in why or "NCCL" in why):
                raise
            why = re.sub(r"^\[\S+:\d+\] ", "", why)  # not where in gloo's own sources
            missing, speaks = self.calls.ask() if self.calls else ("", True)
            raise Lost(
                f"{self.where(self.world.rank)}: another rank is gone, cannot be reached, or did not answer within "
                f"parallel.timeout={timeout:g} s ({why}): {missing}; the same command goes on from the newest "
                "checkpoint",
                speaks,
            ) from error

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor.handle

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data.handle


def _join() -> None:
    if dist.is_initialized():
        return
    check_place()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, but not {' and '.join(missing)}: start by torchrun, or hand on how many processes there are "
            "and where they meet, as mpirun -x MASTER_ADDR=… does"
        )
    dist.init_process_group(backend)


def check_place() -> None:
    """Raise UserError unless the launcher's variables are numbers that fit together."""
    for name in process.RANK_VARIABLES:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(
                f"{name}={os.environ[name]} is not a whole number from 0 on: start by torchrun, or unset it"
            )
    if process.rank() >= process.world_size():
        raise UserError(
            f"RANK={process.rank()} must be less than WORLD_SIZE={process.world_size()}: "
            "start by torchrun, or unset both"
        )


def store_of(prefix: str) -> Any:
    """The ranks' store, by a connection of its own where it is a server's: another one may be busy with a wait."""
    store: Any = distributed_c10d._get_default_store()
    over_network = isinstance(store._underlying_non_prefix_store, TCPStore)
    return PrefixStore(prefix, store.clone() if over_network else store)


def _own_device() -> torch.device:
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)  # of an earlier run of a multirun
    return device


def _exchange(value: T, words: dist.ProcessGroup | None) -> list[T]:
    if words is None:
        return [value]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value, group=words)
    return told


def _together(
    work: Callable[[], T], words: dist.ProcessGroup | None, hosts: tuple[str, ...], within: timedelta | None = None
) -> T:
    result, mistake = None, None
    name = _exchange(f"done-{time.time_ns()}", words)[0] if within else ""
    try:
        result = work()
    except UserError as error:
        mistake = error
    if within is not None and words is not None:
        _await_all(name, words, hosts, within)
    told = _exchange(None if mistake is None else str(mistake), words)
    mistaken = [rank for rank, line in enumerate(told) if line is not None]
    if not mistaken:
        return result  # type: ignore[return-value]
    first = mistaken[0]
    line = str(told[first])
    if told.count(line) < len(told):  # not everybody's
        line = f"{hosts[first]}, rank {first}: {line}"
    raise UserError(line, shared=True) from mistake


def _await_all(name: str, words: dist.ProcessGroup, hosts: tuple[str, ...], within: timedelta) -> None:
    """Raise UserError that names the ranks which do not get here `within` a time: by the store, in which each that does
    leaves a note under `name`."""
    store = distributed_c10d._get_default_store()
    store.set(f"{name}-{dist.get_rank()}", "")
    try:
        dist.all_reduce(torch.zeros(1), group=words, async_op=True).wait(within)
    except RuntimeError as error:
        silent = [rank for rank in range(len(hosts)) if not store.check([f"{name}-{rank}"])]
        if not silent:
            raise
        named = "; ".join(f"{hosts[rank]}, rank {rank}" for rank in silent)
        raise UserError(
            f"{named} did not answer within {within.seconds} s: its device or its host hangs, take it out of service",
            shared=0 not in silent,  # rank 0 says it, where it can
        ) from error


def _check_grid(tensor: list[int], hosts: tuple[str, ...], allow_cross_node: bool) -> None:
    """Raise UserError, the same on every rank, unless the ranks' tensor degrees are one that makes a grid."""
    size, degree = len(hosts), tensor[0]
    for rank, theirs in enumerate(tensor):
        if theirs != degree:
            raise UserError(
                f"{hosts[rank]}, rank {rank} was started with tensor degree {theirs}, {hosts[0]}, rank 0 with "
                f"{degree}: start every rank with the same command line",
                shared=True,
            )
    if size % degree:
        raise UserError(
            f"tensor degree {degree} does not divide world size {size}: start a multiple of {degree} processes "
            f"(torchrun --nproc-per-node {degree} …), or choose another tensor degree",
            shared=True,
        )
    for first in range(0, size, degree):
        ranks = range(first, first + degree)
        apart = sorted({hosts[rank] for rank in ranks})
        if len(apart) > 1 and not allow_cross_node:
            placed = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
            most = min(hosts.count(host) for host in apart)
            raise UserError(
                f"parallel.tensor={degree}: a tensor group lies on several hosts ({placed}), and every layer would "
                f"wait for the network: start a multiple of {degree} processes on each host, lower parallel.tensor (to "
                f"{most} or a divisor of it), or set parallel.allow_cross_node=true",
                shared=True,
            )


def _axis_group(grid: torch.Tensor, rank: int, made: list[dist.ProcessGroup]) -> Group:
    """The group of the row of `grid` that holds `rank`; every process takes part in making every row's."""
    mine = ALONE
    for row in grid.tolist():
        handle = dist.new_group(row)
        if rank in row:
            assert isinstance(handle, dist.ProcessGroup)
            made.append(handle)
            mine = Group(handle, row.index(rank), len(row))
    return mine
