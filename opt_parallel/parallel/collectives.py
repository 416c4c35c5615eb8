"""Four collectives with gradients, named by what they do in the forward pass, and four without.

All but `all_reduce_in_place` return a new tensor: torch.compile would lose the gradient of a tensor that is written
into. A group of size 1 does not communicate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from opt_parallel.parallel.topology import Group


def all_reduce(tensor: Tensor, group: Group, operation: str = "sum") -> Tensor:
    """Sum (or "max") of `tensor` over the group. No gradient."""
    if group.size == 1:
        return tensor
    assert group.handle is not None
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), operation, group.handle))


def all_reduce_in_place(tensor: Tensor, group: Group) -> None:
    """Replace `tensor` by its sum over the group; for tensors too large to allocate twice."""
    if group.size > 1:
        dist.all_reduce(tensor, group=group.handle)


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """The first rank's `tensor`, on every rank of the group. The other ranks' `tensor` gives shape and dtype. No
    gradient."""
    if group.size == 1:
        return tensor
    assert group.handle is not None
    return functional.wait_tensor(functional.broadcast(tensor, 0, group.handle))  # 0: the rank within the group


def all_gather_last(tensor: Tensor, group: Group) -> Tensor:
    """The ranks' tensors (…, n), concatenated along the last dim: (…, n · size). No gradient."""
    if group.size == 1:
        return tensor
    assert group.handle is not None
    stacked = functional.wait_tensor(functional.all_gather_tensor(tensor.contiguous().unsqueeze(0), 0, group.handle))
    return torch.cat(stacked.unbind(0), dim=-1)


def _own_part(tensor: Tensor, group: Group) -> Tensor:
    return tensor.chunk(group.size, dim=-1)[group.rank].contiguous()


def copy(tensor: Tensor, group: Group) -> Tensor:
    """Forward: identity. Backward: all-reduce, since every rank's use of the copy contributes to the gradient."""
    return tensor if group.size == 1 else _Copy.apply(tensor, group)


def reduce(tensor: Tensor, group: Group) -> Tensor:
    """Forward: all-reduce. Backward: identity, since each rank's tensor enters the sum once."""
    return tensor if group.size == 1 else _Reduce.apply(tensor, group)


def gather(tensor: Tensor, group: Group) -> Tensor:
    """Forward: all-gather along the last dim. Backward: the rank's own part of the gradient."""
    return tensor if group.size == 1 else _Gather.apply(tensor, group)


def scatter(tensor: Tensor, group: Group) -> Tensor:
    """Forward: the rank's own part of the last dim. Backward: all-gather."""
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
