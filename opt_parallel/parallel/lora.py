"""LoRA terms of the parallel linear layers (Hu et al. 2021, section 4.1).

    W x + (alpha / rank) · B A x       A (rank, in) random, B (out, rank) zero at the start, W frozen

In a column-parallel layer A is replicated, and B is split along the outputs like W. In a row-parallel layer A is split
along the inputs, and B is replicated. The ranks exchange tensors of width `rank`: the gradient of A x in a
column-parallel layer, A x itself in a row-parallel layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel.collectives import copy, reduce
from opt_parallel.parallel.shard import Normal
from opt_parallel.parallel.topology import Group

CHUNK = 2**22  # elements merged at a time


def initial_a(in_features: int) -> Normal:
    """Normal, with the variance of peft's initial A: kaiming_uniform_ with a = √5 is uniform in ±1/√in, and its
    variance is 1 / (3 in)."""
    return Normal((3 * in_features) ** -0.5)


def column_term(
    hidden: Tensor, a: Tensor, b: Tensor, scale: float, blocks: tuple[int, ...], count: int, group: Group
) -> Tensor:
    """(…, in) → (…, count · out/t): `scale` · B A `hidden` in each of `blocks`, zero in the other blocks.

    `hidden` is the layer's input before `copy`, equal on all ranks; `copy` is applied to A x instead. Every rank then
    has the complete gradients of A and of `hidden`, not a summand.

    Args:
        a: (n, rank, in) for n `blocks`, or (rank, in).
        b: (n, out/t, rank), or (out/t, rank).
    """
    narrow = copy(F.linear(hidden, a.flatten(0, -2)) * scale, group)
    parts = list(b.view(len(blocks), -1, b.size(-1)))
    nothing = b.new_empty(parts[0].size(0), 0)  # gives rows of zeros in the block diagonal
    return F.linear(narrow, torch.block_diag(*(parts.pop(0) if n in blocks else nothing for n in range(count))))


def row_term(part: Tensor, a: Tensor, b: Tensor, scale: float, group: Group) -> Tensor:
    """(…, in/t) → (…, out): `scale` · B Σ_i A_i y_i, equal on all ranks. `a` (rank, in/t), `b` (out, rank)."""
    return F.linear(reduce(F.linear(part, a) * scale, group), b)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add `scale` · B A to `weight` (out, in), fp32, in place. `a` (rank, in), `b` (out, rank).

    Computed in float64 and rounded once, so that the bits do not depend on which range of a tensor is merged."""
    a = a.double() * scale
    for first in range(0, weight.size(0), max(1, CHUNK // weight.size(1))):
        rows = slice(first, first + max(1, CHUNK // weight.size(1)))
        weight[rows] = (weight[rows].double() + b[rows].double() @ a).float()
