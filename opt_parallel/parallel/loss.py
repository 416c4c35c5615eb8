"""Output projection and cross entropy in one, over a vocabulary split over a tensor group.

The logits of a large vocabulary are the largest tensor of a training step, and the one that nobody needs whole. Here
they exist a chunk of tokens at a time: as soon as a chunk's softmax is known, so is its part of both gradients, and the
next chunk takes its memory. The gradients are thus formed in the forward and only scaled in the backward, as in Cut
Cross-Entropy (Wijmans et al. 2024) and Liger Kernel (Hsu et al. 2024).
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

# Logits of one chunk. A larger chunk reads and writes the weight's gradient less often, which costs a GPU as much as a
# product where chunks are small; on a CPU the products themselves are slower on more.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# Rows of the weight's gradient that one product adds to: what it returns stays in a CPU's cache.
ROWS = {"cpu": 2048, "cuda": 16384}
HALF_LIFT = 1024.0  # fp16 holds no softmax below 6e-8; lifted, none below 6e-11


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, words: range, group: Group
) -> Tensor:
    """Sum of −log softmax(hidden @ weight.T)[label] over the labels that are not −100, 0-d, fp32 at least.

    With z = hidden @ weight.T and m = max_v z_v:  −log p = log Σ_v exp(z_v − m) − (z_label − m), and its gradient by z
    is softmax(z) − onehot(label). Ranks exchange three numbers a token (maximum, sum, the label's logit), in one
    all-gather a chunk. Softmax and sums run in fp32 at least; gradients stay so until multiplied by the one that comes
    in, except bf16 ones of which there is nothing to add up: bf16 has fp32's range.

    Args:
        hidden: (…, D), the same on all ranks. Its gradient is this rank's summand: `copy` adds them up.
        weight: (rows, D), this rank's rows of the table; those from len(words) on are padding and never count.
        labels: (…), ids of the whole vocabulary, or −100.
        words: the ids whose rows this rank holds, at least one.
    """
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), words, group, training)
    assert isinstance(loss, Tensor)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, words: range, group: Group, training: bool
    ) -> Tensor:
        rows = weight.detach()[: len(words)]
        chunk = _tokens_of_a_chunk(hidden, weight.size(0))
        buffer = hidden.new_empty(chunk, len(words))
        gradients = _Gradients(hidden, weight, len(words), chunk, ctx.needs_input_grad[1]) if training else None
        loss = torch.zeros((), dtype=_at_least_fp32(hidden.dtype), device=hidden.device)
        for start in range(0, hidden.size(0), chunk):
            tokens = slice(start, min(start + chunk, hidden.size(0)))
            logits = torch.mm(hidden[tokens], rows.T, out=buffer[: tokens.stop - start])
            top, total, target = _across_ranks(logits, labels[tokens], words, group)
            counted = labels[tokens] != IGNORED
            loss += (total.log() - (target - top)).masked_fill(~counted, 0.0).sum()
            if gradients is not None:
                _to_gradient(logits, labels[tokens], words, top, total, target, counted)
                gradients.add(logits, hidden[tokens], rows, tokens)
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden, gradients.weight)
            ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        factor = gradient / _lift(ctx.dtype)
        by_hidden = _scaled(by_hidden, factor, ctx.dtype)
        return by_hidden, None if by_weight is None else _scaled(by_weight, factor, ctx.dtype), None, None, None, None


class _Gradients:
    """The gradients of hidden states (N, D) and weight (rows, D), growing chunk by chunk; a frozen weight has none."""

    def __init__(self, hidden: Tensor, weight: Tensor, words: int, chunk: int, of_weight: bool) -> None:
        exact = _at_least_fp32(hidden.dtype)
        self.hidden = torch.empty_like(hidden, dtype=exact if hidden.dtype is torch.float16 else hidden.dtype)
        self.weight: Tensor | None = None
        if not of_weight:
            return
        one_rounding = chunk >= hidden.size(0) and hidden.dtype is not torch.float16
        self.weight = torch.empty_like(weight, dtype=hidden.dtype if one_rounding else exact)
        self.weight[words:] = 0.0

    def add(self, by_logits: Tensor, hidden: Tensor, rows: Tensor, tokens: slice) -> None:
        """Take in a chunk: the gradient of its logits (n, words), its hidden states (n, D), the rows (words, D)."""
        words = by_logits.size(1)
        self.hidden[tokens] = _product(by_logits, rows)
        if self.weight is None:
            return
        step = ROWS[hidden.device.type]
        for first in range(0, words, step):
            block = slice(first, min(first + step, words))
            product = _product(by_logits[:, block].T, hidden)
            if tokens.start == 0:
                self.weight[block] = product
            else:
                _add(self.weight[block], product)


def _across_ranks(logits: Tensor, labels: Tensor, words: range, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token of a chunk, over the whole vocabulary: largest logit, Σ exp(logit − largest), the label's logit."""
    column, elsewhere = _columns(labels, words)
    top, total = _top_and_total(logits)
    target = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(top.dtype).masked_fill(elsewhere, 0.0)
    if group.size == 1:
        return top, total, target
    everyone = all_gather_last(torch.stack((top, total, target)).unsqueeze(-1), group)
    tops, totals, targets = everyone.unbind(0)
    top = tops.amax(-1)
    return top, (totals * (tops - top.unsqueeze(-1)).exp()).sum(-1), targets.sum(-1)


def _to_gradient(
    logits: Tensor, labels: Tensor, words: range, top: Tensor, total: Tensor, target: Tensor, counted: Tensor
) -> None:
    """Turn a chunk's logits into their gradient, softmax − onehot, in place; fp16's is lifted.

    The label's own is 1 too large until it is written once more: rounding softmax first and subtracting after would
    lose what is left of a confident token."""
    column, elsewhere = _columns(labels, words)
    lift = counted * _lift(logits.dtype)
    _softmax_in_place(logits, top, lift / total)
    of_label = (((target - top).exp() / total - 1.0) * lift).to(logits.dtype)
    token = torch.arange(logits.size(0), device=logits.device)
    logits[token, column] = torch.where(elsewhere, logits[token, column], of_label)


def _columns(labels: Tensor, words: range) -> tuple[Tensor, Tensor]:
    """The labels' columns in this rank's logits (n,), and where they are none since another rank has the word (n,)."""
    elsewhere = (labels < words.start) | (labels >= words.stop)
    return (labels - words.start).masked_fill(elsewhere, 0), elsewhere


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
    """The gradient as it leaves. In place where that saves memory: a second backward then finds that its saved tensors
    have changed, and fails."""
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
    """left @ right, in fp32 where the operands' dtype would lose it: a sum over many tokens leaves fp16's range."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype is torch.float16:
        return left.float() @ right.float()
    return left.contiguous() @ right  # a transposed bf16 matrix costs a CPU more than its copy


def _tokens_of_a_chunk(hidden: Tensor, rows: int) -> int:
    """Tokens of a chunk: as few chunks as CHUNK_BYTES allows, all but the last of one size.

    By the rows, padding included: the ranks hold the same number of them, and must agree on the chunks."""
    tokens = hidden.size(0)
    most = max(1, CHUNK_BYTES[hidden.device.type] // (rows * hidden.element_size()))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _lift(dtype: torch.dtype) -> float:
    return HALF_LIFT if dtype is torch.float16 else 1.0
