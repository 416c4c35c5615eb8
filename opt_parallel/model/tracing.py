"""Features of Hugging Face's OPT that training does not need: hidden states, attention weights, head masks, and its
attention mask, which differs from training's at padding.

They are not part of the training forward: `traced` replaces two methods of a decoder within a `with` block. Shapes as
in `model.opt`; K keys, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.model.opt import Attention, Block, Context, Decoder
from opt_parallel.parallel.collectives import gather, scatter


@dataclass
class Trace:
    """Tensors collected in a forward: hidden states (B, S, H) before each layer, and attention weights (B, A, S, K) of
    each layer that ran, with the heads of all ranks. A field that is None is not collected.

    `mask` (B, 1, S, K), true where a query may attend to a key, replaces that of `Context`."""

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    mask: Tensor | None = None


@contextmanager
def traced(decoder: Decoder, trace: Trace, head_mask: Tensor | None) -> Iterator[None]:
    """Within the context, forwards fill `trace` and scale each head's output by `head_mask` (L, A).

    Without anything to trace, no method is replaced, so `torch.compile` can trace the forward.
    Attention weights are not available from the fused attention, so a layer computes them without it.
    """
    if head_mask is None and trace.hidden_states is None and trace.attentions is None and trace.mask is None:
        yield
        return
    attentions = []
    if trace.attentions is not None or trace.mask is not None or head_mask is not None:
        attentions = [block.self_attn for block in decoder.layers if isinstance(block, Block)]
    for layer, attention in enumerate(attentions):
        factors = None if head_mask is None else head_mask[layer]
        attention.attend = partial(_attend, attention, trace, factors)  # type: ignore[method-assign]
    decoder.run_block = partial(_run_block, decoder, trace)  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(decoder).pop("run_block")  # not `del`, which torch.compile does not trace
        for attention in attentions:
            vars(attention).pop("attend")


def _run_block(decoder: Decoder, trace: Trace, block: Block, hidden: Tensor, context: Context) -> Tensor:
    if trace.hidden_states is not None:
        trace.hidden_states.append(hidden)
    output = Decoder.run_block(decoder, block, hidden, context)
    if trace.attentions is not None and decoder.drops(block, context.draw):
        trace.attentions.pop()  # a dropped layer runs on one token, only for its gradient
    return output


def _attend(
    attention: Attention,
    trace: Trace,
    factors: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """`Attention.attend`, which also collects the attention weights. `factors` (A,) scale the heads."""
    mask = mask if trace.mask is None else trace.mask
    if trace.attentions is None:
        mixed = Attention.attend(attention, query, key, value, mask, dropout)
    else:
        weights = F.dropout(attention_weights(query, key, mask), dropout)
        trace.attentions.append(gather(weights.movedim(1, -1), attention.group).movedim(-1, 1))
        mixed = weights @ value
    if factors is not None:
        mixed = mixed * scatter(factors, attention.group)[:, None, None].to(mixed.dtype)
    return mixed


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights (B, A, S, K): softmax of the scaled products of `query` (B, A, S, D) and `key` (B, A, K, D).

    Computed in float32 or wider (Vaswani et al. 2017, section 3.2.1). `mask` None: causal. A query without keys, which
    is padding, attends to all keys equally, as in transformers' eager attention.
    """
    scores = (query * query.size(-1) ** -0.5) @ key.mT
    if mask is None and query.size(2) > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
