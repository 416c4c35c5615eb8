"""Rules of decoding: pure functions of next-token scores (R, V) of R texts and of their tokens so far (R, T).

Names, order and effect are those of transformers' logits processors. Scores are logits, or log-probabilities in beam
search.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalized(scores: Tensor, texts: Tensor, penalty: float, padding: Tensor | None) -> Tensor:
    """Make tokens of the text less likely (Keskar et al. 2019, CTRL, section 4.1): a positive score is divided by
    `penalty`, a negative one multiplied. `padding` (R,): the number of a row's first tokens that are padding."""
    seen = torch.zeros(scores.size(0), scores.size(1) + 1, dtype=torch.bool, device=scores.device)
    if padding is not None:
        columns = torch.arange(texts.size(1), device=texts.device)
        texts = texts.masked_fill(columns < padding.unsqueeze(1), scores.size(1))  # an index beyond the vocabulary
    seen = seen.scatter(1, texts, True)[:, :-1]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def without_repeats(scores: Tensor, texts: Tensor, size: int) -> Tensor:
    """Forbid tokens that would complete a group of `size` tokens that the text already has."""
    if texts.size(1) + 1 < size:
        return scores
    groups = texts.unfold(1, size, 1) if texts.size(1) >= size else texts.new_empty(texts.size(0), 0, size)
    last = texts[:, texts.size(1) + 1 - size :]  # the last size − 1 tokens
    repeated = (groups[:, :, :-1] == last.unsqueeze(1)).all(dim=2)  # (R, groups)
    forbidden = torch.zeros(scores.size(0), scores.size(1) + 1, dtype=torch.bool, device=scores.device)
    tokens = groups[:, :, -1].masked_fill(~repeated, scores.size(1))
    return scores.masked_fill(forbidden.scatter(1, tokens, True)[:, :-1], -torch.inf)


def without_ends(scores: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Forbid the tokens that end a text."""
    forbidden = torch.zeros(scores.size(-1), dtype=torch.bool, device=scores.device)
    forbidden[list(ends)] = True
    return scores.masked_fill(forbidden, -torch.inf)


def narrowed(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Logits (R, V) for sampling, −∞ for tokens that cannot be drawn. All tokens equal to the k-th largest are kept.

    First shifted to a maximum of 0: this changes no probability, and division by a small temperature cannot overflow.
    """
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        descending, tokens = logits.sort(descending=True)
        probabilities = descending.softmax(-1)
        enough = probabilities.cumsum(-1) - probabilities >= top_p  # the larger probabilities already sum to top_p
        logits = logits.masked_fill(enough.scatter(-1, tokens, enough), -torch.inf)
    return logits
