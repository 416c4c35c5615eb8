"""Arranges the processes in a grid of data × tensor parallelism, and creates the process groups along its axes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from opt_parallel.config.run import Precision
from opt_parallel.parallel.liveness import watched
from opt_parallel.parallel.roll_call import RollCall
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import Lost, UserError
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import raise_open_files

T = TypeVar("T")
CONTROL_TIMEOUT = timedelta(days=1)  # One rank may prepare text for hours while the other ranks wait.
# Open files of a process, and for each rank, whose connections lead to the process that hosts torch's key-value store.
FILES, FILES_PER_RANK = 300, 3
FIXED_TIMEOUT = "fixed timeout"  # The `group_desc` of groups whose timeout `set_timeout` does not change.
DEVICE_TIMEOUT = timedelta(
    seconds=60
)  # Maximum time for the first use of a device, whose libraries may be on a slow disk.


@dataclass(frozen=True)
class Group:
    """A process group and this process's rank in the group.

    `handle` is None for a group of size 1, which never communicates.
    """

    handle: dist.ProcessGroup | None
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """The group itself: copies of a model communicate through it too."""
        return self


ALONE = Group(None, 0, 1)
# Parts of the messages with which a collective fails when a rank is lost. gloo's messages name its source files, except
# the last one: it reaches a collective that waits while another one runs into its timeout.
LOST = ("gloo", "NCCL", "Application timeout caused pair closure")
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def local_device() -> torch.device:
    """This process's GPU, or the CPU if the host has no GPU.

    Raises: UserError if the launcher started more processes on this host than the host has GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    processes, devices = process.local_world_size(), torch.cuda.device_count()
    if processes > devices:
        raise UserError(
            f"{processes} processes were started on a host with {devices} GPUs: start at most {devices} on this host, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return torch.device("cuda", process.local_rank())


@dataclass(frozen=True)
class Topology:
    """The process groups of a run, whose world size is the data-parallel degree times the tensor-parallel degree.

    Neighbouring ranks are in the same tensor group, because tensor groups communicate most. For example, 8 ranks with
    tensor degree 2 have the tensor groups {0, 1} {2, 3} {4, 5} {6, 7} and the data groups {0, 2, 4, 6} {1, 3, 5, 7}.

    `hosts` names each rank's host. `control` is a gloo group with a timeout of one day, which exchanges Python objects.
    The `get_…` methods are the interface that DeepSpeed expects of its argument `mpu`.
    """

    world: Group
    data: Group
    tensor: Group
    device: torch.device
    hosts: tuple[str, ...]
    control: dist.ProcessGroup | None
    roll_call: RollCall | None

    @classmethod
    @contextmanager
    def open(cls, tensor: int, allow_cross_node: bool = True) -> Iterator[Topology]:
        """Create the process groups of the processes that the launcher started, or of this process without a launcher.

        The tensor and data groups are destroyed at the end of the context. The default group remains, because a Hydra
        multirun executes several runs in one process.

        Raises: UserError, on every rank, if `tensor` does not divide the world size or differs between ranks, if a host
        has too few GPUs, or if a tensor group spans several hosts and `allow_cross_node` is false."""
        _join()
        rank, size = dist.get_rank(), dist.get_world_size()
        control = None
        if size > 1:
            control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc=FIXED_TIMEOUT)
        # The tensor degrees are compared first, because ranks with different degrees would create different groups.
        ranks = _exchange((process.host(), tensor, time.time_ns()), control)
        hosts = tuple(host for host, _, _ in ranks)
        _check_grid([degree for _, degree, _ in ranks], hosts, allow_cross_node)
        device = _together(_own_device, control, hosts, DEVICE_TIMEOUT)
        grid = torch.arange(size).view(size // tensor, tensor)
        handles = [control] if control else []
        rows = _axis_group(grid, rank, handles)
        columns = _axis_group(grid.T, rank, handles)
        with ExitStack() as watching:
            roll_call = None
            if size > 1:
                roll_call = RollCall(store_of(f"roll-call-{ranks[0][2]}"), rank, hosts)
                watching.callback(roll_call.close)
                ring = PrefixStore(f"ring-{ranks[0][2]}", distributed_c10d._get_default_store())
                watching.enter_context(watched(ring, rank, hosts, roll_call))
            yield cls(Group(dist.group.WORLD, rank, size), columns, rows, device, hosts, control, roll_call)
        # After an error this is not reached: it would wait for collectives that other ranks never join.
        for handle in handles:
            dist.destroy_process_group(handle)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes for the run."""
        return self.world.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. The all-reduce runs on the CPU, so the GPU does not wait for it."""
        return self.sum(int(flag), self.world) > 0

    def sum(self, value: int, group: Group) -> int:
        """The sum of the integers that the ranks of `group` pass."""
        total = torch.tensor(value, dtype=torch.int64)
        if group.size > 1:
            dist.all_reduce(total, group=group.handle)
        return int(total)

    def start_sum(self, values: list[int]) -> Callable[[], list[int]]:
        """Start to add up the `values` of all ranks, element by element, and return a function that waits for the sums.

        All ranks must call the method in the same order as their other collectives, and may compute meanwhile."""
        total = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(total, async_op=True) if self.world.size > 1 else None

        def wait() -> list[int]:
            if work is not None:
                work.wait()
            return total.tolist()

        return wait

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self.world.size > 1:
            dist.all_reduce(torch.zeros(1))

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks. The call waits up to a day for the slowest rank."""
        return _exchange(value, self.control)

    def together(self, work: Callable[[], T], within: timedelta | None = None) -> T:
        """Call `work` on every rank, wait for all ranks, and return this rank's result.

        Raises: UserError on every rank, if `work` raises it on any rank, or if a rank does not finish `within` this
        time. The message starts with host and rank, unless all ranks raise the same message."""
        return _together(work, self.control, self.hosts, within)

    def where(self, rank: int) -> str:
        """The name of a rank in messages, such as `nodeB, rank 3`."""
        return f"{self.hosts[rank]}, rank {rank}"

    def ranks_on(self, host: str) -> list[int]:
        """The ranks that run on `host`."""
        return [rank for rank, name in enumerate(self.hosts) if name == host]

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of the collectives of all existing groups, including DeepSpeed's groups.

        The timeouts of `control` and of the group that writes checkpoints do not change. Call this method after setup,
        because during setup some ranks may take much longer than others."""
        for group in distributed_c10d._world.pg_map:
            if group.group_desc != FIXED_TIMEOUT:
                distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    @contextmanager
    def losing(self, timeout: float) -> Iterator[None]:
        """A context that turns the failure of a collective into one line with the missing rank. Raises: Lost."""
        try:
            yield
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            if not (isinstance(error, dist.DistError) or any(text in why for text in LOST)):
                raise
            why = re.sub(r"^\[\S+:\d+\] ", "", why)  # gloo's messages start with a file and line of its source code
            missing, speaks = self.roll_call.ask() if self.roll_call else ("", True)
            raise Lost(
                f"{self.where(self.world.rank)}: another rank is gone, cannot be reached, or did not answer within "
                f"parallel.timeout={timeout:g} s ({why}): {missing}; the same command resumes from the newest "
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
    check_rank_variables()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    # gloo connects two ranks when they first communicate. Otherwise each group would connect each rank with all others.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    files, needed = raise_open_files(), FILES + FILES_PER_RANK * process.world_size()
    if files < needed:
        say(
            f"warning: rank 0 may open {files} files (ulimit -n), and {process.world_size()} ranks may need {needed}: "
            "raise the hard limit if ranks cannot connect"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, but not {' and '.join(missing)}: start with torchrun, or pass these variables to every "
            "process, as mpirun -x MASTER_ADDR=… does"
        )
    dist.init_process_group(backend)


def check_rank_variables() -> None:
    """Raise UserError unless the launcher's environment variables are numbers that are consistent with each other."""
    for name in process.RANK_VARIABLES:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(
                f"{name}={os.environ[name]} is not a whole number of 0 or more: start with torchrun, or unset it"
            )
    if process.rank() >= process.world_size():
        raise UserError(
            f"RANK={process.rank()} must be less than WORLD_SIZE={process.world_size()}: "
            "start with torchrun, or unset both"
        )


def store_of(prefix: str) -> Any:
    """torch's key-value store that all ranks share, restricted to keys with `prefix`.

    A TCP store gets its own connection, because the default connection may be blocked by a waiting call."""
    store: Any = distributed_c10d._get_default_store()
    over_network = isinstance(store._underlying_non_prefix_store, TCPStore)
    return PrefixStore(prefix, store.clone() if over_network else store)


def _own_device() -> torch.device:
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)  # a previous run of a Hydra multirun may have used the device
    return device


def _exchange(value: T, control: dist.ProcessGroup | None) -> list[T]:
    if control is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control)
    return values


def _together(
    work: Callable[[], T], control: dist.ProcessGroup | None, hosts: tuple[str, ...], within: timedelta | None = None
) -> T:
    result, mistake = None, None
    name = _exchange(f"done-{time.time_ns()}", control)[0] if within else ""
    try:
        result = work()
    except UserError as error:
        mistake = error
    if within is not None and control is not None:
        _await_all(name, control, hosts, within)
    lines = _exchange(None if mistake is None else str(mistake), control)
    failed = [rank for rank, line in enumerate(lines) if line is not None]
    if not failed:
        return result  # type: ignore[return-value]
    first = failed[0]
    line = str(lines[first])
    if lines.count(line) < len(lines):  # some ranks did not raise this error
        line = f"{hosts[first]}, rank {first}: {line}"
    raise UserError(line, shared=True) from mistake


def _await_all(name: str, control: dist.ProcessGroup, hosts: tuple[str, ...], within: timedelta) -> None:
    """Raise UserError with the names of the ranks that do not call this function `within` the given time.

    Each rank that calls it sets a key that starts with `name` in torch's key-value store."""
    store = distributed_c10d._get_default_store()
    store.set(f"{name}-{dist.get_rank()}", "")
    try:
        dist.all_reduce(torch.zeros(1), group=control, async_op=True).wait(within)
    except RuntimeError as error:
        silent = [rank for rank in range(len(hosts)) if not store.check([f"{name}-{rank}"])]
        if not silent:
            raise
        named = "; ".join(f"{hosts[rank]}, rank {rank}" for rank in silent)
        raise UserError(
            f"{named} did not answer within {within.seconds} s: its device or its host hangs, take it out of service",
            shared=0 not in silent,  # rank 0 prints the line unless it hangs itself
        ) from error


def _check_grid(tensor: list[int], hosts: tuple[str, ...], allow_cross_node: bool) -> None:
    """Raise UserError unless all ranks have the same tensor degree, and this degree divides the world size.

    An error is also raised if a tensor group spans several hosts and `allow_cross_node` is false. The error is the same
    on every rank."""
    size, degree = len(hosts), tensor[0]
    for rank, other in enumerate(tensor):
        if other != degree:
            raise UserError(
                f"{hosts[rank]}, rank {rank} was started with tensor degree {other}, {hosts[0]}, rank 0 with "
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
        spanned = sorted({hosts[rank] for rank in ranks})
        if len(spanned) > 1 and not allow_cross_node:
            where = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
            most = min(hosts.count(host) for host in spanned)
            raise UserError(
                f"parallel.tensor={degree}: a tensor group spans several hosts ({where}), and every layer would "
                f"wait for the network: start a multiple of {degree} processes on each host, lower parallel.tensor (to "
                f"{most} or a divisor of it), or set parallel.allow_cross_node=true",
                shared=True,
            )


def _axis_group(grid: torch.Tensor, rank: int, handles: list[dist.ProcessGroup]) -> Group:
    """The process group of the row of `grid` that contains `rank`. The group's handle is appended to `handles`.

    Every process creates the groups of all rows, as torch requires."""
    mine = ALONE
    for row in grid.tolist():
        handle = dist.new_group(row)
        if rank in row:
            assert isinstance(handle, dist.ProcessGroup)
            handles.append(handle)
            mine = Group(handle, row.index(rank), len(row))
    return mine
