"""Output projection and cross entropy as one function, over a vocabulary split over a tensor group.

The logits of a large vocabulary are the largest tensor of a training step. Here only one chunk of tokens has logits at
a time. The softmax of a chunk gives its part of both gradients; then the next chunk reuses the memory. So the forward
computes the gradients, and the backward only scales them, as in Cut Cross-Entropy (Wijmans et al. 2024) and Liger
Kernel (Hsu et al. 2024).
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

# Bytes of a chunk's logits. Larger chunks read and write the weight's gradient less often; on a GPU with small chunks
# that takes as long as a matrix product. On a CPU the products themselves are slower on larger chunks.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# Rows of the weight's gradient that one product computes: few enough for a CPU's cache.
ROWS = {"cpu": 2048, "cuda": 16384}
HALF_SCALE = 1024.0  # fp16 cannot represent a softmax below 6e-8; scaled, it reaches 6e-11


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: range, group: Group
) -> Tensor:
    """Sum of −log softmax(hidden @ weight.T)[label] over the labels that are not −100, 0-d, fp32 at least.

    With z = hidden @ weight.T and m = max_v z_v:  −log p = log Σ_v exp(z_v − m) − (z_label − m), and its gradient by z
    is softmax(z) − onehot(label). Ranks exchange three numbers per token (maximum, sum, the label's logit), in one
    all-gather per chunk. Softmax and sums are computed in fp32 or wider. Gradients stay in that dtype until the
    backward scales them; only bf16 gradients that are not accumulated are rounded earlier, since bf16 has fp32's range.

    Args:
        hidden: (…, D), equal on all ranks. Its gradient is this rank's summand: `copy` sums over the ranks.
        weight: (rows, D), this rank's rows of the embedding; rows from len(vocabulary) on are padding and do not count.
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
    """The gradients of hidden states (N, D) and weight (rows, D), accumulated chunk by chunk; None if the weight is
    frozen (`trained` is false)."""

    def __init__(self, hidden: Tensor, weight: Tensor, vocabulary: int, chunk: int, trained: bool) -> None:
        exact = _at_least_fp32(hidden.dtype)
        self.hidden = torch.empty_like(hidden, dtype=exact if hidden.dtype is torch.float16 else hidden.dtype)
        self.weight: Tensor | None = None
        if not trained:
            return
        one_rounding = chunk >= hidden.size(0) and hidden.dtype is not torch.float16
        self.weight = torch.empty_like(weight, dtype=hidden.dtype if one_rounding else exact)
        self.weight[vocabulary:] = 0.0

    def add(self, by_logits: Tensor, hidden: Tensor, rows: Tensor, tokens: slice) -> None:
        """Add a chunk: the gradient of its logits (n, V), its hidden states (n, D), this rank's rows (V, D)."""
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
    """For each token of a chunk, over the full vocabulary: largest logit, Σ exp(logit − largest), the label's logit."""
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
    """Replace a chunk's logits by their gradient, softmax − onehot; in fp16 it is multiplied by HALF_SCALE.

    The label's entry, p − 1, is computed separately: rounding p first would lose 1 − p of a confident token."""
    column, elsewhere = _columns(labels, vocabulary)
    scale = counted * _gradient_scale(logits.dtype)
    _softmax_in_place(logits, top, scale / total)
    label_gradient = (((target - top).exp() / total - 1.0) * scale).to(logits.dtype)
    token = torch.arange(logits.size(0), device=logits.device)
    logits[token, column] = torch.where(elsewhere, logits[token, column], label_gradient)


def _columns(labels: Tensor, vocabulary: range) -> tuple[Tensor, Tensor]:
    """The labels' columns in this rank's logits (n,), and a mask (n,) of the labels that other ranks hold."""
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
    """The gradient times `factor`, in `dtype`. In place if the dtype stays, which saves memory; autograd then refuses a
    second backward, since a saved tensor has changed."""
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
    """left @ right, in fp32 on GPUs and for fp16: a sum over many tokens exceeds fp16's range."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype is torch.float16:
        return left.float() @ right.float()
    return left.contiguous() @ right  # faster on a CPU than the product of a transposed bf16 matrix


def _tokens_of_a_chunk(hidden: Tensor, rows: int) -> int:
    """Tokens per chunk: as few chunks as CHUNK_BYTES allows, all but the last of equal size.

    `rows` includes padding, so that all ranks compute the same number."""
    tokens = hidden.size(0)
    most = max(1, CHUNK_BYTES[hidden.device.type] // (rows * hidden.element_size()))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gradient_scale(dtype: torch.dtype) -> float:
    return HALF_SCALE if dtype is torch.float16 else 1.0
