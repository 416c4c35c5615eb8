"""The OPT decoder (Zhang et al. 2022) as Hugging Face documents it, built of tensor-parallel layers.

In shapes, B is the number of sequences, S the number of positions, H the hidden size, A the number of attention heads,
and t the number of ranks in a tensor group. Each rank computes A/t heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.config.model import POSITION_OFFSET, Activation, Init, ModelConfig
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.model.cache import Cache, positions_held
from opt_parallel.parallel.collectives import copy
from opt_parallel.parallel.linear import ColumnParallelLinear, LayerNorm, Linear, RowParallelLinear
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.recompute import HostInputs, product_of_normed, recomputed
from opt_parallel.parallel.sequence import Split
from opt_parallel.parallel.shard import Normal, replicated
from opt_parallel.parallel.topology import Group
from opt_parallel.parallel.vocab import VocabParallelEmbedding

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.relu: F.relu,
    Activation.gelu: F.gelu,
    Activation.silu: F.silu,
    Activation.gelu_new: partial(F.gelu, approximate="tanh"),
}


@dataclass
class Context:
    """Arguments that all layers of one forward pass share.

    `mask` (B, 1, S, K) is true where a query may attend to a key. Without a mask, attention is causal. `draw` is the
    position of a training forward pass in the run, and None in evaluation. With a `split`, the hidden states between
    the products of the layers are this rank's part of the positions (B, s, H). `selective`: the backward recomputes
    LayerNorms, dropout and the feed-forward. `inputs` are the layers' inputs that are in the host's memory.
    """

    mask: Tensor | None = None
    draw: Draw | None = None
    cache: Cache | None = None
    split: Split | None = None
    selective: bool = False
    inputs: HostInputs = field(default_factory=HostInputs)


class Attention(nn.Module):
    """Causal self-attention. One column-parallel layer computes query, key and value; `out_proj` is row-parallel."""

    def __init__(self, config: ModelConfig, layer: int, group: Group) -> None:
        super().__init__()
        self.layer, self.group = layer, group
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        size, bias = config.hidden_size, config.enable_bias
        self.qkv_proj = ColumnParallelLinear(size, size, group, config.std, bias, blocks=3)
        self.out_proj = RowParallelLinear(size, size, group, residual_std(config), bias)
        self.heads = self.qkv_proj.weight.size(1) // self.head_dim  # number of heads on this rank

    def forward(self, hidden: Tensor, context: Context, norm: LayerNorm | None) -> Tensor:
        """(B, S, H) → (B, S, H), or a part (B, s, H) → (B, s, H). `norm` is applied to `hidden` first."""
        split = context.split
        if norm is None:
            projected = self.qkv_proj(hidden, split)
        elif context.selective:
            projected = product_of_normed(norm, self.qkv_proj, hidden, split)
        else:
            projected = self.qkv_proj(norm(hidden, split), split)
        batch, length, _ = projected.shape
        projected = projected.view(batch, length, 3, self.heads, self.head_dim)
        parts = projected.permute(2, 0, 3, 1, 4)  # query, key and value, each (B, A/t, S, D)
        query, keys_and_values = parts[0], parts[1:]
        if context.cache is not None:
            keys_and_values = context.cache.extend(self.layer, keys_and_values)
        key, value = keys_and_values.unbind(0)
        dropout = 0.0
        if context.draw is not None and self.dropout > 0.0:
            dropout = self.dropout
            context.draw.seed_attention(self.layer, self.group, hidden.device)
        mixed = self.attend(query, key, value, context.mask, dropout)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, -1), context.split)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """The attention output of each head (B, A/t, S, D).

        `query` is (B, A/t, S, D), and `key` and `value` are (B, A/t, K, D)."""
        causal = mask is None and query.size(2) > 1
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each with dropout and a residual connection.

    LayerNorm is applied before attention and before the feed-forward. With `do_layer_norm_before=False`, as in
    OPT-350m, LayerNorm is applied after each of the two residual sums.
    """

    def __init__(self, config: ModelConfig, layer: int, group: Group) -> None:
        super().__init__()
        self.layer, self.dropout, self.norm_first = layer, config.dropout, config.do_layer_norm_before
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config, layer, group)
        size, ffn, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        affine = config.layer_norm_elementwise_affine
        self.self_attn_layer_norm = LayerNorm(size, affine)
        self.fc1 = ColumnParallelLinear(size, ffn, group, config.std, bias)
        self.fc2 = RowParallelLinear(ffn, size, group, residual_std(config), bias)
        self.final_layer_norm = LayerNorm(size, affine)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """(B, S, H) → (B, S, H), or a part (B, s, H) → (B, s, H)."""
        norm = self.self_attn_layer_norm if self.norm_first else None
        hidden = hidden + self._dropped(self.self_attn(hidden, context, norm), context.draw, site=0)
        if context.selective:
            hidden = recomputed(self._fed_forward, hidden, context.draw, context.split)
        else:
            hidden = self._fed_forward(hidden, context.draw, context.split)
        return hidden if self.norm_first else self.final_layer_norm(hidden, context.split)

    def _fed_forward(self, hidden: Tensor, draw: Draw | None, split: Split | None) -> Tensor:
        """The layer after attention's residual sum, up to the sum after the feed-forward. Shapes as in `forward`."""
        if not self.norm_first:
            hidden = self.self_attn_layer_norm(hidden, split)
        normed = self.final_layer_norm(hidden, split) if self.norm_first else hidden
        return hidden + self._dropped(self.fc2(self.activation(self.fc1(normed, split)), split), draw, site=1)

    def _dropped(self, hidden: Tensor, draw: Draw | None, site: int) -> Tensor:
        return hidden if draw is None else draw.dropout(hidden, self.dropout, self.layer, site)


class Decoder(nn.Module):
    """The embeddings, the decoder layers and the final LayerNorm, which turn token ids into hidden states."""

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
        sequence: bool = False,
    ) -> None:
        """With `sequence`, training forwards split the positions over the group."""
        super().__init__()
        self.config, self.group, self.recompute, self.sequence = config, group, recompute, sequence
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.embedding_size, config.pad_token_id, group, config.std
        )
        self.embed_positions = PositionEmbedding(config)
        self.project_in = Linear(config.embedding_size, config.hidden_size, config.std) if config.projected else None
        self.project_out = Linear(config.hidden_size, config.embedding_size, config.std) if config.projected else None
        self.layers = nn.ModuleList(Block(config, layer, group) for layer in range(config.num_hidden_layers))
        self.final_layer_norm = None
        if config.has_final_layer_norm:
            self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_elementwise_affine)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The hidden states (B, S, E) of `ids` (B, S), where E is the width of the embedding.

        If `split` returns a split of the positions, the result is this rank's part of the hidden states.

        Args:
            positions: (B, S), −1 for padding. By default, the tokens of each row are counted from 0 without padding.
            segments: (B, K), the number of each key's segment, and 0 for padding. K includes cached keys. A token
                attends only to earlier tokens of its own segment. By default, each row is one sequence without padding.
            draw: the position of this training forward pass in the run, or None for evaluation without dropout.
            cache: the keys and values of earlier positions. This forward pass appends its keys and values.
        """
        split = self.split(ids.size(1), draw)
        return self.decode(self.embed_tokens(ids, split), positions, segments, draw, cache, split)

    def split(self, length: int, draw: Draw | None) -> Split | None:
        """The split of `length` positions over the ranks of the tensor group, or None if this forward pass does not
        use sequence parallelism."""
        return Split(self.group, length) if self.sequence and self.group.size > 1 and draw is not None else None

    def decode(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
        cache: Cache | None = None,
        split: Split | None = None,
    ) -> Tensor:
        """The result of `forward`, for the `embeddings` (B, S, E) of the tokens instead of their ids.

        With a `split`, `embeddings` and result are this rank's part of the positions."""
        past, hidden = positions_held(cache), embeddings
        batch, length = hidden.size(0), hidden.size(1) if split is None else split.length
        if positions is None:
            positions = count_positions(segments, past, batch, length, hidden.device)
        if self.project_in is not None:
            hidden = self.project_in(hidden, split)
        hidden = hidden + self.embed_positions(positions, split)
        mask = attention_mask(segments, past, length, hidden.device)
        if draw is not None and split is not None:
            draw = replace(draw, first=split.first)
        selective = draw is not None and self.recompute is ActivationCheckpointing.selective
        context = Context(mask, draw, cache, split, selective)
        for block in self.layers:
            assert isinstance(block, Block)
            hidden = self.run_block(block, hidden, context)
        if cache is not None:
            cache.length += length
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden, split)
        return hidden if self.project_out is None else self.project_out(hidden, split)

    def new_cache(self, batch: int, room: int) -> Cache:
        """An empty cache of keys and values for `batch` sequences of at most `room` positions."""
        first = self.layers[0]
        assert isinstance(first, Block)
        heads, head_dim = first.self_attn.heads, first.self_attn.head_dim
        return Cache(len(self.layers), batch, heads, room, head_dim, like=self.embed_tokens.weight)

    def drops(self, block: Block, draw: Draw | None) -> bool:
        """Whether LayerDrop skips `block` in this forward pass."""
        return draw is not None and draw.drops_layer(self.config.layerdrop, block.layer)

    def run_block(self, block: Block, hidden: Tensor, context: Context) -> Tensor:
        """The output (B, S, H) of `block` for `hidden` (B, S, H), or `hidden` itself if LayerDrop skips the block."""
        if self.drops(block, context.draw):
            # With ZeRO-3 or CPU offload, a layer that does not run would keep its previous gradient.
            # So the layer runs on one token, and its output is multiplied by zero, which makes the gradient zero.
            return hidden + (0.0 * block(hidden[:1, :1], Context())).sum()
        if context.draw is None:
            return block(hidden, context)
        if self.recompute is ActivationCheckpointing.full:
            return recomputed(block, hidden, context)
        if self.recompute is ActivationCheckpointing.offload:
            return recomputed(block, hidden, context, inputs=context.inputs)
        return block(hidden, context)


class PositionEmbedding(nn.Module):
    """Learned position embeddings. Position p has row p + 2, and padding (position −1) has row 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.weight = replicated((rows, config.hidden_size), Normal(config.std), decay=True)

    def forward(self, positions: Tensor, split: Split | None = None) -> Tensor:
        """(B, S) → (B, S, H), or with a `split` this rank's part of the positions (B, s, H)."""
        if split is None:
            return F.embedding(positions + POSITION_OFFSET, self.weight)
        return F.embedding(split.part(positions) + POSITION_OFFSET, copy(self.weight, split.group))


def residual_std(config: ModelConfig) -> float:
    """The initial standard deviation of the weights of layers whose output is added to the residual stream."""
    return config.std / (2 * config.num_hidden_layers) ** 0.5 if config.init is Init.paper else config.std


def count_positions(segments: Tensor | None, past: int, batch: int, length: int, device: torch.device) -> Tensor:
    """The positions (batch, length) of the tokens after the first `past` tokens.

    A token's position is the number of earlier tokens that are not padding. Padding has position −1."""
    if segments is None:
        return torch.arange(past, past + length, device=device).expand(batch, length)
    real = (segments > 0).long()
    return (real.cumsum(dim=1) * real - 1)[:, past:]


def attention_mask(segments: Tensor | None, past: int, queries: int, device: torch.device) -> Tensor | None:
    """A mask (B or 1, 1, queries, past + queries) that is true where a query may attend to a key.

    None means that the causal mask of the attention kernel suffices. Padding forms its own segment. So a padding query
    attends to padding keys, and its softmax is not empty.
    """
    if segments is None and (past == 0 or queries == 1):
        return None
    keys = past + queries
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=past)
    if segments is None:
        return causal[None, None]
    same = segments[:, past:].unsqueeze(-1) == segments.unsqueeze(-2)
    return (causal & same).unsqueeze(1)
