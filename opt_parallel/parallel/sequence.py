"""Sequence parallelism (Korthikanti et al. 2022, section 4.2.2): a tensor group splits the positions of a sequence.

Between the products of its layers, each of the t ranks computes LayerNorm, dropout and residual sums for 1/t of the
positions, its part. A column-parallel layer gathers the parts before its product, and a row-parallel layer sums its
products and keeps its own part. An all-gather and a reduce-scatter exchange as many bytes as the all-reduce that they
replace, and each rank stores only its part for the backward pass.

In shapes, s = ⌈S/t⌉ is the number of positions of a part. If t does not divide S, the last parts end with padding. The
padding is zero when it is added, and its gradient is zero. It is removed when parts are gathered, so products,
attention and loss never see padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel import collectives
from opt_parallel.parallel.topology import Group


@dataclass(frozen=True)
class Split:
    """The split of sequences of `length` positions over the ranks of `group`."""

    group: Group
    length: int

    @property
    def size(self) -> int:
        """Number of positions of each part, including padding."""
        return -(-self.length // self.group.size)

    @property
    def first(self) -> int:
        """The first position of this rank's part."""
        return self.group.rank * self.size

    def padded(self, whole: Tensor) -> Tensor:
        """`whole` (B, S, …) with zeros as padding (B, t · s, …)."""
        padding = self.group.size * self.size - self.length
        return whole if padding == 0 else F.pad(whole, (0, 0) * (whole.dim() - 2) + (0, padding))

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part (B, s, …) of `whole` (B, S, …)."""
        return self.padded(whole)[:, self.first : self.first + self.size]


def start_gather(part: Tensor, split: Split) -> Callable[[], Tensor]:
    """Start to gather all parts. The returned function waits, and returns the whole (B, S, …), without a gradient."""
    stacked = collectives.start_all_gather(part, split.group)
    return lambda: stacked().transpose(0, 1).flatten(1, 2)[:, : split.length]


def start_reduce_scatter(whole: Tensor, split: Split) -> Callable[[], Tensor]:
    """Start to sum `whole` (B, S, …) over the ranks. The returned function waits, and returns this rank's part
    (B, s, …) of the sum, without a gradient."""
    parts = split.padded(whole).unflatten(1, (split.group.size, split.size))
    return collectives.start_reduce_scatter(parts.transpose(0, 1).contiguous(), split.group)


def gather(part: Tensor, split: Split) -> Tensor:
    """The whole (B, S, …) of the ranks' parts (B, s, …). Each rank uses it for a computation of its own.

    The backward pass sums the ranks' gradients, and keeps this rank's part of the sum."""
    whole = _Gather.apply(part, split)
    assert isinstance(whole, Tensor)
    return whole


def gather_for_all(part: Tensor, split: Split) -> Tensor:
    """The whole (B, S, …) of the ranks' parts (B, s, …). All ranks use it for the same computation.

    The backward pass keeps this rank's part of the gradient, which is equal on all ranks."""
    whole = _GatherForAll.apply(part, split)
    assert isinstance(whole, Tensor)
    return whole


def reduce_scatter(whole: Tensor, split: Split) -> Tensor:
    """This rank's part (B, s, …) of the sum of the ranks' tensors (B, S, …).

    The backward pass gathers the gradients of the parts."""
    part = _ReduceScatter.apply(whole, split)
    assert isinstance(part, Tensor)
    return part


def layer_norm_of_part(part: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Group) -> Tensor:
    """LayerNorm of a part (B, s, H). The backward pass sums the gradients of weight and bias over the ranks."""
    normed = _LayerNormOfPart.apply(part, weight, bias, eps, group)
    assert isinstance(normed, Tensor)
    return normed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return start_gather(part, split)()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(gradient, ctx.split)(), None


class _GatherForAll(_Gather):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.split.part(gradient), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return start_reduce_scatter(whole, split)()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return start_gather(gradient, ctx.split)(), None


class _LayerNormOfPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Group) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(part, weight.shape, weight, bias, eps)
        ctx.save_for_backward(part, mean, rstd, weight, bias)
        ctx.group = group
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        part, mean, rstd, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        by_part, by_weight, by_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), part, weight.shape, mean, rstd, weight, bias, wanted
        )
        if wanted[1]:  # weight and bias are frozen together
            by_weight, by_bias = collectives.start_all_reduce(torch.stack((by_weight, by_bias)), ctx.group)()
        return by_part, by_weight, by_bias, None, None
