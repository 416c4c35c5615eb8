"""Stochastic rounding to bf16, which does not depend on how the run is split over processes.

A value is rounded up with a probability equal to its distance from the next lower bf16 value, in units of their
distance, so the rounded value is right on average. Updates that are smaller than half the distance of two bf16 values
would have no effect if they were rounded to the nearest value. The random bits are a hash of the seed, the step, the
parameter and the index of the element in the full (unsplit) tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opt_parallel.parallel.compiled import compiled
from opt_parallel.parallel.random import GOLDEN, mix
from opt_parallel.parallel.shard import Shard


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter in a flat tensor.

    The `count` elements of the flat tensor from `offset` on are the elements from `start` on of the flattened `shard`.
    `address` is a random number of the parameter, to which the indices of its elements are added."""

    address: int
    shard: Shard
    start: int
    offset: int
    count: int


def addresses(pieces: Iterable[Piece], begin: int, end: int, device: torch.device) -> Tensor:
    """A number (end - begin,) int64 for each element of a flat tensor from `begin` to `end`, which is the same in every
    layout. Elements that belong to no piece are padding, and get 0."""
    found = torch.zeros(end - begin, dtype=torch.int64, device=device)
    for piece in pieces:
        low, high = max(begin, piece.offset), min(end, piece.offset + piece.count)
        if low < high:
            first = piece.start + low - piece.offset
            local = torch.arange(first, first + high - low, device=device)
            found[low - begin : high - begin] = piece.shard.index_of(local) + piece.address
    return found


def keys(step: Tensor, count: int) -> Tensor:
    """`count` keys (count,) int32 for the roundings of the update number `step`, a 0-d tensor."""
    kinds = torch.arange(count, dtype=torch.int32, device=step.device)
    return mix((step.to(torch.int32) * count + kinds) * GOLDEN)


@compiled
def rounded(values: Tensor, numbers: Tensor, rounding: Tensor) -> Tensor:
    """`values` (k, n) fp32, rounded stochastically to bf16. The random bits depend on the `addresses` (n,) of the
    elements, and on the keys `rounding` (k,) of the rows.

    A bf16 value has the upper 16 bits of an fp32 value. A random number of 16 bits is added to the lower 16 bits, and
    these bits are then removed. So the carry rounds the magnitude up, and a bf16 value does not change."""
    hashed = mix(numbers.to(torch.int32) ^ mix((numbers >> 32).to(torch.int32)))
    noise = mix(hashed ^ rounding[:, None]) & 0xFFFF
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)
