"""Generates text at any tensor degree: greedily, by sampling, or by beam search.

The first rank of a group chooses the tokens and broadcasts them, so that all ranks run the same number of forwards, as
collectives and ZeRO-3 require.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opt_parallel.model.beams import beam_search
from opt_parallel.model.decoding import Continuation, Decoding, LanguageModel, check_fits, next_tokens, ruled
from opt_parallel.parallel.collectives import broadcast
from opt_parallel.parallel.topology import Group


@torch.no_grad()
def generate(
    model: LanguageModel,
    ids: Tensor,
    mask: Tensor | None = None,
    decoding: Decoding | None = None,
    group: Group | None = None,
    first_row: int = 0,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Tensor:
    """Prompts `ids` (B, P) with generated text, (B · texts, P + n), n ≤ `max_new_tokens`; a prompt's texts follow each
    other.

    A row ends with the end-of-text token, and padding follows; the batch ends when its last row does.

    Args:
        mask: (B, P), 0 for padding, which shorter prompts have on the left; None: no padding.
        group: the ranks that generate together, by default the model's tensor group; with ZeRO-3 all ranks.
        first_row: number of the first row. Draws depend on a row's number, so they do not depend on the batches.
        on_tokens: called with the tokens (B,) of each position as they are chosen; not available with beam search.

    Raises: UserError if the model has too few positions or tokens, or its logits are not finite.
    """
    decoding, group = (decoding or Decoding()).of(model.decoder.config), group or model.lm_head.group
    check_fits(model.decoder.config, decoding, ids.size(1))
    if decoding.beams == 1 and decoding.texts > 1:
        ids = ids.repeat_interleave(decoding.texts, dim=0)
        mask = None if mask is None else mask.repeat_interleave(decoding.texts, dim=0)
        first_row *= decoding.texts
    batch = ids.size(0)
    texts = Continuation(model, batch, mask, room=ids.size(1) + decoding.max_new_tokens)
    if decoding.beams > 1:
        assert on_tokens is None
        return beam_search(texts, ids, decoding, group)
    rows, ended = range(first_row, first_row + batch), torch.zeros(batch, dtype=torch.bool, device=ids.device)
    ends = torch.tensor(decoding.ends, device=ids.device)
    output = [ids]
    for index in range(decoding.max_new_tokens):
        logits = ruled(texts.logits(output[-1]), decoding, output, index, texts.padding)
        tokens = next_tokens(logits, decoding, rows, index)
        tokens = broadcast(tokens.masked_fill(ended, decoding.pad or 0), group)
        output.append(tokens.unsqueeze(1))
        if on_tokens is not None:
            on_tokens(tokens.tolist())
        ended |= torch.isin(tokens, ends)
        if bool(ended.all()):
            break
    return torch.cat(output, dim=1)


def left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as one batch: ids and mask (B, P), shorter prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
