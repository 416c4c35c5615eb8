"""The grid of processes: data × tensor, and the groups along its axes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from opt_parallel.config import Precision
from opt_parallel.errors import UserError


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
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > devices:
        raise UserError(
            f"{processes} processes were started on a machine with {devices} GPUs: start at most {devices} here, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise UserError if `device` cannot train in `precision`."""
    if precision is Precision.fp16 and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise UserError("precision=fp16 is not supported by this CPU: use precision=bf16 or precision=fp32")
    if (
        precision is Precision.bf16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"precision=bf16 is not supported by {name}: use precision=fp16 or precision=fp32")


@dataclass(frozen=True)
class Topology:
    """World size = data × tensor; neighbouring ranks share a tensor group, which talks most.

    For 8 ranks at tensor 2 the grid is ((0, 1), (2, 3), (4, 5), (6, 7)): tensor groups are its rows, {0, 1} {2, 3}
    {4, 5} {6, 7}; data groups its columns, {0, 2, 4, 6} {1, 3, 5, 7}.

    The `get_…` methods are the face that DeepSpeed asks for as `mpu`.
    """

    world: Group
    data: Group
    tensor: Group
    device: torch.device

    @classmethod
    @contextmanager
    def open(cls, tensor: int) -> Iterator[Topology]:
        """Join the processes that the launcher started, or stand alone; the axes' groups end with the context.

        The default group outlives it: one process runs several experiments of a multirun one after the other.

        Raises: UserError if `tensor` does not divide the world size."""
        device = local_device()
        _join(device)
        rank, size = dist.get_rank(), dist.get_world_size()
        if size % tensor:
            raise UserError(
                f"tensor degree {tensor} does not divide world size {size}: start a multiple of {tensor} processes "
                f"(torchrun --nproc-per-node {tensor} …), or choose another tensor degree"
            )
        grid = torch.arange(size).view(size // tensor, tensor)
        made: list[dist.ProcessGroup] = []
        rows = _axis_group(grid, rank, made)
        columns = _axis_group(grid.T, rank, made)
        yield cls(Group(dist.group.WORLD, rank, size), data=columns, tensor=rows, device=device)
        for handle in made:  # not after an error: a group would wait for work that its other ranks never do
            dist.destroy_process_group(handle)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.world.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank. A small all-reduce on the CPU: no device waits for it."""
        return bool(self.sum(int(flag), self.world))

    def sum(self, value: int, group: Group) -> int:
        """Sum of a host integer over `group`."""
        total = torch.tensor(value, dtype=torch.int64)
        if group.size > 1:
            dist.all_reduce(total, group=group.handle)
        return int(total)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            dist.all_reduce(torch.zeros(1))

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


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)  # of an earlier run of a multirun
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


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
