"""Decoding: its settings, the choice of the next token, and the model's forwards, one position at a time.

Shapes: B rows of a batch, P positions of the longest prompt, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from opt_parallel.config.model import ModelConfig, require
from opt_parallel.model.opt import Decoder
from opt_parallel.model.rules import narrowed, penalized, without_ends, without_repeats
from opt_parallel.parallel.random import uniform
from opt_parallel.parallel.vocab import VocabParallelHead


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding, checked on construction.

    `temperature` 0 is greedy. Above 0 a token is drawn from the logits divided by the temperature: the `top_k` largest
    are kept (None: all), and of these the fewest whose probabilities sum to `top_p` (Holtzman et al. 2020, section
    3.1). `beams` above 1 is beam search: it returns the finished text with the largest log-probability ÷
    length^`length_penalty`. Its `early_stopping`, as in transformers: False: stop when no running text is better than
    the finished ones at its present length; True: stop when there are `beams` finished texts; "never": stop when no
    running text could become better.

    `texts`: texts per prompt. `repetition_penalty`, `no_repeat_ngram`, `min_new_tokens`: see `model.rules`. `ends`: the
    tokens that end a text, `pad`: the token that follows; `of` takes them from the model.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0
    texts: int = 1
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    early_stopping: bool | str = False
    ends: tuple[int, ...] = ()
    pad: int | None = None

    def of(self, model: ModelConfig) -> Decoding:
        """These settings with the model's tokens where they name none."""
        pad = model.pad_token_id if self.pad is None else self.pad
        return replace(self, ends=self.ends or (model.eos_token_id,), pad=pad)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "beams", "texts"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1")
        for name in ("min_new_tokens", "no_repeat_ngram"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(
            0 < self.repetition_penalty < float("inf"),
            f"repetition_penalty={self.repetition_penalty} must be larger than 0 (1: no penalty)",
        )
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}",
        )
        require(
            self.early_stopping in (False, True, "never"),
            f"early_stopping={self.early_stopping!r} must be False, True or 'never'",
        )
        self._check_search()
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

    def _check_search(self) -> None:
        require(
            self.texts == 1 or self.temperature > 0 or self.texts <= self.beams,
            f"texts={self.texts}: greedy decoding gives one text per prompt, and a search no more than its beams="
            f"{self.beams}: sample, or set beams={self.texts}",
        )
        require(
            self.beams > 1 or self.early_stopping is False,
            f"early_stopping={self.early_stopping!r} ends a search, but beams=1: set beams to 2 or more",
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
    wide = 1 + max(1, len(decoding.ends))  # candidates for each beam
    require(
        decoding.beams == 1 or wide * decoding.beams <= vocabulary,
        f"beams={decoding.beams} is too many for the model's {vocabulary} tokens: set beams={vocabulary // wide} or "
        "less",
    )
    for name, tokens in (("eos_token_id", decoding.ends), ("pad_token_id", (decoding.pad or 0,))):
        require(
            all(0 <= token < vocabulary for token in tokens),
            f"{name}={tokens[0] if len(tokens) == 1 else list(tokens)} is not in the vocabulary of {vocabulary} tokens",
        )


def ruled(scores: Tensor, decoding: Decoding, texts: Sequence[Tensor], index: int, padding: Tensor | None) -> Tensor:
    """Next-token scores (R, V) after the rules of `decoding` that hold for greedy decoding, sampling and beam search.

    Args:
        texts: the tokens so far, which concatenated along dim 1 are (R, T).
        index: the index of the new token in its text.
        padding: (R,), the number of a row's first tokens that are padding."""
    if decoding.repetition_penalty != 1.0 or decoding.no_repeat_ngram > 0:
        joined = torch.cat(list(texts), dim=1)
        if decoding.repetition_penalty != 1.0:
            scores = penalized(scores, joined, decoding.repetition_penalty, padding)
        if decoding.no_repeat_ngram > 0:
            scores = without_repeats(scores, joined, decoding.no_repeat_ngram)
    return without_ends(scores, decoding.ends) if index < decoding.min_new_tokens else scores


def next_tokens(logits: Tensor, decoding: Decoding, rows: range, index: int) -> Tensor:
    """The next tokens (B,) from logits (B, V): the most likely ones, or drawn ones. `rows`: the rows' numbers; `index`:
    the index of the new token in its text.

    A draw inverts the cumulative distribution at a number that is a pure function of (seed, row, index): it needs no
    generator, and gives the same text on any number of devices, alone or in a batch.

    """
    likeliest = logits.max(-1).indices  # on a CPU three times as fast as argmax
    if decoding.temperature == 0:
        return likeliest
    kept = narrowed(logits, decoding.temperature, decoding.top_k, decoding.top_p)
    cumulative = kept.softmax(-1, dtype=torch.float64).cumsum(-1)  # float32 would lose the share of rare tokens
    draws = [uniform("token", decoding.seed, row, index) for row in rows]
    quantiles = torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    return torch.searchsorted(cumulative, quantiles * cumulative[:, -1:], right=True).squeeze(-1)


def check_finite(largest: Tensor) -> None:
    """Raise `UserError` unless all of the `largest` logits are finite. (A NaN counts as the largest.)"""
    require(
        bool(largest.isfinite().all()),
        "the model's logits are not finite: its weights are broken, or too large for this precision; "
        "use an earlier checkpoint, or float32",
    )


class LanguageModel(Protocol):
    """What generation asks of a model: its decoder and its output projection."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def lm_head(self) -> VocabParallelHead: ...


class Continuation:
    """Texts in generation: the model, its cache, and the mask of the prompts' padding."""

    def __init__(self, model: LanguageModel, batch: int, mask: Tensor | None, room: int) -> None:
        self.model = model
        self.cache = model.decoder.new_cache(batch, room)
        self.padding = None if mask is None else (mask != 0).int().argmax(dim=1)  # (B,), of each row's first tokens
        self.mask: Tensor | None = None  # (B, room); None: no padding, so attention needs no mask
        if mask is not None and not bool(mask.all()):
            require(bool(mask[:, -1].all()), "a prompt ends in padding: pad prompts on the left")
            self.mask = torch.cat([mask.long(), mask.new_ones(batch, room - mask.size(1), dtype=torch.long)], dim=1)

    def logits(self, ids: Tensor) -> Tensor:
        """Feed the next ids (B, S) to the model: float32 logits (B, V) of the token after the last one.

        Raises: UserError if a row's logits are not finite."""
        segments = None if self.mask is None else self.mask[:, : self.cache.length + ids.size(1)]
        hidden = self.model.decoder(ids, segments=segments, cache=self.cache)
        logits = self.model.lm_head(hidden[:, -1:])[:, 0].float()
        check_finite(logits.amax(-1))
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (B′,) of the batch, in that order."""
        self.cache.select(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.padding = None if self.padding is None else self.padding[rows]
