"""Output projection and cross entropy as one function, for a vocabulary that is split over a tensor group.

The logits of a large vocabulary are the largest tensor of a training step. This function computes the logits for one
chunk of tokens at a time. Each chunk's contribution is added to the gradients of the hidden states and of the weight,
and the memory of the logits is reused for the next chunk. So the forward pass computes the gradients, and the backward
pass only scales them, as in Cut Cross-Entropy (Wijmans et al. 2024) and Liger Kernel (Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opt_parallel.config.model import IGNORED
from opt_parallel.parallel.collectives import all_gather_last
from opt_parallel.parallel.compiled import compiled
from opt_parallel.parallel.topology import Group

# Maximum bytes of a chunk's logits. Each chunk reads and writes the weight's gradient once, so a GPU is slow with many
# small chunks. On a CPU, the matrix products are slower for large chunks.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# Number of rows of the weight's gradient that one matrix product computes. The rows fit a CPU's cache.
ROWS = {"cpu": 2048, "cuda": 16384}
HALF_SCALE = 1024.0  # fp16 rounds probabilities below 6e-8 to zero. With this scale, the limit is 6e-11.


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: range, group: Group
) -> Tensor:
    """Sum of −log softmax(hidden @ weight.T)[label] over the labels that are not −100, a scalar in fp32 or float64.

    With z = hidden @ weight.T and m = max_v z_v, the loss is −log p = log Σ_v exp(z_v − m) − (z_label − m). The
    gradient of the loss with respect to z is softmax(z) − onehot(label). Ranks exchange three numbers per token (the
    maximum, the sum and the label's logit), in one all-gather per chunk. Softmax, sums and gradients are computed in
    fp32 or float64. Gradients are rounded when the backward pass scales them. Only bf16 gradients that are not
    accumulated are rounded earlier, because bf16 has the same range as fp32.

    Args:
        hidden: (…, D), equal on all ranks. Each rank computes a summand of its gradient, and `copy` adds the summands.
        weight: (rows, D), this rank's rows of the embedding. Rows from len(vocabulary) on are padding and are ignored.
        labels: (…), ids of the full vocabulary, or −100.
        vocabulary: the ids whose rows this rank holds, at least one.
    """
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), vocabulary, group, training)
    assert isinstance(loss, Tensor)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: range, group: Group, training: bool
    ) -> Tensor:
        rows = weight.detach()[: len(vocabulary)]
        chunk = _tokens_of_a_chunk(hidden, weight.size(0))
        buffer = hidden.new_empty(chunk, len(vocabulary))
        gradients = _Gradients(hidden, weight, len(vocabulary), chunk, ctx.needs_input_grad[1]) if training else None
        loss = torch.zeros((), dtype=_at_least_fp32(hidden.dtype), device=hidden.device)
        for start in range(0, hidden.size(0), chunk):
            tokens = slice(start, min(start + chunk, hidden.size(0)))
            logits = torch.mm(hidden[tokens], rows.T, out=buffer[: tokens.stop - start])
            top, total, target = _across_ranks(logits, labels[tokens], vocabulary, group)
            counted = labels[tokens] != IGNORED
            loss += (total.log() - (target - top)).masked_fill(~counted, 0.0).sum()
            if gradients is not None:
                _to_gradient(logits, labels[tokens], vocabulary, top, total, target, counted)
                gradients.add(logits, hidden[tokens], rows, tokens)
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden, gradients.weight)
            ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        factor = gradient / _gradient_scale(ctx.dtype)
        by_hidden = _scaled(by_hidden, factor, ctx.dtype)
        return by_hidden, None if by_weight is None else _scaled(by_weight, factor, ctx.dtype), None, None, None, None


class _Gradients:
    """The gradients of the hidden states (N, D) and of the weight (rows, D), accumulated chunk by chunk.

    The gradient of a frozen weight (`trained` is false) is None."""

    def __init__(self, hidden: Tensor, weight: Tensor, vocabulary: int, chunk: int, trained: bool) -> None:
        exact = _at_least_fp32(hidden.dtype)
        self.hidden = torch.empty_like(hidden, dtype=exact if hidden.dtype is torch.float16 else hidden.dtype)
        self.weight: Tensor | None = None
        if not trained:
            return
        one_rounding = chunk >= hidden.size(0) and hidden.dtype is not torch.float16
        self.weight = torch.empty_like(weight, dtype=hidden.dtype if one_rounding else exact)
        self.weight[vocabulary:].zero_()

    def add(self, by_logits: Tensor, hidden: Tensor, rows: Tensor, tokens: slice) -> None:
        """Add the contribution of a chunk of n tokens, given the gradient `by_logits` (n, V) of the chunk's logits.

        `hidden` (n, D) are the chunk's hidden states, and `rows` (V, D) are this rank's rows of the weight."""
        vocabulary = by_logits.size(1)
        self.hidden[tokens] = _product(by_logits, rows)
        if self.weight is None:
            return
        step = ROWS[hidden.device.type]
        for first in range(0, vocabulary, step):
            block = slice(first, min(first + step, vocabulary))
            product = _product(by_logits[:, block].T, hidden)
            if tokens.start == 0:
                self.weight[block] = product
            else:
                _add(self.weight[block], product)


def _across_ranks(logits: Tensor, labels: Tensor, vocabulary: range, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's largest logit, its sum of exp(logit − largest), and its label's logit, over the full vocabulary."""
    column, elsewhere = _columns(labels, vocabulary)
    top, total = _top_and_total(logits)
    target = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(top.dtype).masked_fill(elsewhere, 0.0)
    if group.size == 1:
        return top, total, target
    everyone = all_gather_last(torch.stack((top, total, target)).unsqueeze(-1), group)
    tops, totals, targets = everyone.unbind(0)
    top = tops.amax(-1)
    return top, (totals * (tops - top.unsqueeze(-1)).exp()).sum(-1), targets.sum(-1)


def _to_gradient(
    logits: Tensor, labels: Tensor, vocabulary: range, top: Tensor, total: Tensor, target: Tensor, counted: Tensor
) -> None:
    """Replace a chunk's logits by their gradient, softmax − onehot. In fp16, the gradient is multiplied by HALF_SCALE.

    The label's entry p − 1 is computed before rounding: if p were close to 1 and rounded first, p − 1 would be 0."""
    column, elsewhere = _columns(labels, vocabulary)
    scale = counted * _gradient_scale(logits.dtype)
    _softmax_in_place(logits, top, scale / total)
    label_gradient = (((target - top).exp() / total - 1.0) * scale).to(logits.dtype)
    token = torch.arange(logits.size(0), device=logits.device)
    logits[token, column] = torch.where(elsewhere, logits[token, column], label_gradient)


def _columns(labels: Tensor, vocabulary: range) -> tuple[Tensor, Tensor]:
    """The columns (n,) of the labels in this rank's logits, and a mask (n,) that is true for labels on other ranks."""
    elsewhere = (labels < vocabulary.start) | (labels >= vocabulary.stop)
    return (labels - vocabulary.start).masked_fill(elsewhere, 0), elsewhere


@compiled
def _top_and_total(logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.to(_at_least_fp32(logits.dtype))
    top = scores.amax(-1)
    return top, (scores - top.unsqueeze(-1)).exp().sum(-1)


@compiled
def _softmax_in_place(logits: Tensor, top: Tensor, factor: Tensor) -> None:
    scores = logits.to(_at_least_fp32(logits.dtype))
    logits.copy_((scores - top.unsqueeze(-1)).exp() * factor.unsqueeze(-1))


@compiled
def _add(total: Tensor, part: Tensor) -> None:
    total += part


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times `factor`, in `dtype`.

    If the gradient has this dtype already, it is scaled in place to save memory. Autograd then refuses a second
    backward pass, because a saved tensor has changed."""
    if gradient.dtype is not dtype:
        return _scaled_and_rounded(gradient, factor, dtype)
    _scale(gradient, factor)
    return gradient


@compiled
def _scaled_and_rounded(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * factor).to(dtype)


@compiled
def _scale(gradient: Tensor, factor: Tensor) -> None:
    gradient *= factor


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. On GPUs and for fp16 the product is in fp32, because a sum over many tokens can overflow fp16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype is torch.float16:
        return left.float() @ right.float()
    return left.contiguous() @ right  # a CPU multiplies a contiguous bf16 matrix faster than a transposed view


def _tokens_of_a_chunk(hidden: Tensor, rows: int) -> int:
    """Number of tokens per chunk, for as few chunks of equal size as CHUNK_BYTES allows.

    `rows` includes padding, so that all ranks compute the same number. The last chunk may be smaller."""
    tokens = hidden.size(0)
    most = max(1, CHUNK_BYTES[hidden.device.type] // (rows * hidden.element_size()))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gradient_scale(dtype: torch.dtype) -> float:
    return HALF_SCALE if dtype is torch.float16 else 1.0
