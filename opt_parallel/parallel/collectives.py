"""Collectives of a process group, with and without a gradient.

The collectives with a gradient are named after their forward pass. All except `start_all_reduce`, `reduce_to` and
`all_gather_in_place` return a new tensor. A group of size 1 does not communicate.

The functions of `torch.distributed` are called directly, because torch's functional collectives take ten times as long
on the host. torch.compile needs the functional collectives, because it loses the gradient of a tensor that is
overwritten. So `copy`, `reduce`, `gather`, `scatter` and the parallel layers use them while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from opt_parallel.parallel.topology import Group

# torch 2.13 renamed these functions, and warns of the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, group: Group, operation: str = "sum") -> Tensor:
    """The sum (or the maximum, if `operation` is "max") of `tensor` over the group, without a gradient."""
    if group.size == 1:
        return tensor
    if torch.compiler.is_compiling():
        assert group.handle is not None
        return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), operation, group.handle))
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, getattr(dist.ReduceOp, operation.upper()), group=group.handle)
    return total


def reduce_to(tensor: Tensor, rank: int, group: Group) -> dist.Work | None:
    """Begin to replace `tensor` on one rank of the group by the sum over the group, and return the operation to wait
    for. On the other ranks the values of `tensor` are lost. A group of size 1 returns None."""
    if group.size == 1:
        return None
    return dist.reduce(tensor, group=group.handle, group_dst=rank, async_op=True)


def all_gather_in_place(whole: Tensor, part: Tensor, group: Group) -> None:
    """Fill `whole` (n · size,) with the ranks' parts (n,). `part` is this rank's part of `whole`."""
    if group.size > 1:
        _all_gather(whole, part, group=group.handle)


def start_all_reduce(tensor: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start to replace `tensor` by its sum over the group. The returned function waits, and returns the sum.

    Only the caller may hold `tensor`, because torch.compile needs the sum to be a new tensor."""
    if group.size == 1:
        return lambda: tensor
    if torch.compiler.is_compiling():
        total = all_reduce(tensor, group)
        return lambda: total
    return _waiting(dist.all_reduce(tensor, group=group.handle, async_op=True), tensor)


def _waiting(work: Any, result: Tensor) -> Callable[[], Tensor]:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait


def start_all_gather(tensor: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start to stack the ranks' tensors. The returned function waits, and returns (size, …), without a gradient."""
    tensor = tensor.detach().contiguous()
    stacked = tensor.new_empty(group.size, *tensor.shape)
    if tensor.is_cuda:
        return _waiting(_all_gather(stacked, tensor.unsqueeze(0), group=group.handle, async_op=True), stacked)
    stacked[group.rank] = tensor  # on CPUs, broadcasts are faster than gloo's all-gather
    works = [
        dist.broadcast(part, group=group.handle, group_src=rank, async_op=True) for rank, part in enumerate(stacked)
    ]

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return stacked

    return wait


def start_reduce_scatter(stacked: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start to sum `stacked` (size, …) over the ranks. The returned function waits, and returns this rank's element
    (…) of the sum, without a gradient."""
    if stacked.is_cuda:
        part = torch.empty_like(stacked[0])
        return _waiting(_reduce_scatter(part.unsqueeze(0), stacked, group=group.handle, async_op=True), part)
    received = torch.empty_like(stacked)  # gloo's reduce-scatter is an all-reduce, which sends more
    work = dist.all_to_all_single(received, stacked, group=group.handle, async_op=True)

    def wait() -> Tensor:
        work.wait()
        total = received[0] + received[1]
        for part in received[2:]:
            total += part
        return total

    return wait


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """The first rank's `tensor`, on every rank of the group, without a gradient.

    On the other ranks, only the shape and dtype of `tensor` are used."""
    if group.size == 1:
        return tensor
    received = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, group=group.handle, group_src=0)
    return received


def all_gather_last(tensor: Tensor, group: Group) -> Tensor:
    """The ranks' tensors (…, n), concatenated along the last dim to (…, n · size), without a gradient."""
    if group.size == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    if torch.compiler.is_compiling():
        assert group.handle is not None
        stacked = functional.wait_tensor(functional.all_gather_tensor(tensor.unsqueeze(0), 0, group.handle))
    else:
        stacked = tensor.new_empty(group.size, *tensor.shape)
        _all_gather(stacked, tensor.unsqueeze(0), group=group.handle)
    return torch.cat(stacked.unbind(0), dim=-1)


def _own_part(tensor: Tensor, group: Group) -> Tensor:
    return tensor.chunk(group.size, dim=-1)[group.rank].contiguous()


def copy(tensor: Tensor, group: Group) -> Tensor:
    """Return `tensor`. The backward pass sums the gradients of all ranks, because every rank uses the tensor."""
    return tensor if group.size == 1 else _Copy.apply(tensor, group)


def reduce(tensor: Tensor, group: Group) -> Tensor:
    """Return the sum of the ranks' tensors. The backward pass passes the gradient of the sum on unchanged."""
    return tensor if group.size == 1 else _Reduce.apply(tensor, group)


def gather(tensor: Tensor, group: Group) -> Tensor:
    """Concatenate the ranks' tensors along the last dim. The backward pass gives each rank its part of the gradient."""
    return tensor if group.size == 1 else _Gather.apply(tensor, group)


def scatter(tensor: Tensor, group: Group) -> Tensor:
    """Return this rank's part of the last dim. The backward pass concatenates the gradients of all ranks."""
    return tensor if group.size == 1 else _Scatter.apply(tensor, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_last(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _own_part(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _own_part(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather_last(gradient, ctx.group), None
