"""The language model and the classifier, which are the OPT decoder with an output layer."""

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
from opt_parallel.parallel.sequence import gather_for_all
from opt_parallel.parallel.topology import Group
from opt_parallel.parallel.vocab import VocabParallelHead

SCORE = "score.weight"  # the only tensor of a classifier that a language model does not have


class CausalLM(nn.Module):
    """OPT as a language model. The model is built on the meta device, and `fill` allocates its parameters."""

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
        sequence: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(config, group, recompute, sequence)
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
        """The sum of the losses of `labels` (B, S), or without labels the logits (B, S, V).

        Each label is the next token, or −100 if the position has no loss. `Decoder.forward` describes the other
        arguments.
        """
        hidden = self.decoder(ids, positions, segments, draw, cache)
        return self.lm_head(hidden, labels, self.decoder.split(ids.size(1), draw))


class SequenceClassifier(nn.Module):
    """OPT with a linear layer that computes `num_labels` scores from the hidden state of a sequence's last token."""

    def __init__(
        self,
        config: ModelConfig,
        num_labels: int,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
        problem_type: ProblemType | None = None,
        sequence: bool = False,
    ) -> None:
        """`problem_type` selects the loss that `forward` computes. A model that only computes scores needs no type."""
        super().__init__()
        self.problem_type = problem_type
        self.decoder = Decoder(config, group, recompute, sequence)
        self.score = Linear(config.embedding_size, num_labels, config.std)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """The sum of the losses of the sequences `ids` (B, S), or without `labels` their scores (B, num_labels).

        `example_losses` describes the losses, and `Decoder.forward` the other arguments.
        """
        hidden = self.decoder(ids, positions, segments, draw)
        if split := self.decoder.split(ids.size(1), draw):
            hidden = gather_for_all(hidden, split)
        scores = self.score(last_tokens(hidden, ids, self.decoder.config.pad_token_id))
        if labels is None:
            return scores
        assert self.problem_type is not None
        return example_losses(scores, labels, self.problem_type).sum()


def last_tokens(hidden: Tensor, ids: Tensor | None, pad_token_id: int) -> Tensor:
    """The hidden state of the last token of each row that is not padding: `hidden` (B, S, E) → (B, E).

    As in Hugging Face's OPT, a token of `ids` (B, S) is padding if it is `pad_token_id`. Without ids, the last position
    is used.
    """
    if ids is None:
        return hidden[:, -1]
    positions = torch.arange(ids.size(1), device=ids.device) * (ids != pad_token_id)
    return hidden[torch.arange(ids.size(0), device=ids.device), positions.argmax(dim=1)]


def problem_type_of(num_labels: int, labels: Tensor) -> ProblemType:
    """The problem type that Hugging Face's OPT infers from the number of labels and their dtype."""
    if num_labels == 1:
        return ProblemType.regression
    integers = not labels.dtype.is_floating_point and labels.dtype is not torch.bool
    return ProblemType.single_label_classification if integers else ProblemType.multi_label_classification


def classification_loss(scores: Tensor, labels: Tensor, problem_type: ProblemType) -> Tensor:
    """The mean loss of `scores` (B, N), a scalar, as Hugging Face documents it.

    For regression, the loss is the squared error, and `labels` are (B, N), or (B,) if N is 1. For a single label, the
    loss is the cross entropy of the softmax, and `labels` are (B,). For multiple labels, the loss is the binary cross
    entropy of each score's sigmoid, and `labels` are (B, N) numbers from 0 to 1.
    """
    if problem_type is ProblemType.single_label_classification:
        return F.cross_entropy(scores, labels.flatten())
    labels = labels.to(scores.dtype).view_as(scores)
    if problem_type is ProblemType.regression:
        return F.mse_loss(scores, labels)
    return F.binary_cross_entropy_with_logits(scores, labels)


def example_losses(scores: Tensor, labels: Tensor, problem_type: ProblemType) -> Tensor:
    """The loss of each example (B,), which is zero if the label is −100 or NaN.

    `labels` are (B,) integers, or (B, N) numbers. The losses are computed in fp32 or float64, because fp16 would lose
    small gradients before they are multiplied by the loss scale.
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
