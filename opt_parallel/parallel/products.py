"""The matrix products of the parallel linear layers, with a hand-written backward pass, for two reasons.

The backward pass computes the gradient of the weight while the ranks sum the gradient of the input. And the forward
pass saves the parameter itself. Autograd would save a view of the weight, whose memory ZeRO-3 could not free after the
layer's forward pass, because ZeRO-3 frees only the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear  # torch's own: DeepSpeed replaces the attribute of torch.nn.functional

from opt_parallel.parallel.collectives import start_all_reduce
from opt_parallel.parallel.topology import Group


def column_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """The product of a column-parallel layer: (…, in) → (…, out/t), or (…, blocks · out/t).

    `hidden` is equal on all ranks. `weight` is (out/t, in) or (blocks, out/t, in), and `bias` is (out/t) or (blocks,
    out/t)."""
    product = _ColumnProduct.apply(hidden, weight, bias, group)
    assert isinstance(product, Tensor)
    return product


def row_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """The product of a row-parallel layer, summed over the ranks: (…, in/t) → (…, out).

    `weight` is (out, in/t), and `bias` is (out)."""
    # The inputs are saved before the product is computed. So a recomputation that needs the inputs only (see
    # parallel/recompute.py) ends before the product and its sum.
    saved = _RowInputs.apply(hidden, weight, bias)
    product = _RowOutput.apply(saved, hidden.detach(), weight.detach(), None if bias is None else bias.detach(), group)
    assert isinstance(product, Tensor)
    return product


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group, ctx.bias_shape = group, None if bias is None else bias.shape
        return linear(hidden, weight.flatten(0, -2), None if bias is None else bias.flatten())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        total: Callable[[], Tensor] | None = None  # every rank uses `hidden`, for its own columns
        if ctx.needs_input_grad[0]:
            total = start_all_reduce(_by_input(gradient, weight), ctx.group)
        by_weight = _by_weight(gradient, hidden, weight) if ctx.needs_input_grad[1] else None
        by_bias = gradient.flatten(0, -2).sum(0).view(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        return None if total is None else total(), by_weight, by_bias, None


class _RowInputs(torch.autograd.Function):
    """Saves the inputs of a row-parallel layer, and returns a tensor without memory in place of the layer's output."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.new_empty(()).expand(*hidden.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        by_hidden = _by_input(gradient, weight) if ctx.needs_input_grad[0] else None
        by_weight = _by_weight(gradient, hidden, weight) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class _RowOutput(torch.autograd.Function):
    """Computes the output of a row-parallel layer, and passes its gradient on to `saved`, the result of _RowInputs."""

    @staticmethod
    def forward(ctx: Any, saved: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        if group.size == 1:
            return linear(hidden, weight, bias)  # one kernel computes the product and adds the bias
        total = start_all_reduce(linear(hidden, weight), group)()
        return total if bias is None else total.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gradient, None, None, None, None


def _by_input(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input (…, in) of a product, from the `gradient` of its output (…, out).

    Under autocast, the gradient of the output has another dtype than the weight."""
    return gradient @ weight.flatten(0, -2).to(gradient.dtype)


def _by_weight(gradient: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight of a product, from the `gradient` of its output and from its input `hidden`."""
    product = gradient.flatten(0, -2).T @ hidden.flatten(0, -2).to(gradient.dtype)
    return product.view(weight.shape)
