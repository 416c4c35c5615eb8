"""Takes keys and values in the forms that Hugging Face documents: a tuple of L pairs, or transformers' cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opt_parallel.config.model import ModelConfig
from opt_parallel.model.cache import Cache
from opt_parallel.parallel.topology import Group


def cache_of(past: Any, model: ModelConfig, batch: int, group: Group) -> Cache:
    """`past` as a cache of this rank's heads. Ours is returned as it is, and extended by the forward. Of a tuple of L
    pairs (B, heads, positions, D), or transformers' DynamicCache, a copy is made; with the heads of all ranks, of their
    own part.

    Raises: ValueError if it is none of these, or of another model or batch size."""
    if isinstance(past, Cache):
        cache = past
    else:
        cache = Cache.holding([_pair(layer, model, group) for layer in _layers(past, model)])
    if len(cache) != model.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(cache)} layers, and the model {model.num_hidden_layers}")
    held, heads, head_dim = cache.buffers[0].shape[1], cache.buffers[0].shape[2], cache.buffers[0].shape[4]
    if (heads * group.size, head_dim) != (model.num_attention_heads, model.head_dim):
        raise ValueError(
            f"past_key_values has {heads} heads of width {head_dim}, not {model.num_attention_heads // group.size} of "
            f"width {model.head_dim}"
        )
    if held != batch:
        raise ValueError(f"past_key_values holds {held} sequences, and the input has {batch}")
    return cache


def _layers(past: Any, model: ModelConfig) -> list[Any]:
    """Keys and values of each layer. transformers' cache has `layers` with attributes `keys` and `values`."""
    if hasattr(past, "layers"):
        layers = [(layer.keys, layer.values) for layer in past.layers if layer.get_seq_length() > 0]
    elif isinstance(past, tuple | list):
        layers = list(past)
    else:
        raise ValueError(
            f"past_key_values is a {type(past).__name__}: give that of an earlier output, or a tuple of "
            f"{model.num_hidden_layers} pairs of keys and values"
        )
    if len(layers) != model.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(layers)} layers, and the model {model.num_hidden_layers}")
    return layers


def _pair(layer: Any, model: ModelConfig, group: Group) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, tuple | list) or len(layer) < 2 or any(each.dim() != 4 for each in layer[:2]):
        raise ValueError("past_key_values: each layer is a pair of keys and values (B, heads, positions, D)")
    key, value = layer[:2]
    if key.shape != value.shape:
        raise ValueError(f"past_key_values has keys {tuple(key.shape)} and values {tuple(value.shape)}: equal shapes")
    if key.size(1) == model.num_attention_heads and group.size > 1:
        key, value = (each.chunk(group.size, dim=1)[group.rank] for each in (key, value))
    return key, value
