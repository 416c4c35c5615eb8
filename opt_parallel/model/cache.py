"""The cache of keys and values of earlier positions, so that a new token costs the work of one position."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """For each layer a buffer (2, B, A/t, room, D): keys and values, B sequences, this rank's A/t heads of width D.

    With sufficient `room` nothing is ever copied; a cache that is too short doubles its room. Keys and values with
    gradients are concatenated into new tensors, since autograd does not allow writing into a tensor that it has saved.
    """

    def __init__(self, layers: int, batch: int, heads: int, room: int, head_dim: int, like: Tensor) -> None:
        self.buffers = [like.new_empty(2, batch, heads, room, head_dim) for _ in range(layers)]
        self.length = 0  # positions held; the decoder increases it after the last layer

    def extend(self, layer: int, new: Tensor) -> Tensor:
        """Append keys and values (2, B, A/t, S, D) to a layer, and return a view of all of them so far."""
        end = self.length + new.size(3)
        if new.requires_grad:
            self.buffers[layer] = torch.cat([self.buffers[layer][:, :, :, : self.length], new], dim=3)
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
