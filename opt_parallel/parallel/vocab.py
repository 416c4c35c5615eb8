"""The vocabulary split over a tensor group: embedding and tied output projection.

Rank i of t holds rows [i·⌈V/t⌉, (i+1)·⌈V/t⌉) of the (V, D) table. Rows beyond V are padding: zero, and outside the
softmax. No rank has the logits of the full vocabulary unless it asks for them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.config.model import IGNORED
from opt_parallel.parallel.collectives import copy, gather, reduce
from opt_parallel.parallel.loss import vocab_parallel_linear_cross_entropy
from opt_parallel.parallel.shard import Normal, parameter, shard_of
from opt_parallel.parallel.topology import Group


class VocabParallelEmbedding(nn.Module):
    """Ids (B, S) → (B, S, D): each rank looks up the ids whose rows it holds; an all-reduce sums the ranks' results.

    As in torch.nn.Embedding, a look-up gives no gradient to the row of `pad_token_id`.
    """

    def __init__(self, vocab_size: int, size: int, pad_token_id: int, group: Group, std: float) -> None:
        super().__init__()
        self.group = group
        initial = Normal(std, zero_row=pad_token_id)
        self.vocab_size = vocab_size
        self.weight = parameter((vocab_size, size), initial, decay=True, group=group, dim=0)
        self.start, self.stop = _vocabulary_part(self.weight)
        self.pad_token_id = pad_token_id

    def forward(self, ids: Tensor) -> Tensor:
        _require((ids >= 0) & (ids < self.vocab_size), "an id is not in the vocabulary")
        elsewhere = (ids < self.start) | (ids >= self.stop)
        without_gradient = elsewhere | (ids == self.pad_token_id)
        looked_up = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight)
        constant = looked_up.detach().masked_fill(elsewhere.unsqueeze(-1), 0)
        return reduce(torch.where(without_gradient.unsqueeze(-1), constant, looked_up), self.group)


class VocabParallelHead(nn.Module):
    """The output projection, tied to the token embedding.

    Registers the embedding's own parameter a second time, so that ZeRO-3 gathers it around this module too.
    """

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        super().__init__()
        self.group = embedding.group
        self.weight = embedding.weight
        self.vocab_size = shard_of(embedding.weight).shape[0]
        self.start, self.stop = embedding.start, embedding.stop

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """`hidden` (B, S, D) → the sum of the losses over `labels` (B, S) that are not −100; without labels the
        gathered logits (B, S, V)."""
        hidden = copy(hidden, self.group)
        if labels is None:
            return gather(logits(hidden, self.weight), self.group)[..., : self.vocab_size]
        known = (labels >= 0) & (labels < self.vocab_size)
        _require(known | (labels == IGNORED), "a label is not in the vocabulary")
        vocabulary = range(self.start, self.stop)
        return vocab_parallel_linear_cross_entropy(hidden, self.weight, labels, vocabulary, self.group)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (…, D) · weightᵀ (D, V) → (…, V).

    A CPU's BLAS is slow at few rows times very many columns: with 8 to 32 rows of float32, weight · hiddenᵀ takes 0.6
    to 0.8 of the time. With gradients the plain product is used, for its usual backward.
    """
    rows = hidden.numel() // hidden.size(-1)
    transposed = hidden.is_cpu and weight.dtype is torch.float32 and 8 <= rows <= 32 and not torch.is_grad_enabled()
    if not transposed:
        return F.linear(hidden, weight)
    product = torch.mm(weight, hidden.reshape(rows, -1).T)
    return product.T.contiguous().view(*hidden.shape[:-1], -1)


def _require(holds: Tensor, message: str) -> None:
    """Raise RuntimeError unless all of `holds` (bool) are true. On a GPU the check does not synchronise: a later call
    raises the error."""
    torch._assert_async(holds.all(), message)


def _vocabulary_part(weight: nn.Parameter) -> tuple[int, int]:
    rows = shard_of(weight).range[0]
    return rows.start, rows.stop
