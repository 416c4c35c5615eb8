"""Text from a trained model."""

from __future__ import annotations

import torch
from torch import Tensor

from opt_parallel.model.heads import CausalLM


@torch.no_grad()
def greedy(model: CausalLM, prompt: Tensor, max_new_tokens: int, eos_token_id: int) -> Tensor:
    """The likeliest next token, again and again: `prompt` (1, P) → (1, P + n), n ≤ `max_new_tokens`.

    Ends after `eos_token_id`, or where the position table ends. Every tensor rank gathers the same logits and so takes
    the same token."""
    length = min(prompt.size(1) + max_new_tokens, model.decoder.config.max_position_embeddings)
    cache = model.decoder.new_cache(prompt.size(0), length)
    ids, ahead = prompt, prompt
    while ids.size(1) < length:
        ahead = model(ahead, cache=cache)[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, ahead], dim=1)
        if int(ahead) == eos_token_id:
            break
    return ids
