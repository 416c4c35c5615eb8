"""LoRA terms of the parallel linear layers (Hu et al. 2021, section 4.1).

    W x + (alpha / rank) · B A x       A (rank, in) random, B (out, rank) zero at the start, W frozen

In a column-parallel layer, A is replicated, and B is split along the outputs like W. In a row-parallel layer, A is
split along the inputs, and B is replicated. The ranks all-reduce a tensor whose last dim is the LoRA rank. This tensor
is the gradient of A x in a column-parallel layer, and A x in a row-parallel layer. With sequence parallelism, they
gather and reduce-scatter it, and all-reduce the gradients of the replicated matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel.collectives import copy, reduce
from opt_parallel.parallel.products import part_product
from opt_parallel.parallel.sequence import Split, gather, reduce_scatter
from opt_parallel.parallel.shard import Normal
from opt_parallel.parallel.topology import Group

CHUNK = 2**22  # number of elements that `merge` converts to float64 at a time


def initial_a(in_features: int) -> Normal:
    """The normal distribution of an initial A, with the same variance as in peft.

    peft uses kaiming_uniform_ with a = √5, which is uniform in ±1/√in and has the variance 1 / (3 in)."""
    return Normal((3 * in_features) ** -0.5)


def column_term(
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    blocks: tuple[int, ...],
    count: int,
    group: Group,
    split: Split | None = None,
) -> Tensor:
    """The LoRA term of a column-parallel layer with `count` blocks: (…, in) → (…, count · out/t).

    The result is `scale` · B A `hidden` in each of the `blocks`, and zero in the other blocks. `hidden` is equal on
    all ranks: `copy` is applied to A `hidden`, not to `hidden`. So every rank computes the complete gradients of A and
    of `hidden`, and not only its summand of them. With a `split`, `hidden` is this rank's part of the positions, and
    A `hidden` is gathered.

    Args:
        a: (n, rank, in) for n `blocks`, or (rank, in).
        b: (n, out/t, rank), or (out/t, rank).
    """
    if split is None:
        narrow = copy(F.linear(hidden, a.flatten(0, -2)) * scale, group)
    else:
        narrow = gather(part_product(hidden, a, group) * scale, split)
    parts = list(b.view(len(blocks), -1, b.size(-1)))
    nothing = b.new_empty(parts[0].size(0), 0)  # becomes rows of zeros in the block-diagonal matrix
    return F.linear(narrow, torch.block_diag(*(parts.pop(0) if n in blocks else nothing for n in range(count))))


def row_term(hidden: Tensor, a: Tensor, b: Tensor, scale: float, group: Group, split: Split | None = None) -> Tensor:
    """The LoRA term of a row-parallel layer, `scale` · B Σ_i A_i y_i: (…, in/t) → (…, out), equal on all ranks.

    With a `split`, the result is this rank's part of the positions. `a` is (rank, in/t), and `b` is (out, rank)."""
    narrow = F.linear(hidden, a) * scale
    if split is None:
        return F.linear(reduce(narrow, group), b)
    return part_product(reduce_scatter(narrow, split), b, group)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add `scale` · B A to the fp32 `weight` (out, in) in place, where `a` is (rank, in) and `b` is (out, rank).

    The sum is computed in float64 and rounded once. So the bits of an element do not depend on which other elements
    are merged in the same call."""
    a = a.double() * scale
    for first in range(0, weight.size(0), max(1, CHUNK // weight.size(1))):
        rows = slice(first, first + max(1, CHUNK // weight.size(1)))
        weight[rows] = (weight[rows].double() + b[rows].double() @ a).float()
