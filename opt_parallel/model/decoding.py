"""Decoding: its settings, the choice of the next token, and the model's forwards, one position at a time.

Shapes: B rows of a batch, P positions of the longest prompt, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opt_parallel.config.model import ModelConfig, require
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.random import uniform


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding, checked on construction.

    `temperature` 0 is greedy. Above 0 a token is drawn from the logits divided by the temperature: the `top_k` largest
    are kept (None: all), and of these the fewest whose probabilities sum to `top_p` (Holtzman et al. 2020, section
    3.1). `beams` above 1 is beam search: it returns the finished text with the largest log-probability ÷
    length^`length_penalty`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "beams"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1")
        require(0 <= self.temperature < float("inf"), f"temperature={self.temperature} must be 0 (greedy) or larger")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be a probability, 0 < p ≤ 1")
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        require(abs(self.length_penalty) < float("inf"), f"length_penalty={self.length_penalty} must be finite")
        for name, neutral in (("top_k", None), ("top_p", 1.0)):
            require(
                getattr(self, name) == neutral or self.temperature > 0,
                f"{name}={getattr(self, name)} limits sampling, but temperature=0 does not sample: "
                f"set temperature=1, or leave {name} out",
            )
        require(
            self.beams == 1 or self.temperature == 0,
            f"beams={self.beams} searches and temperature={self.temperature} samples: choose one of them",
        )
        require(
            self.beams > 1 or self.length_penalty == 1.0,
            f"length_penalty={self.length_penalty} compares beams, but beams=1: set beams to 2 or more",
        )


def check_fits(model: ModelConfig, decoding: Decoding, prompt: int) -> None:
    """Raise `UserError` unless `model` has the positions and tokens to continue a prompt of `prompt` tokens."""
    positions, new, vocabulary = model.max_position_embeddings, decoding.max_new_tokens, model.vocab_size
    way_out = f"set max_new_tokens={positions - prompt} or less" if prompt < positions else "shorten the prompt"
    require(
        prompt + new <= positions,
        f"a prompt of {prompt} tokens and max_new_tokens={new} make {prompt + new}, but the model has {positions} "
        f"positions: {way_out}",
    )
    require(
        (decoding.top_k or 1) <= vocabulary,
        f"top_k={decoding.top_k} is more than the model's {vocabulary} tokens: set top_k={vocabulary} or less",
    )
    require(
        decoding.beams == 1 or 2 * decoding.beams <= vocabulary,
        f"beams={decoding.beams} is too many for the model's {vocabulary} tokens: set beams={vocabulary // 2} or less",
    )


def narrowed(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Logits (B, V) for sampling, −∞ for tokens that cannot be drawn. All tokens equal to the k-th largest are kept.

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


def next_tokens(logits: Tensor, decoding: Decoding, rows: range, index: int) -> Tensor:
    """The next tokens (B,) from logits (B, V): the most likely ones, or drawn ones. `rows`: the rows' numbers; `index`:
    the index of the new token in its text.

    A draw inverts the cumulative distribution at a number that is a pure function of (seed, row, index): it needs no
    generator, and gives the same text on any number of devices, alone or in a batch.

    Raises: UserError if a row's logits are not finite.
    """
    largest, likeliest = logits.max(-1)  # on a CPU three times as fast as argmax
    check_finite(largest)
    if decoding.temperature == 0:
        return likeliest
    kept = narrowed(logits, decoding.temperature, decoding.top_k, decoding.top_p)
    cumulative = kept.softmax(-1, dtype=torch.float64).cumsum(-1)  # float32 would lose the share of rare tokens
    draws = [uniform("token", decoding.seed, row, index) for row in rows]
    quantiles = torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    return torch.searchsorted(cumulative, quantiles * cumulative[:, -1:], right=True).squeeze(-1)


def check_finite(largest: Tensor) -> None:
    """Raise `UserError` unless all of the `largest` logits or scores are finite. (A NaN counts as the largest.)"""
    require(
        bool(largest.isfinite().all()),
        "the model's logits are not finite: its weights are broken, or too large for this precision; "
        "use an earlier checkpoint, or float32",
    )


class Continuation:
    """Texts in generation: the model, its cache, and the mask of the prompts' padding."""

    def __init__(self, model: CausalLM, batch: int, mask: Tensor | None, room: int) -> None:
        self.model = model
        self.cache = model.decoder.new_cache(batch, room)
        self.mask: Tensor | None = None  # (B, room); None: no padding, so attention needs no mask
        if mask is not None and not bool(mask.all()):
            require(bool(mask[:, -1].all()), "a prompt ends in padding: pad prompts on the left")
            self.mask = torch.cat([mask.long(), mask.new_ones(batch, room - mask.size(1), dtype=torch.long)], dim=1)

    def logits(self, ids: Tensor) -> Tensor:
        """Feed the next ids (B, S) to the model: float32 logits (B, V) of the token after the last one."""
        segments = None if self.mask is None else self.mask[:, : self.cache.length + ids.size(1)]
        hidden = self.model.decoder(ids, segments=segments, cache=self.cache)
        return self.model.lm_head(hidden[:, -1:])[:, 0].float()

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (B′,) of the batch, in that order."""
        self.cache.select(rows)
        self.mask = None if self.mask is None else self.mask[rows]
