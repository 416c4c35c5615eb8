"""Keys and values of the positions already seen, so that a new token costs one position's work."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """For each layer two buffers (B, A/t, room, D): B sequences, this rank's A/t heads of width D.

    Made with the room that it will need, nothing is ever moved; a cache that turns out too short doubles its room.
    Keys and values that carry gradients are joined into new tensors: writing into a buffer would spoil what autograd
    keeps of it.
    """

    def __init__(self, layers: int, batch: int, heads: int, room: int, head_dim: int, like: Tensor) -> None:
        self.keys = [like.new_empty(batch, heads, room, head_dim) for _ in range(layers)]
        self.values = [like.new_empty(batch, heads, room, head_dim) for _ in range(layers)]
        self.length = 0  # positions held; the decoder moves it on after the last layer

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, A/t, S, D) to a layer and return all of it so far, as views."""
        end = self.length + keys.size(2)
        held = []
        for buffers, new in ((self.keys, keys), (self.values, values)):
            if new.requires_grad:
                buffers[layer] = torch.cat([buffers[layer][:, :, : self.length], new], dim=2)
            else:
                if buffers[layer].size(2) < end:
                    buffers[layer] = self._with_more_room(buffers[layer], end)
                buffers[layer][:, :, self.length : end] = new
            held.append(buffers[layer][:, :, :end])
        return held[0], held[1]

    def select(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` (B′,), in that order; beam search copies and drops sequences so."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                chosen = buffer.new_empty(rows.size(0), *buffer.shape[1:])
                chosen[:, :, : self.length] = buffer[rows, :, : self.length]
                buffers[layer] = chosen

    def _with_more_room(self, buffer: Tensor, needed: int) -> Tensor:
        batch, heads, room, head_dim = buffer.shape
        larger = buffer.new_empty(batch, heads, max(2 * room, needed), head_dim)
        larger[:, :, : self.length] = buffer[:, :, : self.length]
        return larger


def positions_held(cache: Cache | None) -> int:
    """How many positions come before the next one."""
    return 0 if cache is None else cache.length
