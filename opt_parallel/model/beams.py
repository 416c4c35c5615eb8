"""Beam search: extends several texts per prompt, and returns the best finished one.

The rules are those of transformers with early_stopping=False. Each step considers the 2·N best continuations of a
prompt's N running texts. Those among the first N that end (with the end-of-text token, or at the length limit) are
finished. The N best that do not end keep running. A prompt is done when its best running text, scored at its present
length, is not better than the worst of N finished texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opt_parallel.model.decoding import Continuation, Decoding, check_finite
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

    def advance(self, candidates: list[tuple[float, int, int]], decoding: Decoding, eos_token_id: int) -> list[int]:
        """Advance by one token, given the best continuations (log-probability, running beam, token), best first.

        Returns, for each new running beam, the index of the beam that it continues."""
        length = len(self.running[0].tokens) + 1
        scale = length**decoding.length_penalty
        sources: list[int] = []
        running: list[Beam] = []
        for order, (score, source, token) in enumerate(candidates):
            tokens = [*self.running[source].tokens, token]
            if token == eos_token_id or length == decoding.max_new_tokens:
                if order < decoding.beams and not self.done:
                    self.finished.append(Beam(score / scale, tokens))
            elif len(running) < decoding.beams:
                running.append(Beam(score, tokens))
                sources.append(source)
        self.running = running
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: decoding.beams]
        full = len(self.finished) == decoding.beams
        self.done |= not running or (full and running[0].score / scale <= self.finished[-1].score)
        return sources


def beam_search(texts: Continuation, ids: Tensor, decoding: Decoding, group: Group) -> Tensor:
    """Each prompt of `ids` (B, P) with its best continuation, (B, P + n), padded at the end.

    The first rank of `group` chooses the best continuations; every rank then computes the same from them."""
    config, batch = texts.model.decoder.config, ids.size(0)
    searches = [Search() for _ in range(batch)]
    logits = texts.logits(ids)
    while True:
        scores, beams, tokens = best_continuations(logits, searches, 2 * decoding.beams, group)
        width = len(searches[0].running)  # 1 in the first step, then `decoding.beams`
        rows: list[int] = []
        for row, search in enumerate(searches):
            candidates = list(zip(scores[row], beams[row], tokens[row], strict=True))
            rows += [row * width + source for source in search.advance(candidates, decoding, config.eos_token_id)]
        if all(search.done for search in searches):
            return _with_best(ids, searches, config.pad_token_id)
        texts.select(torch.tensor(rows, device=ids.device))
        last = [[beam.tokens[-1]] for search in searches for beam in search.running]
        logits = texts.logits(torch.tensor(last, device=ids.device))


def best_continuations(
    logits: Tensor, searches: list[Search], count: int, group: Group
) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """The `count` best continuations of each prompt, best first: log-probabilities, running beams and tokens.

    `logits`: (B · beams, V), for the running beams, prompt by prompt."""
    running = torch.tensor([[beam.score for beam in search.running] for search in searches], device=logits.device)
    total = running.unsqueeze(-1) + logits.log_softmax(-1).unflatten(0, running.shape)
    scores, indices = total.flatten(1).topk(count)
    scores, indices = broadcast(scores, group), broadcast(indices, group)
    check_finite(scores)
    vocabulary = logits.size(-1)
    return scores.tolist(), (indices // vocabulary).tolist(), (indices % vocabulary).tolist()


def _with_best(ids: Tensor, searches: list[Search], pad_token_id: int) -> Tensor:
    best = [search.finished[0].tokens for search in searches]
    length = max(map(len, best))
    padded = [tokens + [pad_token_id] * (length - len(tokens)) for tokens in best]
    return torch.cat([ids, torch.tensor(padded, device=ids.device)], dim=1)
