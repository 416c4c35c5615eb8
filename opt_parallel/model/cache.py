"""The cache of keys and values of earlier positions, so that a new token costs the work of one position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Cache:
    """For each layer a buffer (2, B, A/t, room, D): keys and values, B sequences, this rank's A/t heads of width D.

    With sufficient `room` nothing is ever copied; a cache that is too short doubles its room. Keys and values with
    gradients are concatenated into new tensors, since autograd does not allow writing into a tensor that it has saved.

    It reads as Hugging Face documents `past_key_values`: L pairs of keys and values, each (B, A/t, positions, D).
    """

    def __init__(self, layers: int, batch: int, heads: int, room: int, head_dim: int, like: Tensor) -> None:
        self.buffers = [like.new_empty(2, batch, heads, room, head_dim) for _ in range(layers)]
        self.length = 0  # positions held; the decoder increases it after the last layer

    @classmethod
    def holding(cls, layers: Sequence[tuple[Tensor, Tensor]]) -> Cache:
        """A cache of each layer's keys and values (B, A/t, positions, D), which are copied."""
        batch, heads, length, head_dim = layers[0][0].shape
        cache = cls(0, batch, heads, length, head_dim, layers[0][0])
        cache.buffers = [torch.stack(pair) for pair in layers]
        cache.length = length
        return cache

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.buffers)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, each (B, A/t, positions, D) with this rank's heads."""
        key, value = self.buffers[layer][:, :, :, : self.length].unbind(0)
        return key, value

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))

    def get_seq_length(self) -> int:
        """The number of positions held."""
        return self.length

    def extend(self, layer: int, new: Tensor) -> Tensor:
        """Append keys and values (2, B, A/t, S, D) to a layer, and return a view of all of them so far."""
        end = self.length + new.size(3)
        if new.requires_grad:
            held = self.buffers[layer][:, :, :, : self.length]
            self.buffers[layer] = torch.cat([held, new], dim=3) if self.length else new
        else:
            if self.buffers[layer].size(3) < end:
                self._make_room(layer, end)
            self.buffers[layer][:, :, :, self.length : end] = new
        return self.buffers[layer][:, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` (B′,), in that order. Beam search copies and drops sequences with it."""
        for layer, buffer in enumerate(self.buffers):
            chosen = buffer.new_empty(2, rows.size(0), *buffer.shape[2:])
            chosen[:, :, :, : self.length] = buffer[:, rows, :, : self.length]
            self.buffers[layer] = chosen

    def _make_room(self, layer: int, needed: int) -> None:
        buffer = self.buffers[layer]
        larger = buffer.new_empty(*buffer.shape[:3], max(2 * buffer.size(3), needed), buffer.size(4))
        larger[:, :, :, : self.length] = buffer[:, :, :, : self.length]
        self.buffers[layer] = larger


def positions_held(cache: Cache | None) -> int:
    """The number of positions in the cache, 0 without one."""
    return 0 if cache is None else cache.length
