"""The matrix products of the parallel linear layers, with a hand-written backward pass, for two reasons.

The backward pass computes the gradient of the weight while the ranks sum the gradient of the input. And the forward
pass saves the parameter itself. Autograd would save a view of the weight, whose memory ZeRO-3 could not free after the
layer's forward pass, because ZeRO-3 frees only the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear  # torch's own: DeepSpeed replaces the attribute of torch.nn.functional

from opt_parallel.parallel.collectives import start_all_reduce
from opt_parallel.parallel.sequence import Split, start_gather, start_reduce_scatter
from opt_parallel.parallel.topology import Group


def column_product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, split: Split | None = None
) -> Tensor:
    """The product of a column-parallel layer: (…, in) → (…, out/t), or (…, blocks · out/t).

    `hidden` is equal on all ranks, or with a `split` (B, s, in) is this rank's part of the positions. `weight` is
    (out/t, in) or (blocks, out/t, in), and `bias` is (out/t) or (blocks, out/t)."""
    product = _ColumnProduct.apply(hidden, weight, bias, group, split)
    assert isinstance(product, Tensor)
    return product


def row_product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, split: Split | None = None
) -> Tensor:
    """The product of a row-parallel layer, summed over the ranks: (…, in/t) → (…, out).

    With a `split`, the result (B, s, out) is this rank's part of the positions. `weight` is (out, in/t), and `bias` is
    (out)."""
    # The inputs are saved before the product is computed. So a recomputation that needs the inputs only (see
    # parallel/recompute.py) ends before the product and its sum.
    saved = _RowInputs.apply(hidden, weight, bias)
    own_bias = None if bias is None else bias.detach()
    product = _RowOutput.apply(saved, hidden.detach(), weight.detach(), own_bias, group, split)
    assert isinstance(product, Tensor)
    return product


def part_product(part: Tensor, weight: Tensor, group: Group) -> Tensor:
    """The product (B, s, in) → (B, s, out) of this rank's part of the positions with the rows of `weight` (…, in), of
    which every rank holds a full copy. The backward pass sums the weight's gradient over the ranks."""
    product = _PartProduct.apply(part, weight, group)
    assert isinstance(product, Tensor)
    return product


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, split: Split | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group, ctx.split, ctx.bias_shape = group, split, None if bias is None else bias.shape
        whole = hidden if split is None else start_gather(hidden, split)()
        return linear(whole, weight.flatten(0, -2), None if bias is None else bias.flatten())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        split: Split | None = ctx.split
        by_weight = by_bias = gathered = total = None
        if split is not None and ctx.needs_input_grad[1]:
            gathered = start_gather(hidden, split)
        if ctx.needs_input_grad[0]:  # every rank uses the input, for its own columns
            own = _by_input(gradient, weight)
            total = start_all_reduce(own, ctx.group) if split is None else start_reduce_scatter(own, split)
        if ctx.needs_input_grad[1]:
            by_weight = _by_weight(gradient, hidden if gathered is None else gathered(), weight)
        if ctx.needs_input_grad[2]:
            by_bias = _by_bias(gradient).view(ctx.bias_shape)
        return None if total is None else total(), by_weight, by_bias, None, None


class _RowInputs(torch.autograd.Function):
    """Saves the inputs of a row-parallel layer, and returns a tensor without memory in place of the product."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.new_empty(()).expand(*hidden.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        by_hidden = _by_input(gradient, weight) if ctx.needs_input_grad[0] else None
        by_weight = _by_weight(gradient, hidden, weight) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, _by_bias(gradient) if ctx.needs_input_grad[2] else None


class _RowOutput(torch.autograd.Function):
    """Computes the output of a row-parallel layer, and passes its gradient on to `saved`, the result of _RowInputs.

    With a `split`, the gradient of all positions is gathered, so every rank computes the bias's complete gradient."""

    @staticmethod
    def forward(
        ctx: Any, saved: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, split: Split | None
    ) -> Tensor:
        ctx.split = split
        if group.size == 1:
            return linear(hidden, weight, bias)  # one kernel computes the product and adds the bias
        own = linear(hidden, weight)
        total = (start_all_reduce(own, group) if split is None else start_reduce_scatter(own, split))()
        return total if bias is None else total.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return gradient if ctx.split is None else start_gather(gradient, ctx.split)(), None, None, None, None, None


class _PartProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(part, weight)
        ctx.group = group
        return linear(part, weight.flatten(0, -2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        part, weight = ctx.saved_tensors
        total = None
        if ctx.needs_input_grad[1]:
            total = start_all_reduce(_by_weight(gradient, part, weight), ctx.group)
        by_part = _by_input(gradient, weight) if ctx.needs_input_grad[0] else None
        return by_part, None if total is None else total(), None


def _by_input(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input (…, in) of a product, from the `gradient` of its output (…, out).

    Under autocast, the gradient of the output has another dtype than the weight."""
    return gradient @ weight.flatten(0, -2).to(gradient.dtype)


def _by_weight(gradient: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight of a product, from the `gradient` of its output and from its input `hidden`."""
    product = gradient.flatten(0, -2).T @ hidden.flatten(0, -2).to(gradient.dtype)
    return product.view(weight.shape)


def _by_bias(gradient: Tensor) -> Tensor:
    return gradient.flatten(0, -2).sum(0)
