"""Random numbers that do not depend on how the run is split over processes and micro-batches.

The masks of hidden dropout are pure functions of the seed, the sample's position in the run and the element's position
in the tensor. So recomputation, micro-batches, tensor and data parallelism do not change the masks. LayerDrop's
decisions and sampled tokens are pure functions too. Only attention dropout uses the device's random generator, because
attention is a fused kernel. The generator is seeded before each call of this kernel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opt_parallel.parallel.compiled import compiled
from opt_parallel.parallel.topology import Group

# The constants of a two-round 32-bit integer hash (Wellons 2018, "Prospecting for hash functions", lowbias32), as
# signed numbers, since the tensors are int32.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
GOLDEN = 0x9E3779B9 - (1 << 32)


@dataclass(frozen=True)
class Draw:
    """The position of one training forward pass in the run, which determines the random numbers of the pass.

    `samples` (B,) int64 are the samples' positions in the run. `step`, `micro` (the index of the micro-batch) and
    `data_rank` count from 0. `first` is the position of the first token in its sample. It is not 0 if sequence
    parallelism splits the sample.
    """

    seed: int
    step: int
    micro: int
    data_rank: int
    samples: Tensor
    first: int = 0

    def dropout(self, hidden: Tensor, p: float, layer: int, site: int) -> Tensor:
        """Inverted dropout of `hidden` (B, S, H), a pure function of (seed, sample, position, channel, layer, site)."""
        if p == 0.0:
            return hidden
        key = torch.full((), number(self.seed, layer, site), dtype=torch.int32, device=hidden.device)
        dropped = _Dropout.apply(hidden, self.samples, p, key, self.first)
        assert isinstance(dropped, Tensor)
        return dropped

    def drops_layer(self, p: float, layer: int) -> bool:
        """Whether LayerDrop (Fan et al. 2020) skips `layer`. All ranks skip the same layers in a step."""
        return p > 0.0 and uniform("layerdrop", self.seed, self.step, layer) < p

    def seed_attention(self, layer: int, group: Group, device: torch.device) -> None:
        """Seed the generator of `device` for one layer's attention dropout.

        The ranks of a tensor group get different seeds, because they compute different heads. `torch.manual_seed` would
        seed the generators of all kinds of devices, which takes hundreds of times longer."""
        key = ("attention", self.seed, self.step, self.micro, self.data_rank, group.rank, layer)
        generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        generator.manual_seed(number(*key, bits=63))


class _Dropout(torch.autograd.Function):
    """Dropout whose backward pass computes the mask again, which is faster than storing the mask and saves memory.

    `samples` and `key` have no gradient and are small, so they are attributes of `ctx` and not saved tensors. If they
    were saved tensors, recomputation would have to compute everything up to a block's last dropout."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, samples: Tensor, p: float, key: Tensor, first: int) -> Tensor:
        ctx.samples, ctx.p, ctx.key, ctx.first = samples, p, key, first
        # A tensor that requires a gradient would be another case for torch.compile, which it would compile too.
        return _dropped(hidden.detach(), samples, p, key, first)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _dropped(gradient, ctx.samples, ctx.p, ctx.key, ctx.first), None, None, None, None


@partial(compiled, dynamic=None)  # called four times in each layer, and most runs have one shape
def _dropped(hidden: Tensor, samples: Tensor, p: float, key: Tensor, first: int) -> Tensor:
    mask = hash_dropped(samples, hidden.size(1), hidden.size(2), p, key, first)
    return hidden.masked_fill(mask, 0.0) * (1.0 / (1.0 - p))


def hash_dropped(samples: Tensor, length: int, channels: int, p: float, key: Tensor, first: int = 0) -> Tensor:
    """A bool mask (B, length, channels) that is true where dropout with probability `p` sets an element to zero.

    The mask needs no random generator. An element's random number is a hash in int32 arithmetic: the exclusive or of a
    hash of (sample, position, key) and a hash of (channel, key) is hashed again. `samples` is (B,) int64, and `key` is
    a 0-d int32 tensor. The first of the `length` positions is `first`.
    """
    low, high = samples.to(torch.int32), (samples >> 32).to(torch.int32)
    sample = mix(low + mix(high + key))
    position = torch.arange(first, first + length, dtype=torch.int32, device=samples.device)
    channel = torch.arange(channels, dtype=torch.int32, device=samples.device)
    rows = mix(sample.unsqueeze(-1) + mix(position * GOLDEN))
    hashes = mix(rows.unsqueeze(-1) ^ mix(channel * GOLDEN + key))
    return hashes < int(p * 2**32) - 2**31


def mix(values: Tensor) -> Tensor:
    """The hash lowbias32 of int32 values. Products wrap around. The masks make the right shifts logical shifts."""
    mixed = values ^ ((values >> 16) & 0xFFFF)
    mixed *= _FIRST
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed *= _SECOND
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed


def number(*key: object, bits: int = 31) -> int:
    """A pseudo-random integer in [0, 2^bits), a pure function of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> (64 - bits)


def uniform(*key: object) -> float:
    """A pseudo-random number in [0, 1), a pure function of `key`."""
    return number(*key, bits=53) / 2**53
