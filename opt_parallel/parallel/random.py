"""Random numbers that do not depend on the layout.

Hidden dropout and LayerDrop are pure functions of their position in the run, and a sampled token is a pure function of
its position in the text. Recomputation, micro-batches, tensor and data parallelism therefore change nothing. Only
attention dropout happens inside a fused kernel, which uses the device's generator: the generator is seeded before each
use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opt_parallel.parallel.compiled import compiled
from opt_parallel.parallel.topology import Group

# The constants of a two-round 32-bit integer hash (Wellons 2018, "Prospecting for hash functions", lowbias32), as
# signed numbers, since the tensors are int32.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)


@dataclass(frozen=True)
class Draw:
    """The position of one training forward in the run, from which its random numbers follow.

    `samples` (B,) int64 are the samples' positions in the run; `step`, `micro` and `data_rank` count from 0.
    """

    seed: int
    step: int
    micro: int
    data_rank: int
    samples: Tensor

    def dropout(self, hidden: Tensor, p: float, layer: int, site: int) -> Tensor:
        """Inverted dropout of `hidden` (B, S, H), a function of (seed, sample, position, channel, layer, site)."""
        if p == 0.0:
            return hidden
        key = torch.full((), number(self.seed, layer, site), dtype=torch.int32, device=hidden.device)
        dropped = _Dropout.apply(hidden, self.samples, p, key)
        assert isinstance(dropped, Tensor)
        return dropped

    def drops_layer(self, p: float, layer: int) -> bool:
        """LayerDrop's decision (Fan et al. 2020), the same in the whole step, since all ranks must agree."""
        return p > 0.0 and uniform("layerdrop", self.seed, self.step, layer) < p

    def seed_attention(self, layer: int, group: Group) -> None:
        """Seed the device's generator for one layer's attention dropout. Tensor ranks get different seeds, since they
        have different heads."""
        key = ("attention", self.seed, self.step, self.micro, self.data_rank, group.rank, layer)
        torch.manual_seed(number(*key, bits=63))


class _Dropout(torch.autograd.Function):
    """The backward recomputes the mask, which is faster than storing it and takes no memory."""

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
    mask = hash_dropped(samples, hidden.size(1), hidden.size(2), p, key)
    return hidden.masked_fill(mask, 0.0) * (1.0 / (1.0 - p))


def hash_dropped(samples: Tensor, length: int, channels: int, p: float, key: Tensor) -> Tensor:
    """Which elements of (B, length, channels) dropout with probability `p` sets to zero: bool, without a generator.

    A counter-based hash in int32 arithmetic: one hash of (sample, position, key), one of (channel, key), and a hash of
    their exclusive or for the element. `samples` (B,) int64; `key` is a 0-d int32 tensor.
    """
    low, high = samples.to(torch.int32), (samples >> 32).to(torch.int32)
    sample = _mix(low + _mix(high + key))
    position = torch.arange(length, dtype=torch.int32, device=samples.device)
    channel = torch.arange(channels, dtype=torch.int32, device=samples.device)
    rows = _mix(sample.unsqueeze(-1) + _mix(position * _GOLDEN))
    hashes = _mix(rows.unsqueeze(-1) ^ _mix(channel * _GOLDEN + key))
    return hashes < int(p * 2**32) - 2**31


def _mix(values: Tensor) -> Tensor:
    """lowbias32 of int32 values. Multiplication wraps; the masks make the shifts logical."""
    mixed = values ^ ((values >> 16) & 0xFFFF)
    mixed *= _FIRST
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed *= _SECOND
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed


def number(*key: object, bits: int = 31) -> int:
    """An integer below 2^bits, a pure function of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> (64 - bits)


def uniform(*key: object) -> float:
    """A number in [0, 1), a pure function of `key`."""
    return number(*key, bits=53) / 2**53
