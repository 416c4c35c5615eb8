"""Beam search: extends several texts per prompt, and returns the best finished one.

The rules are those of transformers. Each step considers the 2·N best continuations of a prompt's N running texts, or
(1 + E)·N with E tokens that end a text. Those among the first N that end (with such a token, or at the length limit)
are finished. The N best that do not end keep running. When a prompt is done is `early_stopping`, see `Decoding`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opt_parallel.model.decoding import Continuation, Decoding, ruled
from opt_parallel.parallel.collectives import broadcast
from opt_parallel.parallel.topology import Group


@dataclass
class Beam:
    """A text: its new tokens, and their summed log-probability (running) or final score (finished)."""

    score: float
    tokens: list[int]


@dataclass
class Search:
    """One prompt's beams, best first."""

    running: list[Beam] = field(default_factory=lambda: [Beam(0.0, [])])
    finished: list[Beam] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: list[tuple[float, int, int]], decoding: Decoding) -> list[int]:
        """Advance by one token, given the best continuations (log-probability, running beam, token), best first.

        Returns, for each new running beam, the index of the beam that it continues."""
        length = len(self.running[0].tokens) + 1
        scale = length**decoding.length_penalty
        sources: list[int] = []
        running: list[Beam] = []
        for order, (score, source, token) in enumerate(candidates):
            tokens = [*self.running[source].tokens, token]
            if token in decoding.ends or length == decoding.max_new_tokens:
                if order < decoding.beams and not self.done:
                    self.finished.append(Beam(score / scale, tokens))
            elif len(running) < decoding.beams:
                running.append(Beam(score, tokens))
                sources.append(source)
        self.running = running
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: decoding.beams]
        full = len(self.finished) == decoding.beams
        self.done |= not running or (full and self._cannot_improve(scale, decoding))
        return sources

    def _cannot_improve(self, scale: float, decoding: Decoding) -> bool:
        """Whether no running text can become one of the finished; `scale`: a score's divisor at the present length."""
        if decoding.early_stopping is True:
            return True
        if decoding.early_stopping == "never" and decoding.length_penalty > 0:
            scale = decoding.max_new_tokens**decoding.length_penalty
        return self.running[0].score / scale <= self.finished[-1].score


def beam_search(texts: Continuation, ids: Tensor, decoding: Decoding, group: Group) -> Tensor:
    """Each prompt of `ids` (B, P) with its best continuations, (B · texts, P + n), padded at the end.

    The first rank of `group` chooses the best continuations; every rank then computes the same from them."""
    batch = ids.size(0)
    searches = [Search() for _ in range(batch)]
    logits = texts.logits(ids)
    while True:
        running = _running(ids, searches)
        index = running.size(1) - ids.size(1)
        logprobs = ruled(logits.log_softmax(-1), decoding, [running], index, texts.padding)
        scores, beams, tokens = best_continuations(logprobs, searches, decoding, group)
        width = len(searches[0].running)  # 1 in the first step, then `decoding.beams`
        rows: list[int] = []
        for row, search in enumerate(searches):
            candidates = list(zip(scores[row], beams[row], tokens[row], strict=True))
            rows += [row * width + source for source in search.advance(candidates, decoding)]
        if all(search.done for search in searches):
            return _with_best(ids, searches, decoding)
        texts.select(torch.tensor(rows, device=ids.device))
        last = [[beam.tokens[-1]] for search in searches for beam in search.running]
        logits = texts.logits(torch.tensor(last, device=ids.device))


def best_continuations(
    logprobs: Tensor, searches: list[Search], decoding: Decoding, group: Group
) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """The best continuations of each prompt, best first: log-probabilities, running beams and tokens.

    `logprobs`: (B · beams, V), for the running beams, prompt by prompt."""
    running = torch.tensor([[beam.score for beam in search.running] for search in searches], device=logprobs.device)
    total = running.unsqueeze(-1) + logprobs.unflatten(0, running.shape)
    scores, indices = total.flatten(1).topk((1 + max(1, len(decoding.ends))) * decoding.beams)
    scores, indices = broadcast(scores, group), broadcast(indices, group)
    vocabulary = logprobs.size(-1)
    return scores.tolist(), (indices // vocabulary).tolist(), (indices % vocabulary).tolist()


def _running(ids: Tensor, searches: list[Search]) -> Tensor:
    """The running texts (B · beams, P + n), with their prompts."""
    prompts = ids.repeat_interleave(len(searches[0].running), dim=0)
    tokens = [beam.tokens for search in searches for beam in search.running]
    return torch.cat([prompts, torch.tensor(tokens, dtype=ids.dtype, device=ids.device)], dim=1)


def _with_best(ids: Tensor, searches: list[Search], decoding: Decoding) -> Tensor:
    best = [beam.tokens for search in searches for beam in search.finished[: decoding.texts]]
    length = max(map(len, best))
    filler = decoding.pad or decoding.ends[0]  # transformers fills up with an end if the padding token is 0
    padded = [tokens + [filler] * (length - len(tokens)) for tokens in best]
    return torch.cat([ids.repeat_interleave(decoding.texts, dim=0), torch.tensor(padded, device=ids.device)], dim=1)
