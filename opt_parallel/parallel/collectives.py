"""Four collectives with a gradient, named after their forward pass, and four collectives without a gradient.

All except `all_reduce_in_place` return a new tensor, because torch.compile would lose the gradient of a tensor that is
overwritten. A group of size 1 does not communicate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from opt_parallel.parallel.topology import Group


def all_reduce(tensor: Tensor, group: Group, operation: str = "sum") -> Tensor:
    """The sum (or the maximum, if `operation` is "max") of `tensor` over the group, without a gradient."""
    if group.size == 1:
        return tensor
    assert group.handle is not None
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), operation, group.handle))


def all_reduce_in_place(tensor: Tensor, group: Group) -> None:
    """Replace `tensor` by its sum over the group, without allocating a second tensor of its size."""
    if group.size > 1:
        dist.all_reduce(tensor, group=group.handle)


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """The first rank's `tensor`, on every rank of the group, without a gradient.

    On the other ranks, only the shape and dtype of `tensor` are used."""
    if group.size == 1:
        return tensor
    assert group.handle is not None
    return functional.wait_tensor(functional.broadcast(tensor, 0, group.handle))  # 0: the rank within the group


def all_gather_last(tensor: Tensor, group: Group) -> Tensor:
    """The ranks' tensors (…, n), concatenated along the last dim to (…, n · size), without a gradient."""
    if group.size == 1:
        return tensor
    assert group.handle is not None
    stacked = functional.wait_tensor(functional.all_gather_tensor(tensor.contiguous().unsqueeze(0), 0, group.handle))
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
