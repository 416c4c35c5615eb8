"""Models with a head on the decoder: a language model's tied output projection, or a classifier's score."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.config.model import IGNORED, ModelConfig, ProblemType
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.model.cache import Cache
from opt_parallel.model.opt import Decoder
from opt_parallel.parallel.linear import Linear
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.topology import Group
from opt_parallel.parallel.vocab import VocabParallelHead

SCORE = "score.weight"  # the only tensor that a classifier has and a language model has not


class CausalLM(nn.Module):
    """OPT as a language model. Build it on the meta device; `fill` allocates and fills it."""

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(config, group, recompute)
        self.lm_head = VocabParallelHead(self.decoder.embed_tokens)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """With `labels` (B, S), each the next token or −100: the sum of the losses. Without: logits (B, S, V).

        The other arguments are the decoder's.
        """
        hidden = self.decoder(ids, positions, segments, draw, cache)
        return self.lm_head(hidden, labels)


class SequenceClassifier(nn.Module):
    """OPT with `num_labels` scores at the last token of a sequence. Built and filled like `CausalLM`."""

    def __init__(
        self,
        config: ModelConfig,
        num_labels: int,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
        problem_type: ProblemType | None = None,
    ) -> None:
        """`problem_type`: decides the loss that `forward` computes; not needed for scores."""
        super().__init__()
        self.problem_type = problem_type
        self.decoder = Decoder(config, group, recompute)
        self.score = Linear(config.embedding_size, num_labels, config.std)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """With `labels`: the sum of the losses (see `example_losses`) of the sequences `ids` (B, S). Without: their
        scores (B, num_labels).

        The other arguments are the decoder's.
        """
        hidden = self.decoder(ids, positions, segments, draw)
        scores = self.score(last_tokens(hidden, ids, self.decoder.config.pad_token_id))
        if labels is None:
            return scores
        assert self.problem_type is not None
        return example_losses(scores, labels, self.problem_type).sum()


def last_tokens(hidden: Tensor, ids: Tensor | None, pad_token_id: int) -> Tensor:
    """The hidden states (B, E), from `hidden` (B, S, E), of each row's right-most token that is not padding.

    As in Hugging Face's OPT, only `ids` (B, S) decide what is padding; without ids the last position is used.
    """
    if ids is None:
        return hidden[:, -1]
    positions = torch.arange(ids.size(1), device=ids.device) * (ids != pad_token_id)
    return hidden[torch.arange(ids.size(0), device=ids.device), positions.argmax(dim=1)]


def problem_type_of(num_labels: int, labels: Tensor) -> ProblemType:
    """The problem type that Hugging Face infers from the number and dtype of the labels."""
    if num_labels == 1:
        return ProblemType.regression
    integers = not labels.dtype.is_floating_point and labels.dtype is not torch.bool
    return ProblemType.single_label_classification if integers else ProblemType.multi_label_classification


def classification_loss(scores: Tensor, labels: Tensor, problem_type: ProblemType) -> Tensor:
    """Mean loss of `scores` (B, N), 0-d, as Hugging Face documents it.

    Regression: squared error to `labels` (B, N), or (B,) if N is 1. Single label: cross entropy of the softmax,
    `labels` (B,). Multi label: binary cross entropy of each score's sigmoid, `labels` (B, N) from 0 to 1.
    """
    if problem_type is ProblemType.single_label_classification:
        return F.cross_entropy(scores, labels.flatten())
    labels = labels.to(scores.dtype).view_as(scores)
    if problem_type is ProblemType.regression:
        return F.mse_loss(scores, labels)
    return F.binary_cross_entropy_with_logits(scores, labels)


def example_losses(scores: Tensor, labels: Tensor, problem_type: ProblemType) -> Tensor:
    """Each example's loss (B,), whose mean is `classification_loss`; zero for labels that are −100 or NaN.

    Labels are (B,) integers, or (B, N) numbers. Computed in fp32 or wider: fp16 would lose small gradients before the
    loss scale multiplies them.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if problem_type is ProblemType.single_label_classification:
        return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
    counts = ~labels.isnan().any(dim=1)
    targets = labels.to(scores.dtype).nan_to_num()
    if problem_type is ProblemType.regression:
        losses = F.mse_loss(scores, targets, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return losses.mean(dim=1) * counts
