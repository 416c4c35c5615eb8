"""A simple vocabulary-parallel loss, which computes all logits at once, for comparison with the loss in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.config.model import IGNORED
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.topology import Group


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, words: range, group: Group) -> Tensor:
    """The loss of `vocab_parallel_linear_cross_entropy`, computed by `F.linear` and `vocab_parallel_cross_entropy`."""
    return vocab_parallel_cross_entropy(F.linear(hidden, weight), labels, words.start, words.stop, group)


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, start: int, stop: int, group: Group) -> Tensor:
    """Sum of −log softmax(logits)[label] over the labels that are not −100.

    With m = max_v z_v, the loss is −log p = m + log Σ_v exp(z_v − m) − z_label. Three all-reduces of one number per
    token compute the maximum, the sum and the label's logit. The softmax and the gradient are in fp32 or float64. The
    gradient is rounded after it is multiplied by the incoming gradient, so the loss scale is applied before rounding to
    fp16.

    Args:
        logits: (…, n), this rank's part; columns from stop − start on belong to padded rows.
        labels: (…), ids of the full vocabulary, or −100.
        start, stop: the ids that this rank holds.
    """
    return _CrossEntropy.apply(logits, labels, start, stop, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, stop: int, group: Group) -> Tensor:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        scores[..., stop - start :] = float("-inf")
        scores -= all_reduce(scores.amax(dim=-1), group, "max").unsqueeze(-1)
        elsewhere = (labels < start) | (labels >= stop)
        column = (labels - start).masked_fill(elsewhere, 0).unsqueeze(-1)
        target = scores.gather(-1, column).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = scores.exp_()
        total = all_reduce(exponentials.sum(dim=-1), group)
        losses = total.log() - all_reduce(target, group)
        ignored = labels == IGNORED
        softmax = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(softmax, column, elsewhere, ignored)
        ctx.dtype = logits.dtype
        return losses.masked_fill(ignored, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, column, elsewhere, ignored = ctx.saved_tensors
        weight = gradient * (~ignored).unsqueeze(-1)  # the incoming gradient, and 0 for ignored tokens
        logits_gradient = softmax * weight
        logits_gradient.scatter_add_(-1, column, -weight * (~elsewhere).unsqueeze(-1))
        return logits_gradient.to(ctx.dtype), None, None, None, None
