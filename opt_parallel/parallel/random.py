"""Chance that does not depend on the layout.

Hidden dropout and LayerDrop are pure functions of where they stand in the run, and a sampled token's draw of where it
stands in its text, so recomputation, micro-batches, tensor and data parallelism change nothing. Attention dropout alone
happens inside a fused kernel, which takes its numbers from the device's generator: there the generator is seeded anew
for each use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opt_parallel.parallel.compiled import compiled
from opt_parallel.parallel.topology import Group

# The odd constants and shifts of a two-round 32-bit integer hash (Wellons 2018, "Prospecting for hash functions",
# lowbias32), written as the signed numbers that int32 tensors want.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)


@dataclass(frozen=True)
class Draw:
    """Where one training forward stands in the run.

    `samples` (B,) int64 are the samples' ordinals in the run; `step`, `micro` and `data_rank` count from 0.
    """

    seed: int
    step: int
    micro: int
    data_rank: int
    samples: Tensor

    def dropout(self, hidden: Tensor, p: float, layer: int, site: int) -> Tensor:
        """Inverted dropout of `hidden` (B, S, H), decided by (seed, sample, position, channel, layer, site)."""
        if p == 0.0:
            return hidden
        key = torch.full((), number(self.seed, layer, site), dtype=torch.int32, device=hidden.device)
        dropped = _Dropout.apply(hidden, self.samples, p, key)
        assert isinstance(dropped, Tensor)
        return dropped

    def drops_layer(self, p: float, layer: int) -> bool:
        """LayerDrop's decision (Fan et al. 2020), one for the whole step: all ranks must agree."""
        return p > 0.0 and uniform("layerdrop", self.seed, self.step, layer) < p

    def seed_attention(self, layer: int, group: Group) -> None:
        """Seed the device's generator for one layer's attention dropout; each tensor rank has heads of its own."""
        place = ("attention", self.seed, self.step, self.micro, self.data_rank, group.rank, layer)
        torch.manual_seed(number(*place, bits=63))


class _Dropout(torch.autograd.Function):
    """The backward decides anew what fell: cheaper than keeping a mask, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, samples: Tensor, p: float, key: Tensor) -> Tensor:
        ctx.save_for_backward(samples, key)
        ctx.p = p
        return _dropped(hidden, samples, p, key)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        samples, key = ctx.saved_tensors
        return _dropped(gradient, samples, ctx.p, key), None, None, None


@compiled
def _dropped(hidden: Tensor, samples: Tensor, p: float, key: Tensor) -> Tensor:
    fallen = hash_dropped(samples, hidden.size(1), hidden.size(2), p, key)
    return hidden.masked_fill(fallen, 0.0) * (1.0 / (1.0 - p))


def hash_dropped(samples: Tensor, length: int, channels: int, p: float, key: Tensor) -> Tensor:
    """Which elements of (B, length, channels) fall to dropout with probability `p`: bool, no generator involved.

    A counter hash in int32 arithmetic: (sample, position, key) give a row's word, the channel another, and one more
    round over their exclusive or gives the element's. `key` is a 0-d int32 tensor.
    """
    low, high = samples.to(torch.int32), (samples >> 32).to(torch.int32)
    sample = _mix(low + _mix(high + key))
    position = torch.arange(length, dtype=torch.int32, device=samples.device)
    channel = torch.arange(channels, dtype=torch.int32, device=samples.device)
    rows = _mix(sample.unsqueeze(-1) + _mix(position * _GOLDEN))
    words = _mix(rows.unsqueeze(-1) ^ _mix(channel * _GOLDEN + key))
    return words < int(p * 2**32) - 2**31


def _mix(words: Tensor) -> Tensor:
    """One lowbias32 over int32; multiplication wraps, shifts are made logical by their masks."""
    mixed = words ^ ((words >> 16) & 0xFFFF)
    mixed *= _FIRST
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed *= _SECOND
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed


def number(*place: object, bits: int = 31) -> int:
    """A whole number below 2^bits, a pure function of `place`."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> (64 - bits)


def uniform(*place: object) -> float:
    """A number of [0, 1), a pure function of `place`."""
    return number(*place, bits=53) / 2**53
