"""The vocabulary split over a tensor group: embedding, tied output projection, cross entropy.

Rank i of t holds rows [i·⌈V/t⌉, (i+1)·⌈V/t⌉) of the (V, D) table. Rows beyond V are padding: zero, and outside the
softmax. No rank ever sees the logits of the whole vocabulary unless it asks for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.parallel.collectives import all_reduce, copy, gather, reduce
from opt_parallel.parallel.shard import Normal, parameter, shard_of
from opt_parallel.shapes import IGNORED
from opt_parallel.topology import Group


class VocabParallelEmbedding(nn.Module):
    """Ids (B, S) → (B, S, D): each rank looks up the ids it holds, the sum over ranks is the embedding.

    As in torch.nn.Embedding, `pad_token_id`'s row receives no gradient from a look-up.
    """

    def __init__(self, vocab_size: int, size: int, pad_token_id: int, group: Group, std: float) -> None:
        super().__init__()
        self.group = group
        initial = Normal(std, zero_row=pad_token_id)
        self.weight = parameter((vocab_size, size), initial, decay=True, group=group, dim=0)
        self.start, self.stop = _vocabulary_part(self.weight)
        self.pad_token_id = pad_token_id

    def forward(self, ids: Tensor) -> Tensor:
        elsewhere = (ids < self.start) | (ids >= self.stop)
        without_gradient = elsewhere | (ids == self.pad_token_id)
        looked_up = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight)
        constant = looked_up.detach().masked_fill(elsewhere.unsqueeze(-1), 0)
        return reduce(torch.where(without_gradient.unsqueeze(-1), constant, looked_up), self.group)


class VocabParallelHead(nn.Module):
    """The output projection, tied to the token embedding.

    Holds the embedding's own parameter a second time, so that ZeRO-3 gathers it around this module too.
    """

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        super().__init__()
        self.group = embedding.group
        self.weight = embedding.weight
        self.vocab_size = shard_of(embedding.weight).shape[0]
        self.start, self.stop = embedding.start, embedding.stop

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """`hidden` (B, S, D) → the loss's sum over labels (B, S) that are not −100, or without labels the
        logits (B, S, V), gathered."""
        logits = F.linear(copy(hidden, self.group), self.weight)
        if labels is None:
            return gather(logits, self.group)[..., : self.vocab_size]
        return vocab_parallel_cross_entropy(logits, labels, self.start, self.stop, self.group)


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, start: int, stop: int, group: Group) -> Tensor:
    """Sum of −log softmax(logits)[label] over the labels that are not −100.

    With m = max_v z_v:  −log p = m + log Σ_v exp(z_v − m) − z_label; maximum, sum and label's logit are each one
    all-reduce of one number a token. The softmax runs in fp32 at least, and so does the gradient until it is multiplied
    by the one that comes in: a loss scale then reaches fp16 before rounding does.

    Args:
        logits: (…, n), this rank's part; those from column stop − start on belong to padded rows.
        labels: (…), ids of the whole vocabulary, or −100.
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
        weight = gradient * (~ignored).unsqueeze(-1)  # of each token in what comes in
        logits_gradient = softmax * weight
        logits_gradient.scatter_add_(-1, column, -weight * (~elsewhere).unsqueeze(-1))
        return logits_gradient.to(ctx.dtype), None, None, None, None


def _vocabulary_part(weight: nn.Parameter) -> tuple[int, int]:
    rows = shard_of(weight).range[0]
    return rows.start, rows.stop
