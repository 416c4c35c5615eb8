"""The token embedding and the tied output projection, whose vocabulary is split over a tensor group.

Rank i of t holds the rows [i·⌈V/t⌉, (i+1)·⌈V/t⌉) of the (V, D) embedding. Rows beyond V are padding, which is zero and
which the softmax ignores. In training, no rank has the logits of the full vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.config.model import IGNORED
from opt_parallel.parallel import sequence
from opt_parallel.parallel.collectives import copy, gather, reduce
from opt_parallel.parallel.loss import vocab_parallel_linear_cross_entropy
from opt_parallel.parallel.sequence import Split, reduce_scatter
from opt_parallel.parallel.shard import Normal, parameter, shard_of
from opt_parallel.parallel.topology import Group


class VocabParallelEmbedding(nn.Module):
    """The token embedding: ids (B, S) → vectors (B, S, D).

    Each rank looks up the ids whose rows it holds, and an all-reduce sums the ranks' results. With a `split`, a
    reduce-scatter gives each rank the vectors (B, s, D) of its part of the positions. As in torch.nn.Embedding,
    the row of `pad_token_id` gets no gradient from a look-up.
    """

    def __init__(self, vocab_size: int, size: int, pad_token_id: int, group: Group, std: float) -> None:
        super().__init__()
        self.group = group
        initial = Normal(std, zero_row=pad_token_id)
        self.vocab_size = vocab_size
        self.weight = parameter((vocab_size, size), initial, decay=True, group=group, dim=0)
        self.start, self.stop = _vocabulary_part(self.weight)
        self.pad_token_id = pad_token_id

    @property
    def num_embeddings(self) -> int:
        """The number of rows on all ranks, as torch calls it."""
        return self.vocab_size

    @property
    def embedding_dim(self) -> int:
        """The width, as torch calls it."""
        return self.weight.size(1)

    def forward(self, ids: Tensor, split: Split | None = None) -> Tensor:
        _require((ids >= 0) & (ids < self.vocab_size), "an id is not in the vocabulary")
        elsewhere = (ids < self.start) | (ids >= self.stop)
        without_gradient = elsewhere | (ids == self.pad_token_id)
        looked_up = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight)
        constant = looked_up.detach().masked_fill(elsewhere.unsqueeze(-1), 0)
        own = torch.where(without_gradient.unsqueeze(-1), constant, looked_up)
        return reduce(own, self.group) if split is None else reduce_scatter(own, split)


class VocabParallelHead(nn.Module):
    """The output projection, tied to the token embedding.

    This module registers the embedding's parameter a second time, so that ZeRO-3 also gathers it around this module.
    """

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        super().__init__()
        self.group = embedding.group
        self.weight = embedding.weight
        self.vocab_size = shard_of(embedding.weight).shape[0]
        self.start, self.stop = embedding.start, embedding.stop

    def forward(self, hidden: Tensor, labels: Tensor | None = None, split: Split | None = None) -> Tensor:
        """The sum of the losses of the `labels` (B, S) that are not −100, or without labels the logits (B, S, V).

        `hidden` are the hidden states (B, S, D), or with a `split` this rank's part of them (B, s, D)."""
        hidden = copy(hidden, self.group) if split is None else sequence.gather(hidden, split)
        if labels is None:
            return gather(logits(hidden, self.weight), self.group)[..., : self.vocab_size]
        known = (labels >= 0) & (labels < self.vocab_size)
        _require(known | (labels == IGNORED), "a label is not in the vocabulary")
        vocabulary = range(self.start, self.stop)
        return vocab_parallel_linear_cross_entropy(hidden, self.weight, labels, vocabulary, self.group)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits hidden (…, D) · weightᵀ (D, V) → (…, V).

    A CPU's BLAS is slow for few rows of hidden states and a large vocabulary. For 8 to 32 rows in float32, the product
    weight · hiddenᵀ takes 0.6 to 0.8 of the time. The product weight · hiddenᵀ is used only without gradients.
    """
    rows = hidden.numel() // hidden.size(-1)
    transposed = hidden.is_cpu and weight.dtype is torch.float32 and 8 <= rows <= 32 and not torch.is_grad_enabled()
    if not transposed:
        return F.linear(hidden, weight)
    product = torch.mm(weight, hidden.reshape(rows, -1).T)
    return product.T.contiguous().view(*hidden.shape[:-1], -1)


def _require(holds: Tensor, message: str) -> None:
    """Raise RuntimeError unless all elements of the bool tensor `holds` are true.

    On a GPU the check does not synchronise, and a later call of CUDA raises the error."""
    torch._assert_async(holds.all(), message)


def _vocabulary_part(weight: nn.Parameter) -> tuple[int, int]:
    rows = shard_of(weight).range[0]
    return rows.start, rows.stop
